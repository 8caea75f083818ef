"""Code that makes a system call with a path, with a stop only if the path may concern SGX.

The call has its number and its arguments in the registers.  The kernel changes RAX, RCX and R11, so
these are free.  The code keeps the flags, as the kernel does.  It stores a mark in R9, which no
such call uses: the seccomp filter lets a call with the mark pass.  The value of R9 is meanwhile on
the stack, below the bytes that functions may use without moving RSP.

A path stops if it starts as the name of a node does, and so does a call that may create a file:
it could create one where a node is.  A call without a path, which concerns a descriptor, passes
while the process has no device.  The code reads the path first: if the program cannot, the call
stops, and the kernel says what is wrong.

Other paths may lead to a node from a directory or through links.  As no file has a node's name, the
kernel answers ENOENT.  Then the code makes the call again, so that it stops, if the path ends as a
name of a node does, or if it is a symbolic link.  To find that out it makes the call with the flag
that does not follow links, if the call has one.  It makes no other call: the program may have
forbidden that.

Deviation: stat, access and faccessat do not find a node through a symbolic link that is not called
as a node is.

Source:
    syscall(2), open(2), stat(2); System V ABI, AMD64 supplement, "The Stack Frame"; SDM vol. 2,
    PEXT, Jcc (JRCXZ).
"""

from __future__ import annotations

import struct
from errno import ENOENT
from functools import cache
from typing import NamedTuple

from softsgx.engines.native import abi
from softsgx.engines.native.x86.asm import Assembler
from softsgx.ondemand import dataclass

__all__ = ["KEPT_BYTES", "NUMBERS", "PathCode", "path_code"]

KEPT_BYTES = 152
"""How far the code moves RSP: 128 bytes belong to the function; R9 and two registers are below."""

_PAGE_TAIL = abi.PAGE - 8
#: First four bytes of paths; those that start with the first need a look at four more.
_DEVICES, _REST_OF_DEVICES = b"/dev", (b"/sgx", b"/fd/", b"/std")
_OTHERS = (b"/pro", b"/sys")
#: Last four bytes of a path to a node; and those with the zero behind it.
_ENDS, _END = (b"lave", b"sion", b"sgx/"), b"sgx\0"


class _Path(NamedTuple):
    """Instructions that load RCX from the path and its register, and R11 from the register."""

    to_rcx: str
    byte: str
    word: str
    next_word: str
    to_r11: str


class _Flags(NamedTuple):
    """Instructions on the register that has the flags of a call.

    Attributes:
        save, load: store it at RSP + 8, and load it from there.
        take: ECX becomes its bits that ECX selects.
        add: adds a 32-bit number that follows.
    """

    save: str
    load: str
    take: str
    add: str


class _Buffer(NamedTuple):
    """Instructions on the register that has the buffer of a call."""

    save: str
    load: str
    clear: str


_RDI = _Path("48 89 f9", "0f b6 0f", "8b 0f", "8b 4f 04", "49 89 fb")
_RSI = _Path("48 89 f1", "0f b6 0e", "8b 0e", "8b 4e 04", "49 89 f3")
_IN_RSI = _Flags("48 89 74 24 08", "48 8b 74 24 08", "c4 e2 4a f5 c9", "8d b6")
_IN_RDX = _Flags("48 89 54 24 08", "48 8b 54 24 08", "c4 e2 6a f5 c9", "8d 92")
_IN_R10 = _Flags("4c 89 54 24 08", "4c 8b 54 24 08", "c4 e2 2a f5 c9", "45 8d 92")
_TO_RDX = _Buffer("48 89 54 24 10", "48 8b 54 24 10", "ba 00 00 00 00")
_TO_R8 = _Buffer("4c 89 44 24 10", "4c 8b 44 24 10", "41 b8 00 00 00 00")

#: Where a call has its path, its flags and its buffer, by its number.
_CALLS: dict[int, tuple[_Path, _Flags | None, _Buffer | None]] = {
    abi.SYS_OPEN: (_RDI, _IN_RSI, None),
    abi.SYS_OPENAT: (_RSI, _IN_RDX, None),
    abi.SYS_STAT: (_RDI, None, None),
    abi.SYS_LSTAT: (_RDI, None, None),
    abi.SYS_NEWFSTATAT: (_RSI, _IN_R10, _TO_RDX),
    abi.SYS_STATX: (_RSI, _IN_RDX, _TO_R8),
    abi.SYS_ACCESS: (_RDI, None, None),
    abi.SYS_FACCESSAT: (_RSI, None, None),
    abi.SYS_FACCESSAT2: (_RSI, _IN_R10, None),
    abi.SYS_READLINK: (_RDI, None, None),
    abi.SYS_READLINKAT: (_RSI, None, None),
}
_OPENS = (abi.SYS_OPEN, abi.SYS_OPENAT)

NUMBERS = frozenset(_CALLS)
"""Of the calls that have such code."""


@dataclass(frozen=True, slots=True)
class PathCode:
    """The code for one call, and places in it.

    Attributes:
        code: its bytes; four of them at each of ``watched``, ``then`` and ``site`` are missing: the
            distances to the word that says whether the process has a device, to the instruction
            after the call, and to the call in the program's code.
        labels: ``make``: here it begins to prepare the call.  ``moved``, ``kept``, ``marked``: it
            has moved RSP, stored R9, and set R9 to the mark.  ``made``: the call has been made.
            ``back``: its result is the program's.  ``restored``, ``left``: R9 and RSP are the
            program's again.  ``missing``: the result is ENOENT.  ``changed``, ``unchanged``: it
            changes registers of the call, and has them back.  ``again``: the program's own call
            follows.  ``again_restored``, ``again_left``: R9 and RSP are the program's.
            ``refuse``: it goes to the program's own call.
        flags, buffer: registers that have other values from ``changed`` to ``unchanged``.
    """

    code: bytes
    labels: dict[str, int]
    flags: str
    buffer: str


_NAMES = {_IN_RSI: "rsi", _IN_RDX: "rdx", _IN_R10: "r10", _TO_RDX: "rdx", _TO_R8: "r8", None: ""}


def _word(text: bytes) -> int:
    return int(struct.unpack("<I", text)[0])


def _if_one_of(asm: Assembler, texts: tuple[bytes, ...], label: str) -> None:
    """Jump if ECX is one of these, which makes it 0; otherwise ECX is the last one less."""
    before = 0
    for text in texts:
        asm.word("8d 89", before - _word(text))  # lea ecx, [rcx+before-text]
        asm.short("e3", label)  # jrcxz
        before = _word(text)


def _examine(asm: Assembler, path: _Path) -> None:
    """Jump to ``make`` if the path may pass; otherwise to ``refuse``."""
    asm.emit(path.to_rcx)
    asm.short("e3", "refuse")  # jrcxz: no path
    asm.word("41 bb", _PAGE_TAIL)  # mov r11d, 0xff8
    asm.emit("c4 c2 f2 f5 cb")  # pext rcx, rcx, r11
    asm.word("8d 89", -(_PAGE_TAIL >> 3))  # lea ecx, [rcx-0x1ff]
    asm.short("e3", "refuse")  # jrcxz: eight bytes of it may be in two pages
    asm.emit(path.byte)  # movzx ecx, byte [path]
    asm.short("e3", "empty")  # jrcxz
    asm.emit(path.word)  # mov ecx, [path]
    asm.word("8d 89", -_word(_DEVICES))  # lea ecx, [rcx-"/dev"]
    asm.short("e3", "device")  # jrcxz
    asm.word("8d 89", _word(_DEVICES))  # lea ecx, [rcx+"/dev"]
    _if_one_of(asm, _OTHERS, "refuse")
    asm.short("eb", "make")  # jmp
    asm.label("refuse")
    asm.emit("e9")  # jmp site
    asm.label("site")
    asm.emit("00 00 00 00")
    asm.label("empty")
    asm.emit("8b 0d")  # mov ecx, [rip+watched]
    asm.label("watched")
    asm.emit("00 00 00 00")
    asm.short("e3", "make")  # jrcxz
    asm.short("eb", "refuse")  # jmp
    asm.label("device")
    asm.emit(path.next_word)  # mov ecx, [path+4]
    _if_one_of(asm, _REST_OF_DEVICES, "refuse")


@cache
def path_code(number: int) -> PathCode:
    """Return the code that makes the call of a number, one of :data:`NUMBERS`."""
    path, flags, buffer = _CALLS[number]
    asm = Assembler()
    if number in _OPENS and flags is not None:
        asm.word("b9", abi.O_CREAT)  # mov ecx, O_CREAT
        asm.emit(flags.take)  # pext ecx, flags, ecx
        asm.short("e3", "opens")  # jrcxz
        asm.short("eb", "refuse")
        asm.label("opens")
    _examine(asm, path)
    asm.label("make")
    asm.word("48 8d a4 24", -KEPT_BYTES)  # lea rsp, [rsp-152]
    asm.label("moved")
    asm.emit("4c 89 0c 24")  # mov [rsp], r9
    asm.label("kept")
    asm.emit("49 b9")  # mov r9, mark
    asm.quad(abi.OUR_CALL)
    asm.label("marked")
    asm.emit("0f 05")  # syscall
    asm.label("made")
    asm.emit("8d 48 02")  # lea ecx, [rax+2]
    asm.short("e3", "missing")  # jrcxz
    asm.label("back")
    asm.emit("4c 8b 0c 24")  # mov r9, [rsp]
    asm.label("restored")
    asm.word("48 8d a4 24", KEPT_BYTES)  # lea rsp, [rsp+152]
    asm.label("left")
    asm.emit("e9")  # jmp then
    asm.label("then")
    asm.emit("00 00 00 00")
    asm.label("missing")
    _look_for_link(asm, number, flags, buffer)
    _look_at_end(asm, path)
    asm.label("again")
    asm.emit("4c 8b 0c 24")  # mov r9, [rsp]
    asm.label("again_restored")
    asm.word("48 8d a4 24", KEPT_BYTES)  # lea rsp, [rsp+152]
    asm.label("again_left")
    asm.word("b8", number)  # mov eax, number
    asm.near("e9", "refuse")  # jmp
    return PathCode(asm.finish(), asm.labels, _NAMES[flags], _NAMES[buffer])


def _look_for_link(
    asm: Assembler, number: int, flags: _Flags | None, buffer: _Buffer | None
) -> None:
    """Jump to ``again`` if the path is a symbolic link, as far as the call can tell."""
    if flags is None:
        asm.label("changed")
        asm.label("unchanged")
        return
    no_follow = abi.O_NOFOLLOW if number in _OPENS else abi.AT_SYMLINK_NOFOLLOW
    asm.word("b9", no_follow)  # mov ecx, no_follow
    asm.emit(flags.take)  # pext ecx, flags, ecx
    asm.short("e3", "follows")  # jrcxz
    asm.short("eb", "look")  # jmp: links are not followed
    asm.label("follows")
    asm.emit(flags.save)
    if buffer is not None:
        asm.emit(buffer.save)
    asm.label("changed")
    asm.word(flags.add, no_follow)
    if buffer is not None:
        asm.emit(buffer.clear)  # a link, or a new file, is EFAULT
    asm.word("b8", number)  # mov eax, number
    asm.emit("0f 05")  # syscall
    asm.emit(flags.load)
    if buffer is not None:
        asm.emit(buffer.load)
    asm.label("unchanged")
    asm.emit("8d 48 02")  # lea ecx, [rax+2]
    asm.short("e3", "look")  # jrcxz: ENOENT
    if number not in _OPENS:
        asm.short("eb", "again")  # jmp
        return
    asm.emit("8d 49 26")  # lea ecx, [rcx+38]
    asm.short("e3", "again")  # jrcxz: ELOOP
    asm.near("e9", "back")  # jmp: another process has made the file meanwhile


def _look_at_end(asm: Assembler, path: _Path) -> None:
    """Continue if the path ends as a node's; otherwise jump to ``back`` with ENOENT."""
    asm.label("look")
    asm.emit(path.to_r11)
    asm.label("byte")
    asm.emit("41 0f b6 0b")  # movzx ecx, byte [r11]
    asm.short("e3", "end")  # jrcxz
    asm.emit("4d 8d 5b 01")  # lea r11, [r11+1]
    asm.short("eb", "byte")  # jmp
    asm.label("end")
    asm.emit("41 8b 4b fc")  # mov ecx, [r11-4]
    _if_one_of(asm, _ENDS, "again")
    asm.emit("41 8b 4b fd")  # mov ecx, [r11-3]
    _if_one_of(asm, (_END,), "again")
    asm.word("48 c7 c0", -ENOENT)  # mov rax, -ENOENT
    asm.near("e9", "back")  # jmp
