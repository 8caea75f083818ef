"""Replaces CPUID in loaded code by a trap, for machines that cannot make it fault.

Each CPUID of a new executable mapping becomes ``int3; nop`` of the same length.  Which of the byte
pairs 0F A2 are instructions is found by decoding towards them from many earlier starts: x86 code
falls into step within a few instructions, data does not, and a real CPUID has its leaf loaded into
EAX just before.

The compiled core has the same in ``src/speedups/instructions.c``.

Deviation: code that is made at run time, or in writable pages, is not rewritten: it sees this
machine's own CPUID.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set

from softsgx import compiled
from softsgx.engines.native.x86.insn import Insn, decode

__all__ = ["CPUID", "TRAP", "Places", "cpuid_sites", "find_cpuid", "in_step"]

CPUID = b"\x0f\xa2"
TRAP = b"\xcc\x90"

#: What was found, by size, places of the byte pair, and the code around each.
_known: dict[tuple[int, tuple[int, ...], bytes], list[int]] = {}

_BACK = 96
_AHEAD = 6
_LONGEST = 15
_BEHIND = len(CPUID) + _AHEAD * _LONGEST
_IN_STEP = 0.7
_RECENT = 16
_TOO_FEW = 12
#: Of code that is read at once: it stays in the processor's cache.
_PART_BYTES = 1 << 17


class Places:
    """Places in an address space: those in files are distances from where these are mapped.

    The same file has the same places in each address space, so they are there once.
    """

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        self._parts: list[tuple[int, Set[int]]] = []

    def add(self, base: int, distances: Set[int]) -> None:
        """Add places at distances from an address; the set must stay as it is."""
        if distances:
            self._parts.append((base, distances))

    def __contains__(self, place: int) -> bool:
        """Return whether an address is one of them."""
        for base, distances in self._parts:  # noqa: SIM110 - it is asked at each trap
            if place - base in distances:
                return True
        return False

    def __iter__(self) -> Iterator[int]:
        """Return each of them once, in no order."""
        return iter({base + each for base, distances in self._parts for each in distances})

    def copy(self) -> Places:
        """Return the same places; what is added to the copy is not in this."""
        other = Places()
        other._parts = list(self._parts)
        return other


def cpuid_sites(code: bytes) -> list[int]:
    """Return the offsets of the CPUID instructions in ``code``."""
    return find_cpuid(lambda offset, size: code[offset : offset + size], len(code))


def find_cpuid(read: Callable[[int, int], bytes], length: int) -> list[int]:
    """Return the offsets of the CPUID instructions in code that is read in parts.

    The same libraries are loaded again and again: what was found in them is remembered.

    Args:
        read: returns the bytes at an offset, up to a number of bytes; fewer or none: the code ends.
        length: bytes of code, at most.
    """
    places, offset = [], 0
    while offset < length:
        size = min(_PART_BYTES, length - offset)
        part = read(offset, size)
        places += [offset + at for at in cpuid_pairs(part)]
        if len(part) < size or offset + size == length:
            length = offset + len(part)
            break
        offset += size - 1  # a pair may begin with the last byte
    if not places:
        return []
    starts = [max(0, at - _BACK) for at in places]
    around = [
        read(start, min(at + _BEHIND, length) - start)
        for start, at in zip(starts, places, strict=True)
    ]
    key = length, tuple(places), b"".join(around)
    known = _known.get(key)
    if known is None:
        known = _known[key] = _instructions(places, starts, around)
    return known


def _instructions(places: list[int], starts: list[int], around: list[bytes]) -> list[int]:
    """Return those of ``places`` where the bytes of CPUID are one.

    Args:
        places: offsets, in order.
        starts: for each, the offset of the code around it.
        around: that code.
    """
    sites = zip(places, starts, around, strict=True)
    if compiled.speedups is not None:
        executes = compiled.speedups.executes_cpuid
        return [at for at, start, code in sites if executes(code, at - start)]
    decoded: dict[int, Insn | None] = {}
    return [at for at, start, code in sites if _is_instruction(code, at - start, start, decoded)]


def _cpuid_pairs(code: bytes) -> list[int]:
    """Return where the bytes of CPUID are; its second one is the rarer."""
    first, second = CPUID
    places, at = [], code.find(second, 1)
    while at >= 0:
        if code[at - 1] == first:
            places.append(at - 1)
        at = code.find(second, at + 1)
    return places


def _is_instruction(code: bytes, at: int, start: int, decoded: dict[int, Insn | None]) -> bool:
    """Return whether decoding from most places before ``at`` arrives there, with EAX loaded.

    Args:
        code: the code around the place.
        at: the place in ``code``.
        start: where ``code`` is in all the code.
        decoded: instructions by their places in all the code, which this adds to.
    """
    arrived, loaded_ones, starts = _arrivals(code, at, start, decoded)
    if starts and arrived < _IN_STEP * starts:
        return False
    return loaded_ones * 2 > arrived and _goes_on(code, at + 2)


def _in_step(code: bytes, at: int) -> bool:
    """Return whether an instruction starts at ``at``: decoding from most places before arrives.

    Close to the start of ``code`` there are too few of them; there the bytes after ``at`` decide.
    """
    arrived, _loaded, starts = _arrivals(code, at, 0, {})
    return (starts < _TOO_FEW or arrived >= _IN_STEP * starts) and _goes_on(code, at)


def _arrivals(
    code: bytes, at: int, begin: int, decoded: dict[int, Insn | None]
) -> tuple[int, int, int]:
    """Return from how many places before ``at`` decoding arrives, with EAX loaded, of how many.

    ``decoded`` is as in :func:`_is_instruction`, and ``begin`` where ``code`` is.
    """
    first = max(0, at - _BACK)
    # For each start that arrives: instructions on the way, and whether a late one loads EAX.
    ways: dict[int, tuple[int, bool]] = {at: (0, False)}
    for start in range(at - 1, first - 1, -1):
        place = begin + start
        if place in decoded:
            insn = decoded[place]
        else:
            insn = decoded[place] = decode(code[start : start + _LONGEST])
        way = None if insn is None else ways.get(start + insn.length)
        if way is not None:
            steps, loaded = way
            loaded = loaded or (steps < _RECENT and _loads_eax(code[start : start + _LONGEST]))
            ways[start] = steps + 1, loaded
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


if compiled.speedups is None:
    in_step, cpuid_pairs = _in_step, _cpuid_pairs
else:
    in_step, cpuid_pairs = compiled.speedups.in_step, compiled.speedups.cpuid_pairs
