"""Code that makes a system call with a path, with a stop only if the path may concern SGX.

The call has its number and its arguments in the registers.  The kernel changes RAX, RCX and R11, so
these are free.  The code keeps the flags, as the kernel does.  It stores a mark in R9, which no
such call uses: the seccomp filter lets a call with the mark pass.  The value of R9 is meanwhile on
the stack, below the bytes that functions may use without moving RSP.

A path passes if it does not start as a node does.  A call without a path, which concerns a
descriptor, passes while the process has no device.  The code reads the path first: if the program
cannot, the call stops, and the kernel says what is wrong.

Source:
    syscall(2); System V ABI, AMD64 supplement, "The Stack Frame"; SDM vol. 2, PEXT, Jcc (JRCXZ).
"""

from __future__ import annotations

import struct

from softsgx.engines.native import abi
from softsgx.engines.native.x86.asm import Assembler
from softsgx.ondemand import dataclass

__all__ = ["BY_RDI", "BY_RSI", "KEPT_BYTES", "PathCode"]

KEPT_BYTES = 136
"""How far the code moves RSP: 128 bytes belong to the function, and R9 is below them."""

_PAGE_TAIL = abi.PAGE - 8
#: First four bytes of paths; those that start with the first need a look at four more.
_DEVICES, _REST_OF_DEVICE = b"/dev", b"/sgx"
_OTHERS = (b"/pro", b"/sys")


@dataclass(frozen=True, slots=True)
class PathCode:
    """The code for one register that has the path, and places in it.

    Attributes:
        code: its bytes; four of them at each of ``watched``, ``then`` and ``site`` are missing: the
            distances to the word that says whether the process has a device, to the instruction
            after the call, and to the call in the program's code.
        labels: ``make``: here it begins to prepare the call.  ``moved``, ``kept``, ``marked``: it
            has moved RSP, stored R9, and set R9 to the mark.  ``made``: the call has been made.
            ``restored``, ``left``: R9 and RSP are the program's again.  ``refuse``: it goes to the
            program's own call.
    """

    code: bytes
    labels: dict[str, int]


def _word(text: bytes) -> int:
    return int(struct.unpack("<I", text)[0])


def _assembled(to_rcx: str, byte: str, word: str, next_word: str) -> PathCode:
    """Assemble it; arguments are instructions that load RCX from the path and its register."""
    asm = Assembler()
    asm.emit(to_rcx)
    asm.short("e3", "refuse")  # jrcxz: no path
    asm.word("41 bb", _PAGE_TAIL)  # mov r11d, 0xff8
    asm.emit("c4 c2 f2 f5 cb")  # pext rcx, rcx, r11
    asm.word("8d 89", -(_PAGE_TAIL >> 3))  # lea ecx, [rcx-0x1ff]
    asm.short("e3", "refuse")  # jrcxz: eight bytes of it may be in two pages
    asm.emit(byte)  # movzx ecx, byte [path]
    asm.short("e3", "empty")  # jrcxz
    asm.emit(word)  # mov ecx, [path]
    asm.word("8d 89", -_word(_DEVICES))  # lea ecx, [rcx-"/dev"]
    asm.short("e3", "device")  # jrcxz
    before = _word(_DEVICES)
    for start in _OTHERS:
        asm.word("8d 89", before - _word(start))  # lea ecx, [rcx+before-start]
        asm.short("e3", "refuse")  # jrcxz
        before = _word(start)
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
    asm.emit(next_word)  # mov ecx, [path+4]
    asm.word("8d 89", -_word(_REST_OF_DEVICE))  # lea ecx, [rcx-"/sgx"]
    asm.short("e3", "refuse")  # jrcxz
    asm.label("make")
    asm.word("48 8d a4 24", -KEPT_BYTES)  # lea rsp, [rsp-136]
    asm.label("moved")
    asm.emit("4c 89 0c 24")  # mov [rsp], r9
    asm.label("kept")
    asm.emit("49 b9")  # mov r9, mark
    asm.quad(abi.OUR_CALL)
    asm.label("marked")
    asm.emit("0f 05")  # syscall
    asm.label("made")
    asm.emit("4c 8b 0c 24")  # mov r9, [rsp]
    asm.label("restored")
    asm.word("48 8d a4 24", KEPT_BYTES)  # lea rsp, [rsp+136]
    asm.label("left")
    asm.emit("e9")  # jmp then
    asm.label("then")
    asm.emit("00 00 00 00")
    return PathCode(asm.finish(), asm.labels)


BY_RDI = _assembled("48 89 f9", "0f b6 0f", "8b 0f", "8b 4f 04")
BY_RSI = _assembled("48 89 f1", "0f b6 0e", "8b 0e", "8b 4e 04")
