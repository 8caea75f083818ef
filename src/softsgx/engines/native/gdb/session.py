"""A session with one gdb: answers its packets.

Answers follow gdb's manual: empty for an unknown packet, ``E`` and an errno value for a refusal.
Numbers are hexadecimal; registers and memory are bytes in the machine's order.

Source:
    "Debugging with GDB", "gdb Remote Serial Protocol": "Packets", "Stop Reply Packets", "General
    Query Packets", "Host I/O Packets".
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from errno import EINVAL, EIO, ESRCH
from xml.sax.saxutils import quoteattr

from softsgx.engines.native.gdb import monitor
from softsgx.engines.native.gdb.files import HostFiles
from softsgx.engines.native.gdb.libraries import libraries_xml
from softsgx.engines.native.gdb.packets import escape, unescape
from softsgx.engines.native.gdb.registers import REGISTERS, description, has_avx
from softsgx.engines.native.gdb.signals import from_gdb, to_gdb
from softsgx.engines.native.gdb.ssa import SsaFrame
from softsgx.engines.native.gdb.target import (
    Action,
    Debugged,
    registers_of,
    set_registers_of,
)
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.tracing.tracee import Gone

__all__ = ["Session"]

_PACKET_BYTES = 1 << 17
_AT_SYSINFO_EHDR = 33
_AUXV_ENTRY_BYTES = 16
#: Registers that a stop reply has, since gdb asks for them after every stop.
_EXPEDITED = tuple(
    number for number, each in enumerate(REGISTERS) if each.name in ("rbp", "rsp", "rip")
)
_ALL, _ANY = -1, 0
_THREAD = re.compile(rb"(?:p(-?[0-9a-f]+)(?:\.(-?[0-9a-f]+))?|(-?[0-9a-f]+))")


class _Refused(Exception):
    """A packet asks for something impossible; ``errno`` says why."""

    def __init__(self, errno: int) -> None:
        super().__init__(os.strerror(errno))
        self.errno = errno


class Session:
    """See the module.

    Args:
        target: the program.

    Attributes:
        acknowledges: whether gdb wants packets to be acknowledged.
        waits: whether gdb has let the program run and waits for a stop reply.
        knows_exec: whether gdb accepts stops by execve.
    """

    def __init__(self, target: Debugged) -> None:
        self._target = target
        self._files = HostFiles()
        self.acknowledges, self.waits, self.knows_exec = True, False, False
        self._multiprocess = False
        self._selected = _ANY
        self._object: tuple[bytes, bytes] = b"", b""
        self._by_letter: dict[bytes, Callable[[bytes], bytes | None]] = {
            b"?": lambda _rest: self.stop_reply(),
            b"g": lambda _rest: registers_of(self._thread()).all().hex().encode(),
            b"G": self._set_all_registers,
            b"p": self._get_register,
            b"P": self._set_register,
            b"m": self._read_memory,
            b"M": self._write_memory,
            b"X": self._write_binary,
            b"Z": self._insert,
            b"z": self._remove,
            b"H": self._select,
            b"T": self._is_alive,
            b"D": self._detach,
            b"k": self._kill,
            b"q": self._query,
            b"Q": self._set,
            b"v": self._verbose,
        }

    def close(self) -> None:
        """Close the files that this gdb has left open."""
        self._files.close()

    def answer(self, packet: bytes) -> bytes | None:
        """Return the answer to a packet; ``None``: it has none, or a stop reply follows later."""
        handler = self._by_letter.get(packet[:1])
        if handler is None:
            return b""
        try:
            return handler(packet[1:])
        except _Refused as refused:
            return b"E%02x" % refused.errno
        except Gone:
            return b"E%02x" % ESRCH
        except OSError as error:
            return b"E%02x" % (error.errno if error.errno and error.errno < 256 else EIO)
        except (ValueError, IndexError):
            return b"E%02x" % EINVAL

    # --- stops ----------------------------------------------------------------------------------

    def stop_reply(self) -> bytes:
        """Return why the program has stopped."""
        reason = self._target.reason
        self._selected = reason.tid
        reply = b"T%02x%b" % (to_gdb(reason.number), reason.detail)
        thread = self._target.program_threads().get(reason.tid)
        if thread is None:
            return reply
        reply += b"thread:%b;" % self._name(reason.tid)
        try:
            file = registers_of(thread)
        except (Gone, OSError):  # gdb gets its end next
            return reply
        for number in _EXPEDITED:
            reply += b"%02x:%b;" % (number, file.get(number).hex().encode())
        return reply

    def end_reply(self, status: int) -> bytes:
        """Return the reply for the end of the process with this status of wait(2)."""
        code = os.waitstatus_to_exitcode(status)
        of_process = b";process:%x" % self._target.pid if self._multiprocess else b""
        if code >= 0:
            return b"W%02x%b" % (code, of_process)
        return b"X%02x%b" % (to_gdb(-code), of_process)

    # --- registers and memory -------------------------------------------------------------------

    def _thread(self) -> ProgramThread:
        """Return the thread that gdb has selected."""
        threads = self._target.program_threads()
        tid = self._selected if self._selected > 0 else self._target.reason.tid
        thread = threads.get(tid) or next(iter(threads.values()), None)
        if thread is None:
            raise _Refused(ESRCH)
        return thread

    def _set_all_registers(self, rest: bytes) -> bytes:
        file = registers_of(self._thread())
        file.set_all(bytes.fromhex(rest.decode()))
        set_registers_of(self._thread(), file)
        return b"OK"

    def _get_register(self, rest: bytes) -> bytes:
        return registers_of(self._thread()).get(int(rest, 16)).hex().encode()

    def _set_register(self, rest: bytes) -> bytes:
        number, _equals, value = rest.partition(b"=")
        file = registers_of(self._thread())
        file.set(int(number, 16), bytes.fromhex(value.decode()))
        set_registers_of(self._thread(), file)
        return b"OK"

    def _read_memory(self, rest: bytes) -> bytes:
        address, size = (int(word, 16) for word in rest.split(b","))
        size = min(size, _PACKET_BYTES // 2)
        if not size:
            return b""
        return self._target.memory.read(self._thread(), address, size).hex().encode()

    def _write_memory(self, rest: bytes) -> bytes:
        where, _colon, data = rest.partition(b":")
        return self._write(where, bytes.fromhex(data.decode()))

    def _write_binary(self, rest: bytes) -> bytes:
        where, _colon, data = rest.partition(b":")
        return self._write(where, unescape(data))

    def _write(self, where: bytes, data: bytes) -> bytes:
        address, size = (int(word, 16) for word in where.split(b","))
        if len(data) != size:
            raise _Refused(EINVAL)
        if data:
            self._target.memory.write(self._thread(), address, data)
        return b"OK"

    def _insert(self, rest: bytes) -> bytes:
        kind, address = rest.split(b";")[0].split(b",")[:2]
        if kind != b"0":
            return b""
        self._target.memory.insert(self._thread(), int(address, 16))
        return b"OK"

    def _remove(self, rest: bytes) -> bytes:
        kind, address = rest.split(b",")[:2]
        if kind != b"0":
            return b""
        self._target.memory.remove(self._thread(), int(address, 16))
        return b"OK"

    # --- threads --------------------------------------------------------------------------------

    def _name(self, tid: int) -> bytes:
        return b"p%x.%x" % (self._target.pid, tid) if self._multiprocess else b"%x" % tid

    def _select(self, rest: bytes) -> bytes:
        if rest[:1] == b"g":
            tid = _thread_id(rest[1:])
            if tid > 0 and tid not in self._target.program_threads():
                raise _Refused(ESRCH)
            self._selected = tid
        return b"OK"

    def _is_alive(self, rest: bytes) -> bytes:
        if _thread_id(rest) not in self._target.program_threads():
            raise _Refused(ESRCH)
        return b"OK"

    def _resume(self, rest: bytes) -> bytes | None:
        """Handle vCont: a thread's action is the first that names it, or names all threads."""
        actions: dict[int, Action] = {}
        default: Action | None = None
        threads = self._target.program_threads()
        for part in rest.split(b";")[1:]:
            what, _colon, who = part.partition(b":")
            action = _action(what)
            tid = _thread_id(who) if who else _ALL
            if tid == _ALL:
                default = action
                break
            if tid == _ANY:
                tid = self._target.reason.tid
            if tid in threads:
                actions.setdefault(tid, action)
        self.waits = True
        self._target.resume_threads(actions, default)
        return None

    def _detach(self, _rest: bytes) -> bytes:
        self._target.detach()
        return b"OK"

    def _kill(self, _rest: bytes) -> None:
        self._target.end_process()

    # --- queries --------------------------------------------------------------------------------

    def _query(self, rest: bytes) -> bytes:
        name = re.split(rb"[:,;]", rest, maxsplit=1)[0]
        match name:
            case b"Supported":
                return self._supported(rest)
            case b"Xfer":
                return self._transfer(rest)
            case b"Attached":
                return b"0"
            case b"C":
                return b"QC" + self._name(self._thread().tid)
            case b"fThreadInfo":
                names = [self._name(tid) for tid in sorted(self._target.program_threads())]
                return b"m" + b",".join(names) if names else b"l"
            case b"sThreadInfo":
                return b"l"
            case b"ThreadExtraInfo":
                thread = self._target.program_threads().get(_thread_id(rest.partition(b",")[2]))
                return _place(thread).encode().hex().encode() if thread is not None else b""
            case b"Symbol":
                return b"OK"
            case b"Rcmd":
                command = bytes.fromhex(rest.partition(b",")[2].decode()).decode()
                text = monitor.answer(self._target.memory.image, command)
                return text.encode().hex().encode() or b"OK"
            case _:
                return b""

    def _supported(self, rest: bytes) -> bytes:
        theirs = rest.partition(b":")[2].split(b";")
        self._multiprocess = b"multiprocess+" in theirs
        self.knows_exec = b"exec-events+" in theirs
        ours = [
            b"PacketSize=%x" % _PACKET_BYTES,
            *(b"QStartNoAckMode+", b"QPassSignals+", b"swbreak+", b"vContSupported+"),
            *(b"no-resumed+", b"exec-events+" if self.knows_exec else b"exec-events-"),
            b"multiprocess+" if self._multiprocess else b"multiprocess-",
            *(
                b"qXfer:%b:read+" % name
                for name in (
                    *(b"features", b"auxv", b"libraries-svr4", b"exec-file", b"threads"),
                    b"siginfo",
                )
            ),
        ]
        return b";".join(ours)

    def _set(self, rest: bytes) -> bytes:
        name, _colon, values = rest.partition(b":")
        if name == b"StartNoAckMode":
            self.acknowledges = False
            return b"OK"
        if name == b"PassSignals":
            found = [from_gdb(int(value, 16)) for value in values.split(b";") if value]
            self._target.pass_signals(frozenset(number for number in found if number))
            return b"OK"
        return b""

    def _verbose(self, rest: bytes) -> bytes | None:
        name = re.split(rb"[:;?]", rest, maxsplit=1)[0]
        if name == b"Cont":
            return b"vCont;c;C;s;S;r" if rest == b"Cont?" else self._resume(rest)
        if name == b"File":
            return self._files.answer(rest.partition(b":")[2])
        if name == b"Kill":
            self._target.end_process()
            return b"OK"
        return b""

    def _transfer(self, rest: bytes) -> bytes:
        """Handle ``qXfer:object:read:annex:offset,length``."""
        _xfer, name, operation, annex, place = rest.split(b":")
        if operation != b"read":
            return b""
        offset, size = (int(word, 16) for word in place.split(b","))
        if not offset or self._object[0] != name + b":" + annex:
            data = self._read_object(name, annex)
            if data is None:
                return b""
            self._object = name + b":" + annex, data
        data = self._object[1][offset : offset + min(size, _PACKET_BYTES // 2)]
        last = offset + len(data) >= len(self._object[1])
        return (b"l" if last else b"m") + escape(data)

    def _read_object(self, name: bytes, annex: bytes) -> bytes | None:
        thread = self._thread()
        match name, annex:
            case b"features", b"target.xml":
                return description(avx=has_avx(thread.xstate()))
            case b"auxv", b"":
                return _auxiliary_vector(thread)
            case b"exec-file", _:
                return os.fsencode(os.readlink(f"/proc/{thread.tid}/exe"))
            case b"libraries-svr4", _:
                return libraries_xml(*self._target.libraries())
            case b"threads", b"":
                return self._threads_xml()
            case b"siginfo", b"":
                trap = thread.outgoing
                return bytes(trap.info if trap is not None else thread.siginfo())
            case _:
                return None

    def _threads_xml(self) -> bytes:
        lines = "".join(
            f"<thread id={quoteattr(self._name(tid).decode())} "
            f"name={quoteattr(_command(tid))}>{_place(thread)}</thread>"
            for tid, thread in sorted(self._target.program_threads().items())
        )
        return f'<?xml version="1.0"?><threads>{lines}</threads>'.encode(errors="replace")


def _thread_id(text: bytes) -> int:
    """Return the thread of ``pPID.TID`` or ``TID``, -1 for all and 0 for any."""
    match = _THREAD.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} names no thread")
    pid, tid, alone = match.groups()
    if alone is not None:
        return int(alone, 16)
    return int(tid, 16) if tid is not None else (_ALL if pid else _ANY)


def _action(text: bytes) -> Action:
    """Return the action of one part of vCont."""
    kind, value = text[:1], text[1:]
    number = 0
    if kind in (b"C", b"S"):
        number = from_gdb(int(value, 16)) or 0
    if kind == b"r":
        start, end = (int(word, 16) for word in value.split(b","))
        return Action(step=True, start=start, end=end)
    if kind not in (b"c", b"C", b"s", b"S"):
        raise ValueError(f"{text!r} is no action")
    return Action(number=number, step=kind in (b"s", b"S"))


def _place(thread: ProgramThread) -> str:
    """Return the text that says where a thread is."""
    regs = thread.load()
    vma = thread.image.mm.find(regs.rbx)
    enclave = None if vma is None else vma.enclave
    if enclave is None:
        return "outside"
    if SsaFrame.of(thread) is not None:
        return f"in debug enclave {enclave.number}"
    at_aep = regs.rax == 3 and not enclave.debug
    return f"left production enclave {enclave.number}" if at_aep else "outside"


def _command(tid: int) -> str:
    try:
        with open(f"/proc/{tid}/comm", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""


def _auxiliary_vector(thread: ProgramThread) -> bytes:
    """Return the auxiliary vector that the program has: with the vDSO of the supervisor."""
    with open(f"/proc/{thread.tid}/auxv", "rb") as file:
        data = bytearray(file.read())
    for at in range(0, len(data), _AUXV_ENTRY_BYTES):
        if int.from_bytes(data[at : at + 8], "little") == _AT_SYSINFO_EHDR:
            data[at + 8 : at + 16] = thread.image.vdso_base.to_bytes(8, "little")
    return bytes(data)
