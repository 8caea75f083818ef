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
from types import SimpleNamespace
from typing import Any

import pytest

from softsgx.engines.native import abi
from softsgx.engines.native.doctor import can_answer_cpuid
from softsgx.engines.native.syscalls import nodes
from softsgx.engines.native.vdso.path_calls import (
    _STUB_BYTES,
    PATH_BYTES,
    PathStubs,
    PathWindow,
    window_of_call,
)
from softsgx.engines.native.x86.insn import decode

LIBRARY_BYTES = 0x1000
SYSCALL = b"\x0f\x05"
AT = 0x200
CALLS = {abi.SYS_ACCESS: "rdi", abi.SYS_FACCESSAT: "rsi"}
ACCESS = bytes.fromhex("b8 15 00 00 00")
FACCESSAT = bytes.fromhex("b8 0d 01 00 00 89 ff")  # mov edi, edi between


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
        self.stubs.store(self, self.base, [self.window])  # type: ignore[arg-type]

    def read(self, address: int, size: int) -> bytes:
        return os.pread(self.memory_fd, size, address)

    @property
    def site(self) -> int:
        return self.base + self.window.site

    def close(self) -> None:
        os.close(self.memory_fd)
        del self.anchor
        self.memory.close()


@pytest.fixture(params=[ACCESS, FACCESSAT], ids=["rdi", "rsi"])
def image(request: pytest.FixtureRequest) -> Any:
    made = Image(request.param)
    yield made
    made.close()


#: void call(uint64_t in[5], out[5], code): RDI, RSI, RDX, R9, flags; RAX, R9, flags, RSP - RSP
#: before, and 1 where it came back behind the call, 2 where at the call.
_CALL = bytes.fromhex(
    "53 4154 4155"  # push rbx, r12, r13
    "4989f4 4989d5 4889fb"  # mov r12, rsi; mov r13, rdx; mov rbx, rdi
    "488b3b 488b7308 488b5310 4c8b4b18"  # mov rdi, rsi, rdx, r9
    "49896424 18"  # mov [r12+24], rsp
    "ff7320 9d"  # push [rbx+32]; popfq
    "41ffe5"  # jmp r13
)
_RETURN = bytes.fromhex(
    "9c 418f442410"  # pushfq; pop [r12+16]
    "49890424 4d894c2408"  # mov [r12], rax; mov [r12+8], r9
    "49296424 18"  # sub [r12+24], rsp
    "49895c2420"  # mov [r12+32], rbx
    "415d 415c 5b c3"  # pop r13, r12, rbx; ret
)


def executed(image: Image, path: int, flags: int) -> list[int]:
    """Execute the code with a path; return what ``_CALL`` tells."""
    for place, number in ((0x400, 1), (0x500, 2)):
        code = b"\xbb" + struct.pack("<I", number) + _RETURN  # mov ebx, number
        image.memory[place : place + len(code)] = code
    image.memory[0x600 : 0x600 + len(_CALL)] = _CALL
    site = image.window.site
    image.memory[site : site + 2] = b"\xeb\x20"
    image.memory[site + 2 : site + 7] = b"\xe9" + struct.pack("<i", 0x400 - (site + 7))
    image.memory[site + 0x22 : site + 0x27] = b"\xe9" + struct.pack("<i", 0x500 - (site + 0x27))
    first, second = (path, os.R_OK) if image.window.code == ACCESS else (0xFFFFFF9C, path)
    given = (ctypes.c_uint64 * 5)(first, second, os.R_OK, 0x1122_3344_5566_7788, flags)
    out = (ctypes.c_uint64 * 5)()
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    call(image.base + 0x600)(
        ctypes.addressof(given), ctypes.addressof(out), image.base + image.window.start
    )
    return list(out)


@pytest.fixture
def pages() -> Any:
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    yield memory
    memory.close()


NEVER = ["/dev/sgx", "/dev/sgx_enclave", "/proc/self/maps", "/proc", "/sys/fs/cgroup", "/system"]
ALWAYS = ["/", "/dev", "/dev/null", "/dev/sg0", "/etc/passwd", "dev/sgx", "/device/sgx", "x", "/de"]


@pytest.mark.skipif(not can_answer_cpuid(), reason="needs BMI2")
@pytest.mark.parametrize("flags", [0x246, 0x2 | 0x8D5])
@pytest.mark.parametrize("path", NEVER + ALWAYS)
def test_only_paths_that_are_no_nodes_pass_and_registers_are_kept(
    image: Image, path: str, flags: int, pages: Any
) -> None:
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for at in (0, 100, mmap.PAGESIZE - 8, mmap.PAGESIZE - 9, mmap.PAGESIZE - 1):
        pages[at : at + len(path) + 1] = path.encode() + b"\0"
        rax, r9, then, moved, how = executed(image, start + at, flags)
        passes = path in ALWAYS and (start + at) % mmap.PAGESIZE < mmap.PAGESIZE - 8
        assert how == (1 if passes else 2), at
        assert (r9, moved) == (0x1122_3344_5566_7788, 0)
        assert then & 0x8D5 == flags & 0x8D5
        if passes:
            assert (rax == 0) == os.access(path, os.R_OK)
        else:
            assert rax == int.from_bytes(image.window.code[1:5], "little")


@pytest.mark.skipif(not can_answer_cpuid(), reason="needs BMI2")
def test_a_call_without_a_path_passes_until_there_is_a_device(image: Image, pages: Any) -> None:
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert executed(image, start, 0x246)[4] == 1
    assert executed(image, 0, 0x246)[4] == 2
    image.memory[image.vdso.watched] = 1
    assert executed(image, start, 0x246)[4] == 2


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


def states(image: Image) -> list[tuple[int, int, bool, bool]]:
    """Return (offset, how far RSP is moved, whether R9 has the mark, whether the call was made)."""
    start = LIBRARY_BYTES
    code = bytes(image.memory[start : start + _STUB_BYTES]).rstrip(b"\xcc")
    found, at, moved, marked, made = [], 0, 0, False, False
    while at < len(code):
        found.append((at, moved, marked, made))
        insn = decode(code[at:])
        assert insn is not None
        text = code[at : at + insn.length]
        if text.startswith(b"\x48\x8d\xa4\x24"):
            moved += struct.unpack_from("<i", text, 4)[0]
        marked = (marked or text.startswith(b"\x49\xb9")) and text != b"\x4c\x8b\x0c\x24"
        made |= text == SYSCALL
        at += insn.length
    assert (moved, marked, made) == (0, False, True)
    return found


def test_a_stopped_thread_is_at_the_call_or_behind_it(image: Image) -> None:
    copied = len(image.window.code)
    stack = ctypes.create_string_buffer(4096)
    rsp = ctypes.addressof(stack) + 2048
    for at, moved, marked, made in states(image):
        struct.pack_into("<Q", stack, 2048 - 136, 77)
        r9 = abi.OUR_CALL if marked else 77
        if not (marked or moved):
            struct.pack_into("<Q", stack, 2048 - 136, 88)  # nothing is there yet, or any more
        thread: Any = Stopped(image, rip=image.base + LIBRARY_BYTES + at, rsp=rsp + moved, r9=r9)
        assert not image.stubs.straighten(thread)
        then = image.base + AT + at if at < copied else image.site + 2 * made
        assert vars(thread.regs) == {"rip": then, "rsp": rsp, "r9": 77}, at
        assert thread.stored == 1


def test_only_a_fault_of_the_stub_is_not_the_programs(image: Image) -> None:
    copied = len(image.window.code)
    stack = ctypes.create_string_buffer(512)

    def is_ours(fault: int, rip: int) -> bool:
        rsp = ctypes.addressof(stack)
        thread: Any = Stopped(image, fault=fault, rip=rip, rsp=rsp, r9=0)
        return image.stubs.straighten(thread)

    stores = copied + image.window.path_code.labels["moved"]
    for at, moved, _marked, made in states(image):
        reads = at > copied and not moved and not made
        rip = image.base + LIBRARY_BYTES + at
        if at <= stores:
            assert is_ours(abi.SIGSEGV, rip) == (reads or at == stores)
            assert is_ours(abi.SIGBUS, rip) == (reads or at == stores)
        assert not is_ours(signal.SIGUSR1, rip)
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
    window = image.window
    image.stubs.store(image, image.base, [window] * 200)  # type: ignore[arg-type]
    assert len(image.stubs._stubs) == PATH_BYTES // _STUB_BYTES
    copy = image.stubs.copy()
    assert copy._stubs == image.stubs._stubs
    assert copy._stubs is not image.stubs._stubs
