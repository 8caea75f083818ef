"""Replaces CPUID in loaded code by a trap, for machines that cannot make it fault.

Each CPUID of a new executable mapping becomes ``int3; nop`` of the same length.  Which of the byte
pairs 0F A2 are instructions is found by decoding towards them from many earlier starts: x86 code
falls into step within a few instructions, data does not, and a real CPUID has its leaf loaded into
EAX just before.

Deviation: code that is made at run time, or in writable pages, is not rewritten: it sees this
machine's own CPUID.
"""

from __future__ import annotations

import hashlib

from softsgx.engines.native.x86.insn import decode

__all__ = ["CPUID", "TRAP", "cpuid_sites", "in_step"]

CPUID = b"\x0f\xa2"
TRAP = b"\xcc\x90"

_known: dict[bytes, list[int]] = {}

_BACK = 96
_AHEAD = 6
_IN_STEP = 0.7
_RECENT = 16
_TOO_FEW = 12


def cpuid_sites(code: bytes) -> list[int]:
    """Return the offsets of the CPUID instructions in ``code``.

    The same libraries are loaded again and again: what was found in them is remembered.
    """
    if code.find(CPUID) < 0:
        return []
    key = hashlib.blake2b(code, digest_size=16).digest()
    known = _known.get(key)
    if known is None:
        known = _known[key] = _find_sites(code)
    return known


def _find_sites(code: bytes) -> list[int]:
    sites = []
    at = code.find(CPUID)
    while at >= 0:
        if _is_instruction(code, at):
            sites.append(at)
        at = code.find(CPUID, at + 1)
    return sites


def _is_instruction(code: bytes, at: int) -> bool:
    """Return whether decoding from most places before ``at`` arrives there, with EAX loaded."""
    arrived, loaded_ones, starts = _arrivals(code, at)
    if starts and arrived < _IN_STEP * starts:
        return False
    return loaded_ones * 2 > arrived and _goes_on(code, at + 2)


def in_step(code: bytes, at: int) -> bool:
    """Return whether an instruction starts at ``at``: decoding from most places before arrives.

    Close to the start of ``code`` there are too few of them; there the bytes after ``at`` decide.
    """
    arrived, _loaded, starts = _arrivals(code, at)
    return (starts < _TOO_FEW or arrived >= _IN_STEP * starts) and _goes_on(code, at)


def _arrivals(code: bytes, at: int) -> tuple[int, int, int]:
    """Return from how many places before ``at`` decoding arrives, with EAX loaded, of how many."""
    first = max(0, at - _BACK)
    # For each start that arrives: instructions on the way, and whether a late one loads EAX.
    ways: dict[int, tuple[int, bool]] = {at: (0, False)}
    for start in range(at - 1, first - 1, -1):
        piece = code[start : min(start + 15, at)]
        insn = decode(piece)
        way = None if insn is None else ways.get(start + insn.length)
        if way is not None:
            steps, loaded = way
            ways[start] = steps + 1, loaded or (steps < _RECENT and _loads_eax(piece))
    return len(ways) - 1, sum(loaded for _steps, loaded in ways.values()), at - first


def _goes_on(code: bytes, at: int) -> bool:
    for _step in range(_AHEAD):
        if at >= len(code):
            return True
        insn = decode(code[at : at + 15])
        if insn is None:
            return False
        at += insn.length
    return True


def _loads_eax(code: bytes) -> bool:
    """Return whether the instruction at the start of ``code`` writes EAX, as loads of a leaf do."""
    at = 1 if code[0] & 0xF0 == 0x40 else 0
    if at >= len(code):
        return False
    opcode = code[at]
    if opcode == 0xB8 or opcode == 0x58:  # mov eax, imm; pop rax
        return True
    if len(code) < at + 2:
        return False
    modrm = code[at + 1]
    if opcode in (0x89, 0x31, 0x29, 0x09, 0x01):  # op r/m, reg
        return modrm >> 6 == 3 and modrm & 7 == 0
    if opcode in (0x8B, 0x33, 0x2B, 0x8D, 0x03):  # op reg, r/m
        return modrm >> 3 & 7 == 0
    return opcode in (0x81, 0x83, 0xFF) and modrm >> 6 == 3 and modrm & 7 == 0
