"""Answers to gdb's packets.

Goal: every packet of gdb has an answer, and it is the manual's.  Method: packets against a program
without threads, and Hypothesis.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softsgx.engines.native.gdb.files import HostFiles
from softsgx.engines.native.gdb.libraries import Library, libraries_xml, linked_libraries
from softsgx.engines.native.gdb.memory import DebuggedMemory
from softsgx.engines.native.gdb.packets import unescape
from softsgx.engines.native.gdb.server import GdbServer
from softsgx.engines.native.gdb.session import Session
from softsgx.engines.native.gdb.target import Action, StopReason
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.errors import SoftSgxError


class Gone:
    """Memory that is no more."""

    def __getattr__(self, name: str) -> Any:
        raise OSError(14, name)


class Ended:
    """A program whose threads have ended; what it was asked for is in ``asked``."""

    pid = 0x123
    reason = StopReason(0x123, 5)
    memory = cast(DebuggedMemory, Gone())

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def program_threads(self) -> dict[int, ProgramThread]:
        return {}

    def libraries(self) -> tuple[int, list[Library]]:
        return 0, []

    def pass_signals(self, numbers: frozenset[int]) -> None:
        self.asked.append(numbers)

    def resume_threads(self, actions: Mapping[int, Action], default: Action | None) -> None:
        self.asked.append((dict(actions), default))

    def attach(self) -> None:
        self.asked.append("attach")

    def break_in(self) -> None:
        self.asked.append("break in")

    def detach(self) -> None:
        self.asked.append("detach")

    def end_process(self) -> None:
        self.asked.append("end")


@given(
    st.sampled_from(
        [b"g", b"G", b"p", b"P", b"m", b"M", b"X", b"Z0,", b"z0,", b"H", b"T", b"vCont;"]
    )
    | st.sampled_from(
        [b"vFile:", b"vFile:pread:", b"qXfer:auxv:read:", b"qRcmd,", b"QPassSignals:"]
    )
    | st.binary(max_size=3),
    st.binary(max_size=20),
)
def test_any_packet_of_gdb_is_answered_or_refused(begin: bytes, rest: bytes) -> None:
    packet = begin + rest
    if packet[:5] == b"vFile" or packet[:5] == b"qRcmd":
        packet = packet.replace(b"open", b"")
    answer = Session(Ended()).answer(packet)
    assert answer is None or isinstance(answer, bytes)
    if answer is None:
        assert packet[:1] in (b"k", b"v")


def test_features_are_those_that_both_know() -> None:
    session = Session(Ended())
    told = session.answer(b"qSupported:multiprocess+;swbreak+")
    assert told is not None
    ours = told.split(b";")
    assert b"multiprocess+" in ours
    assert b"exec-events-" in ours
    assert b"qXfer:libraries-svr4:read+" in ours
    assert session.answer(b"unknown") == b""
    assert session.answer(b"vUnknown") == b""


def test_the_end_of_a_process_is_reported_by_status_or_signal() -> None:
    session = Session(Ended())
    assert session.end_reply(7 << 8) == b"W07"
    assert session.end_reply(9) == b"X09"
    session.answer(b"qSupported:multiprocess+")
    assert session.end_reply(0) == b"W00;process:123"


def test_signals_that_gdb_does_not_want_to_hear_of_have_linux_numbers() -> None:
    target = Ended()
    assert Session(target).answer(b"QPassSignals:e;1e;14") == b"OK"
    assert target.asked == [frozenset({14, 10, 17})]


def test_an_action_without_a_thread_is_that_of_all_others() -> None:
    target = Ended()
    session = Session(target)
    assert session.answer(b"vCont;r1000,1010:p123.5;C0b") is None
    assert session.waits
    ((actions, default),) = target.asked
    assert actions == {}, "thread 5 has ended"
    assert default == Action(number=11)


def test_a_list_of_libraries_is_read_from_the_dynamic_linkers() -> None:
    memory = bytearray(0x1000)

    def put(at: int, *words: int) -> None:
        memory[at : at + 8 * len(words)] = b"".join(word.to_bytes(8, "little") for word in words)

    put(0x40, 4 << 32 | 6, 0x40, 0x40, 0, 0, 0, 0)  # PT_PHDR
    put(0x40 + 56, 6 << 32 | 2, 0x200, 0x200, 0, 0x20, 0x20, 8)  # PT_DYNAMIC
    put(0x200, 21, 0x300, 0, 0)  # DT_DEBUG
    put(0x300, 1, 0x400)  # r_debug
    put(0x400, 0, 0x500, 0, 0x440)  # the program itself
    put(0x440, 0x7000, 0x508, 0x7800, 0)
    memory[0x508:0x514] = b"/lib/<a&b>\0\0"

    def read(address: int, size: int) -> bytes:
        if address >= len(memory):
            raise OSError
        return bytes(memory[address : address + size])

    main, found = linked_libraries({3: 0x40, 5: 2}, read)
    assert (main, found) == (0x400, [Library("/lib/<a&b>", 0x440, 0x7000, 0x7800)])
    assert b'name="/lib/&lt;a&amp;b&gt;"' in libraries_xml(main, found)
    put(0x448, 0xFFFF_0000)  # its name is nowhere
    assert linked_libraries({3: 0x40, 5: 2}, read) == (0, [])


def test_files_are_read_and_never_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"some $#}* bytes")
    files, name = HostFiles(), str(path).encode().hex().encode()
    assert files.answer(b"open:%b,1,0" % name) == b"F-1,d"
    descriptor = files.answer(b"open:%b,0,0" % name)[1:]
    answer = files.answer(b"pread:%b,100,5" % descriptor)
    length, _semicolon, data = answer.partition(b";")
    assert (length, unescape(data)) == (b"Fa", b"$#}* bytes")
    assert len(unescape(files.answer(b"fstat:%b" % descriptor).partition(b";")[2])) == 64
    assert files.answer(b"close:%b" % descriptor) == b"F0"
    assert files.answer(b"pread:%b,100,5" % descriptor) == b"F-1,9"
    assert files.answer(b"pread:0,100,0") == b"F-1,9", "descriptors of ours are not gdb's"
    files.close()


# --- where gdb connects ---------------------------------------------------------------------------


def test_a_port_alone_is_one_of_loopback() -> None:
    server = GdbServer("0")
    assert server.address.startswith("127.0.0.1:")
    assert not server.is_public
    server.close()


def test_another_host_is_public() -> None:
    server = GdbServer("0.0.0.0:0")
    assert server.is_public
    server.close()


def test_a_unix_socket_is_its_owners_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    server = GdbServer(str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(SoftSgxError, match="choose another"):
        GdbServer(str(path))
    server.close()
    assert not path.exists()


@pytest.mark.parametrize("place", ["", "x", "host:", "70000", "-1", "localhost:x", "1:2:3"])
def test_an_invalid_place_is_refused_in_a_line(place: str) -> None:
    with pytest.raises(SoftSgxError, match=r"^--gdb "):
        GdbServer(place)


@pytest.fixture
def _blocked_sigio() -> Iterator[None]:
    """As while a program runs."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
    yield
    while signal.sigtimedwait({signal.SIGIO}, 0) is not None:
        continue
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.usefixtures("_blocked_sigio")
def test_one_gdb_at_a_time_is_served_and_tells_by_a_signal() -> None:
    server = GdbServer("0")
    host, _colon, port = server.address.rpartition(":")
    assert not server.accept()
    with socket.create_connection((host, int(port))) as first:
        assert server.accept()
        first.sendall(b"+")
        with socket.create_connection((host, int(port))):
            assert not server.accept()
        assert signal.sigtimedwait({signal.SIGIO}, 10) is not None
        server.send(b"hello")
        assert first.recv(5) == b"hello"
    assert server.receive() == b"+"
    assert server.receive() is None
    assert not server.connected
    server.close()
