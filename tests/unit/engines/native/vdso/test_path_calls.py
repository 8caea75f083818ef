"""A call with a path that does not stop has the effects of one that does.

Method: the code of a stub is executed here, with a jump in the place of the program's own call; and
threads are put at each of its instructions.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
from errno import EINTR, ENOENT
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from softsgx.engines.native import abi
from softsgx.engines.native.doctor import can_answer_cpuid
from softsgx.engines.native.mappings import Mapping
from softsgx.engines.native.syscalls import nodes
from softsgx.engines.native.vdso import path_calls
from softsgx.engines.native.vdso.path_calls import (
    _MOST_PREPARED,
    _STUB_BYTES,
    PATH_BYTES,
    PathCalls,
    PathStubs,
    PathWindow,
    window_of_call,
)
from softsgx.engines.native.vdso.path_code import KEPT_BYTES, NUMBERS
from softsgx.engines.native.vdso.stubs import jump
from softsgx.engines.native.x86.insn import decode

LIBRARY_BYTES = 0x1000
SYSCALL = b"\x0f\x05"
AT = 0x200
ACCESS = bytes.fromhex("b8 15 00 00 00")
FACCESSAT = bytes.fromhex("b8 0d 01 00 00 89 ff")  # mov edi, edi between
OPEN = bytes.fromhex("b8 02 00 00 00")
OPENAT = bytes.fromhex("b8 01 01 00 00")
NEWFSTATAT = bytes.fromhex("b8 06 01 00 00")
STATX = bytes.fromhex("b8 4c 01 00 00")
FACCESSAT2 = bytes.fromhex("b8 b7 01 00 00")
#: The registers that a call changes meanwhile.
CHANGED = {OPEN: "rsi", OPENAT: "rdx", NEWFSTATAT: "r10 rdx", STATX: "rdx r8", FACCESSAT2: "r10"}
ROOM = ctypes.create_string_buffer(1024)


class Image:
    """A library, the word of devices and room for stubs in memory of this process."""

    def __init__(self, code: bytes) -> None:
        self.memory = mmap.mmap(-1, LIBRARY_BYTES + PATH_BYTES, prot=7)
        self.anchor = ctypes.c_char.from_buffer(self.memory)
        self.base = ctypes.addressof(self.anchor)
        self.memory[AT : AT + len(code) + 2] = code + SYSCALL
        self.vdso_base, self.vdso = self.base, SimpleNamespace(watched=8)
        self.memory_fd = os.open("/proc/self/mem", os.O_RDWR)
        self.stubs = PathStubs(self.base + LIBRARY_BYTES)
        self.window = PathWindow(AT, code)
        self.give([self.window])

    def give(self, windows: list[PathWindow]) -> None:
        """Give the library stubs."""
        image: Any = self
        code = self.memory[:LIBRARY_BYTES]
        self.stubs.store(
            image, self.base, self.stubs.prepare(image, self.base, windows, code, low=0)
        )

    def read(self, address: int, size: int) -> bytes:
        return os.pread(self.memory_fd, size, address)

    @property
    def site(self) -> int:
        return self.base + self.window.site

    def close(self) -> None:
        os.close(self.memory_fd)
        del self.anchor
        self.memory.close()


@pytest.fixture(
    params=[ACCESS, FACCESSAT, OPEN, OPENAT, NEWFSTATAT, STATX, FACCESSAT2],
    ids=["access", "faccessat", "open", "openat", "newfstatat", "statx", "faccessat2"],
)
def image(request: pytest.FixtureRequest) -> Any:
    made = Image(request.param)
    yield made
    made.close()


#: void call(uint64_t in[7], out[10], code): RDI, RSI, RDX, R9, flags, R10, R8; RAX, R9, flags,
#: how far RSP moved, 1 behind the call or 2 at the call, RDI, RSI, RDX, R10, R8.
_CALL = bytes.fromhex(
    "53 4154 4155"  # push rbx, r12, r13
    "4989f4 4989d5 4889fb"  # mov r12, rsi; mov r13, rdx; mov rbx, rdi
    "488b3b 488b7308 488b5310 4c8b4b18 4c8b5328 4c8b4330"  # mov rdi, rsi, rdx, r9, r10, r8
    "49896424 18"  # mov [r12+24], rsp
    "ff7320 9d"  # push [rbx+32]; popfq
    "41ffe5"  # jmp r13
)
_RETURN = bytes.fromhex(
    "9c 418f442410"  # pushfq; pop [r12+16]
    "49890424 4d894c2408"  # mov [r12], rax; mov [r12+8], r9
    "49296424 18"  # sub [r12+24], rsp
    "49895c2420"  # mov [r12+32], rbx
    "49897c2428 4989742430 4989542438"  # mov [r12+40], rdi; +48, rsi; +56, rdx
    "4d89542440 4d89442448"  # mov [r12+64], r10; +72, r8
    "415d 415c 5b c3"  # pop r13, r12, rbx; ret
)
_KEPT = 0x1122_3344_5566_7788


def executed(image: Image, path: int, flags: int, *, also: int = 0) -> tuple[int, int, int]:
    """Execute the code with a path, and ``also`` in the flags of its call.

    Returns:
        RAX, flags, and whether it came back behind the call (1) or at the call (2).
    """
    for place, number in ((0x400, 1), (0x500, 2)):
        code = b"\xbb" + struct.pack("<I", number) + _RETURN  # mov ebx, number
        image.memory[place : place + len(code)] = code
    image.memory[0x600 : 0x600 + len(_CALL)] = _CALL
    site = image.window.site
    image.memory[site : site + 2] = b"\xeb\x20"
    image.memory[site + 2 : site + 7] = b"\xe9" + struct.pack("<i", 0x400 - (site + 7))
    image.memory[site + 0x22 : site + 0x27] = b"\xe9" + struct.pack("<i", 0x500 - (site + 0x27))
    room = ctypes.addressof(ROOM)
    rdi, rsi, rdx, r10, r8 = {
        ACCESS: (path, os.R_OK, 0, 0, 0),
        OPEN: (path, os.O_CLOEXEC | also, 0, 0, 0),
        OPENAT: (0xFFFFFF9C, path, os.O_CLOEXEC | also, 0, 0),
        NEWFSTATAT: (0xFFFFFF9C, path, room, also, 0),
        STATX: (0xFFFFFF9C, path, also, 0xFFF, room),
    }.get(image.window.code, (0xFFFFFF9C, path, os.R_OK, also, 0))
    given = (ctypes.c_uint64 * 7)(rdi, rsi, rdx, _KEPT, flags, r10, r8)
    out = (ctypes.c_uint64 * 10)()
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    call(image.base + 0x600)(
        ctypes.addressof(given), ctypes.addressof(out), image.base + image.window.start
    )
    rax, r9, then, moved, how, *registers = out
    assert (r9, moved) == (_KEPT, 0)
    assert registers == [rdi, rsi, rdx, r10, r8]
    assert then & 0x8D5 == flags & 0x8D5
    if how == 2:
        assert rax == int.from_bytes(image.window.code[1:5], "little")
    elif image.window.code in (OPEN, OPENAT) and rax < 1 << 31:
        os.close(rax)
    return rax, then, how


@pytest.fixture
def pages() -> Any:
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    yield memory
    memory.close()


NEVER = ["/dev/sgx", "/dev/sgx_enclave", "/proc/self/maps", "/proc", "/sys/fs/cgroup", "/system"]
NEVER += ["/dev/fd/1", "/dev/stdin"]
ALWAYS = ["/", "/dev", "/dev/null", "/dev/sg0", "/etc/passwd", "/device/sg", "x", "/de", "sgx/a"]
ALWAYS += ["nothing", "/nothing/enclave1", "a/sgxx", "provision/", "/dev/"]
#: No file has these names, and they end as a node's.
ENDS = ["sgx_enclave", "dev/sgx", "/device/sgx", "sgx", "/dev//sgx_enclave", "a/enclave", "./sgx/"]
ENDS += ["/dev/./sgx/provision", "sgx_provision", "enclave"]


@pytest.mark.skipif(not can_answer_cpuid(), reason="needs BMI2")
@pytest.mark.parametrize("flags", [0x246, 0x2 | 0x8D5])
@pytest.mark.parametrize("path", NEVER + ALWAYS + ENDS)
def test_only_paths_that_lead_to_no_node_pass_and_registers_are_kept(
    image: Image, path: str, flags: int, pages: Any
) -> None:
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for at in (4, 100, mmap.PAGESIZE - 8, mmap.PAGESIZE - 9, mmap.PAGESIZE - 1):
        pages[at : at + len(path) + 1] = path.encode() + b"\0"
        rax, _flags, how = executed(image, start + at, flags)
        passes = path in ALWAYS and (start + at) % mmap.PAGESIZE < mmap.PAGESIZE - 8
        assert how == (1 if passes else 2), at
        if passes:
            assert (rax < 1 << 31) == os.access(path, os.R_OK)
            assert rax < 1 << 31 or rax == 2**64 - ENOENT


@pytest.mark.skipif(not can_answer_cpuid(), reason="needs BMI2")
def test_links_that_lead_nowhere_stop_where_the_call_can_tell(
    image: Image, tmp_path: Path, pages: Any
) -> None:
    (tmp_path / "lost").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").touch()
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + 64
    can_tell = image.window.code not in (ACCESS, FACCESSAT)
    is_open = image.window.code in (OPEN, OPENAT)
    follow_not = os.O_NOFOLLOW if is_open else abi.AT_SYMLINK_NOFOLLOW
    for name, also, passes, found in (
        ("lost", 0, not can_tell, False),
        ("lost", follow_not, True, can_tell and not is_open),
        ("link", 0, True, True),
        ("file", 0, True, True),
        ("none", 0, True, False),
        ("none", follow_not, True, False),
        ("lost/none", 0, True, False),
        ("file", os.O_CREAT if is_open else 0, not is_open, True),
    ):
        text = os.fsencode(tmp_path / name) + b"\0"
        pages[64 : 64 + len(text)] = text
        rax, _flags, how = executed(image, start, 0x246, also=also)
        assert how == (1 if passes else 2), (name, also)
        assert not passes or (rax < 1 << 31) == found, (name, also, rax)


@pytest.mark.skipif(not can_answer_cpuid(), reason="needs BMI2")
def test_a_call_without_a_path_passes_until_there_is_a_device(image: Image, pages: Any) -> None:
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + 64
    assert executed(image, start, 0x246)[2] == 1
    assert executed(image, 0, 0x246)[2] == 2
    image.memory[image.vdso.watched] = 1
    assert executed(image, start, 0x246)[2] == 2


def test_each_name_of_a_node_starts_as_paths_that_stop_do() -> None:
    names = [*nodes.devices(), nodes.CGROUP, nodes._CPUINFO, b"/proc/self/mem"]
    for name in names:
        assert name.startswith((b"/dev/sgx", b"/sys", b"/pro")), name
    assert all(start.startswith((b"/dev/sgx", b"/sys", b"/pro")) for start in nodes._PREFIXES)


class Stopped:
    """A thread that is stopped in a stub."""

    def __init__(self, image: Any, *, fault: int = 0, **regs: int) -> None:
        self.image, self.regs, self.stored = image, SimpleNamespace(**regs), 0
        self.at_signal, self.fault = bool(fault), fault

    def load(self) -> Any:
        return self.regs

    def store(self) -> None:
        self.stored += 1

    def siginfo(self) -> Any:
        return SimpleNamespace(signo=self.fault, code=1)


class State(NamedTuple):
    """A place in a stub, and what is true of a thread there; ``ready`` if its own call follows."""

    at: int
    moved: int
    marked: bool
    made: bool
    ready: bool
    reads: bool


def states(image: Image) -> list[State]:
    """Return the state at each instruction of the stub, in the order of their addresses."""
    start, copied = LIBRARY_BYTES, len(image.window.code)
    made = image.window.path_code
    code = bytes(image.memory[start : start + copied + len(made.code)])
    found, at, moved, marked, calls = [], 0, 0, False, 0
    while at < len(code):
        if at == copied + made.labels["missing"]:
            moved, marked = -KEPT_BYTES, True
        insn = decode(code[at:])
        assert insn is not None
        text = code[at : at + insn.length]
        ready = at >= copied + made.labels["missing"]
        loads = text[:2] in (b"\x0f\xb6", b"\x8b\x0f", b"\x8b\x0e", b"\x8b\x4f", b"\x8b\x4e")
        loads |= text[:3] in (b"\x41\x0f\xb6", b"\x41\x8b\x4b")
        loads |= text.startswith(b"\x4c\x89\x0c\x24")  # the stack may end
        found.append(State(at, moved, marked, bool(calls) and not ready, ready, loads))
        if text.startswith(b"\x48\x8d\xa4\x24"):
            moved += struct.unpack_from("<i", text, 4)[0]
        marked = (marked or text.startswith(b"\x49\xb9")) and text != b"\x4c\x8b\x0c\x24"
        calls += text == SYSCALL
        at += insn.length
    assert (moved, marked, calls) == (0, False, 2 if made.flags else 1)
    return found


@pytest.mark.parametrize("result", [0, 2**64 - ENOENT, 2**64 - EINTR])
def test_a_stopped_thread_is_at_the_call_or_behind_it(image: Image, result: int) -> None:
    copied, made = len(image.window.code), image.window.path_code
    stack = ctypes.create_string_buffer(4096)
    rsp = ctypes.addressof(stack) + 2048
    number = int.from_bytes(image.window.code[1:5], "little")
    names = [name for name in (made.flags, made.buffer) if name]
    assert set(names) == set(CHANGED.get(image.window.code, "").split())
    for at, moved, marked, called, ready, _reads in states(image):
        changed = made.labels["changed"] <= at - copied < made.labels["unchanged"]
        kept = (
            [77, 55, 66] if marked or moved else [88, 88, 88]
        )  # nothing is there yet, or any more
        struct.pack_into("<3Q", stack, 2048 - KEPT_BYTES, *kept)
        r9 = abi.OUR_CALL if marked else 77
        others = {"rsi": 1, "rdx": 2, "r10": 3, "r8": 4}
        expected = dict(others)
        if changed:
            expected |= {
                name: value
                for name, value in zip((made.flags, made.buffer), (55, 66), strict=True)
                if name
            }
        thread: Any = Stopped(
            image, rip=image.base + LIBRARY_BYTES + at, rsp=rsp + moved, r9=r9, rax=result, **others
        )
        assert not image.stubs.straighten(thread)
        then = image.base + AT + at if at < copied else image.site + 2 * called
        rax = result
        if ready or (called and result == 2**64 - ENOENT):
            then, rax = image.site, number
        assert vars(thread.regs) == {"rip": then, "rsp": rsp, "r9": 77, "rax": rax, **expected}, at
        assert thread.stored == 1


def test_only_a_fault_of_the_stub_is_not_the_programs(image: Image) -> None:
    copied = len(image.window.code)
    stack = ctypes.create_string_buffer(512)

    def is_ours(fault: int, rip: int) -> bool:
        rsp = ctypes.addressof(stack)
        thread: Any = Stopped(
            image, fault=fault, rip=rip, rsp=rsp, r9=0, rax=0, rsi=0, rdx=0, r8=0, r10=0
        )
        return image.stubs.straighten(thread)

    reads = 0
    for state in states(image):
        rip = image.base + LIBRARY_BYTES + state.at
        if state.at > copied and state.reads:
            reads += 1
            assert is_ours(abi.SIGSEGV, rip)
            assert is_ours(abi.SIGBUS, rip)
        assert not is_ours(signal.SIGUSR1, rip)
        if state.at <= copied or state.made:
            assert not is_ours(abi.SIGSEGV, rip)
    assert reads == 7
    assert not is_ours(abi.SIGSEGV, image.site)


@pytest.mark.parametrize(
    ("code", "number", "found"),
    [
        ("b801010000", 257, "b801010000"),
        ("b801010000 4889fe bf9cffffff", 257, "b801010000 4889fe bf9cffffff"),
        ("b801010000", 258, None),  # another number
        ("b827000000", 39, None),  # a call without a path
        ("b801010000 8b0500000000", 257, None),  # not the same elsewhere
        ("41b801010000", 257, None),  # mov r8d
    ],
)
def test_only_code_that_sets_the_number_is_replaced(
    code: str, number: int, found: str | None
) -> None:
    before = bytes.fromhex(code)
    whole = b"\x90" * (128 - len(before)) + before + SYSCALL + b"\x90" * 60
    expected = None if found is None else bytes.fromhex(found)
    assert window_of_call(whole, 128, number) == expected
    assert window_of_call(whole.replace(SYSCALL, b"\xcd\x80"), 128, number) is None


def test_stubs_that_have_no_room_are_left_out(image: Image) -> None:
    image.give([image.window] * 200)
    assert len(image.stubs._stubs) == PATH_BYTES // _STUB_BYTES
    copy = image.stubs.copy()
    assert copy._stubs == image.stubs._stubs
    assert copy._stubs is not image.stubs._stubs


def test_the_calls_of_a_library_get_stubs_one_behind_the_other(image: Image) -> None:
    start = AT + 200
    image.memory[start - 40 : start] = between = bytes(range(40))
    image.memory[start : start + 5] = OPENAT
    both = [image.window, PathWindow(start, OPENAT)]
    image.memory[AT : AT + len(image.window.code)] = image.window.code
    first = image.base + LIBRARY_BYTES
    image.stubs = PathStubs(first)
    image.give(both)
    assert image.memory[AT : AT + 5] == jump(AT, LIBRARY_BYTES)
    assert image.memory[start : start + 5] == jump(start, LIBRARY_BYTES + _STUB_BYTES)
    assert image.memory[start - 40 : start] == between
    for number, window in enumerate(both):
        alone: Any = PathStubs(first + number * _STUB_BYTES)
        expected = alone.prepare(image, image.base, [window], b"", 0).stubs
        place = LIBRARY_BYTES + number * _STUB_BYTES
        assert image.memory[place : place + _STUB_BYTES] == expected


class Program:
    """A program in this process: a C library, and a handler that lets each call be the kernel's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.image: Any = Image(ACCESS)
        self.image.close()
        self.calls = PathCalls(jumping=True)
        table = self.calls.watching({number: lambda _thread: None for number in NUMBERS})
        self._handler = table[abi.SYS_ACCESS]
        self.asked: list[int] = []
        monkeypatch.setattr(path_calls, "mapping_at", self._mapping_at)
        self.load()

    def load(self, code: bytes = ACCESS, paths: int = LIBRARY_BYTES) -> None:
        """Map the library anew, with stubs at a distance: its code has no jumps."""
        image: Any = Image(code)
        self.image = image
        image.memory[: 2 * AT] = b"\x90" * 2 * AT
        image.memory[AT : AT + len(code) + 2] = code + SYSCALL
        image.path_stubs, image.loader, image.members = None, 0, 1
        image.vdso_base, image.vdso = image.base, SimpleNamespace(watched=8, paths=paths)

    def _mapping_at(self, tid: int, _site: int) -> Mapping:
        self.asked.append(tid)
        start = self.image.base
        return Mapping(start, start + LIBRARY_BYTES, 5, False, 0, 7, 8, "/lib/libc.so.6")

    def stop(self) -> None:
        """The call stops."""
        regs = SimpleNamespace(rip=self.image.base + AT + 7, orig_rax=abi.SYS_ACCESS)
        assert self._handler(SimpleNamespace(tid=1, image=self.image, regs=regs)) is None  # type: ignore[arg-type]

    @property
    def has_jump(self) -> bool:
        return bool(self.image.memory[AT] == 0xE9)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Program(monkeypatch)
    yield made
    made.image.close()


def test_a_library_gets_its_stubs_at_the_second_stop_and_in_other_programs_at_the_first(
    program: Program,
) -> None:
    program.stop()
    assert not program.has_jump
    program.stop()
    assert program.has_jump
    program.load()
    program.stop()
    assert program.has_jump
    program.load(OPEN)
    program.stop()
    assert not program.has_jump, "it is other code"
    program.load()
    program.image.members = 2
    program.stop()
    assert not program.has_jump, "another thread may execute it"


def test_a_library_gets_jumps_to_where_its_stubs_are(program: Program) -> None:
    program.stop()
    program.stop()
    first = program.image.read(program.image.base + LIBRARY_BYTES, _STUB_BYTES)
    distances = [LIBRARY_BYTES, LIBRARY_BYTES + 64, LIBRARY_BYTES + 4096, LIBRARY_BYTES + 64]
    for paths in distances:
        program.load(paths=paths)
        program.stop()
        image = program.image
        assert image.memory[AT : AT + 5] == jump(AT, paths)
        assert image.memory[AT + 5 : AT + 7] == SYSCALL
        assert (image.read(image.base + paths, _STUB_BYTES) == first) == (paths == LIBRARY_BYTES)
        assert image.path_stubs.sites == {image.base + AT + 5}


def test_a_library_whose_code_differs_elsewhere_keeps_that(program: Program) -> None:
    program.stop()
    program.stop()
    program.load()
    program.image.memory[AT - 1] = 0xCC  # a breakpoint of a debugger in the program
    program.stop()
    assert program.has_jump
    assert program.image.memory[AT - 1] == 0xCC


def test_as_many_prepared_libraries_are_kept(program: Program) -> None:
    program.stop()
    program.stop()
    for number in range(3 * _MOST_PREPARED):
        program.load(paths=LIBRARY_BYTES + number)
        program.stop()
        assert program.has_jump
        assert 1 <= len(program.calls._prepared) <= _MOST_PREPARED


@pytest.mark.parametrize("forked", [False, True])
def test_a_call_that_its_stub_lets_stop_is_not_looked_at_again(
    program: Program, forked: bool
) -> None:
    program.stop()
    program.stop()
    program.load()
    program.stop()
    asked = len(program.asked)
    assert program.has_jump and asked == 2
    if forked:
        program.image.path_stubs = program.image.path_stubs.copy()
    for _ in range(3):
        program.stop()
    assert len(program.asked) == asked
