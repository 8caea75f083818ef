"""Code that answers CPUID without a stop, and the table that it reads.

CPUID changes EAX, EBX, ECX and EDX, whole registers, and no flag.  So the code has four registers,
two of them with the leaf and the sub-leaf, and uses no instruction that changes flags: it looks the
leaf up in a table of 256 entries, and the sub-leaf in the answers of the leaf.  What has no place
there is left to the instruction itself.

====== ========== ==========================================================================
offset entry      what
====== ========== ==========================================================================
0      KEY        minus the leaf
8      ANSWERS    distance from the entry to the leaf's answers, 16 bytes each
16     INDEX      mask of the bits of the sub-leaf that count the answers
24     REST       mask of those that must be zero
====== ========== ==========================================================================

Source:
    SDM vol. 2, CPUID, PEXT, RORX, Jcc (JRCXZ).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from softsgx.engines.native.x86.asm import Assembler

if TYPE_CHECKING:
    from softsgx.engines.native.x86.cpuid import CpuidLeaf

__all__ = ["ANSWER_CODE", "LABELS", "SITE_AT", "TABLE_AT", "THEN_AT", "answer_table"]

_ENTRY = struct.Struct("<qqQQ")
_ANSWER = struct.Struct("<4I")
_PLACES = 256
#: No entry: no leaf and no sum of one and this is zero.
_NO_KEY = 1
_FIRST_OF_RANGES = (0, 0x8000_0000)
_MOST_LEAVES = 128
_SUBLEAVES = {0xD: 64}
_USUAL_SUBLEAVES = 16
#: Sub-leaves that leaves without any are asked for.
_ANY = (1, 2, 3, 5, 11, 63, 64, 0x1234, 0xFFFF_FFFF)
_BITS_32 = 0xFFFF_FFFF


def _assembled() -> tuple[bytes, dict[str, int]]:
    asm = Assembler()
    asm.emit("89 cb")  # mov ebx, ecx: the sub-leaf
    asm.emit("c4 e3 7b f0 d0 1f")  # rorx edx, eax, 31: 2 n, and 2 n + 1 for 80000000H + n
    asm.emit("0f b6 d2")  # movzx edx, dl
    asm.emit("8d 14 d5 00 00 00 00")  # lea edx, [8*rdx]
    asm.emit("48 8d 0d")  # lea rcx, [rip+table]
    asm.label("table")
    asm.emit("00 00 00 00")
    asm.emit("48 8d 14 91")  # lea rdx, [rcx+4*rdx]: the entry
    asm.emit("89 c0")  # mov eax, eax
    asm.emit("48 8b 0a")  # mov rcx, [rdx+KEY]
    asm.emit("48 8d 0c 01")  # lea rcx, [rcx+rax]
    asm.short("e3", "known")  # jrcxz
    asm.label("refuse")
    asm.emit("89 d9")  # mov ecx, ebx
    asm.emit("e9")  # jmp site
    asm.label("site")
    asm.emit("00 00 00 00")
    asm.label("known")
    asm.emit("c4 e2 e2 f5 4a 18")  # pext rcx, rbx, [rdx+REST]
    asm.short("e3", "answered")  # jrcxz
    asm.short("eb", "refuse")
    asm.label("answered")
    asm.emit("c4 e2 e2 f5 4a 10")  # pext rcx, rbx, [rdx+INDEX]
    asm.emit("48 8b 5a 08")  # mov rbx, [rdx+ANSWERS]
    asm.label("found")
    asm.emit("48 8d 14 1a")  # lea rdx, [rdx+rbx]
    asm.label("based")
    asm.emit("48 8d 0c 09")  # lea rcx, [rcx+rcx]
    asm.label("doubled")
    asm.emit("48 8d 14 ca")  # lea rdx, [rdx+8*rcx]: the answer
    asm.label("pointed")
    asm.emit("8b 02")  # mov eax, [rdx]
    asm.emit("8b 5a 04")  # mov ebx, [rdx+4]
    asm.emit("8b 4a 08")  # mov ecx, [rdx+8]
    asm.emit("8b 52 0c")  # mov edx, [rdx+12]
    asm.label("loaded")
    asm.emit("e9")  # jmp then
    asm.label("then")
    asm.emit("00 00 00 00")
    return asm.finish(), asm.labels


ANSWER_CODE, LABELS = _assembled()
"""The code, and where its labels are.

At ``TABLE_AT``, ``SITE_AT`` and ``THEN_AT`` the distances to the table, to the CPUID and to the
instruction behind it have to be stored, each from the end of its four bytes.
"""
TABLE_AT, SITE_AT, THEN_AT = LABELS["table"], LABELS["site"], LABELS["then"]


def answer_table(cpuid: Callable[[int, int], CpuidLeaf]) -> bytes:
    """Return the table for what CPUID (leaf, sub-leaf) gives."""
    entries = bytearray(_ENTRY.pack(_NO_KEY, 0, 0, 0) * _PLACES)
    answers = bytearray()
    for first in _FIRST_OF_RANGES:
        highest = cpuid(first, 0)[0]
        for leaf in range(first, min(highest, first + _MOST_LEAVES - 1) + 1):
            at = _ENTRY.size * (leaf << 1 & 0xFF | leaf >> 31)
            distance = len(entries) + len(answers) - at
            one = cpuid(leaf, 0)
            if all(cpuid(leaf, sub) == one for sub in _ANY):
                found, index, rest = [one], 0, 0
            else:
                count = _SUBLEAVES.get(leaf, _USUAL_SUBLEAVES)
                found = [cpuid(leaf, sub) for sub in range(count)]
                index, rest = count - 1, _BITS_32 & -count
            _ENTRY.pack_into(entries, at, -leaf, distance, index, rest)
            answers += b"".join(_ANSWER.pack(*each) for each in found)
    return bytes(entries + answers)
