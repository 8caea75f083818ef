"""CPUID is found where it is an instruction, and nowhere else."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from softsgx.engines.native.x86 import rewrite
from softsgx.engines.native.x86.insn import decode
from softsgx.engines.native.x86.rewrite import CPUID, TRAP, Places, cpuid_sites, find_cpuid

PROLOGUE = bytes.fromhex("55 4889e5 53 4883ec18 897dec 8975e8")
BEFORE = bytes.fromhex("488b45f0 4885c0 7408 4889c7")
AFTER = bytes.fromhex("8945f4 895df0 894dec 8955e8 5b 5d c3")
LOADS = {"imm": "b807000000", "zero": "31c0", "from edi": "89f8", "from memory": "8b45ec"}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_an_instruction_is_found(load: str) -> None:
    before = PROLOGUE + BEFORE * 8 + bytes.fromhex(load) + b"\x31\xc9"
    assert cpuid_sites(before + CPUID + AFTER) == [len(before)]


def test_the_bytes_inside_another_instruction_are_not() -> None:
    code = PROLOGUE + BEFORE * 8 + b"\xb8" + CPUID + b"\0\0" + AFTER  # mov eax, 0xa20f
    assert cpuid_sites(code) == []


def test_data_is_not_code() -> None:
    source = random.Random(3)
    found = 0
    for _ in range(300):
        table = source.randbytes(120) + CPUID + source.randbytes(60)
        found += bool(cpuid_sites(table))
    # Random bytes can spell out "load EAX, CPUID" too, but hardly ever do.
    assert found <= 15


def test_a_replacement_is_as_long_as_what_it_replaces() -> None:
    assert len(TRAP) == len(CPUID)


def plainly(code: bytes) -> list[int]:
    """Search as the module says, at each place for itself."""
    return [
        at
        for at in range(len(code) - 1)
        if code[at : at + 2] == CPUID and decoding_arrives(code, at)
    ]


def decoding_arrives(code: bytes, at: int) -> bool:
    first = max(0, at - 96)
    ways = {at: (0, False)}
    for start in range(at - 1, first - 1, -1):
        piece = code[start : min(start + 15, at)]
        insn = decode(piece)
        way = None if insn is None else ways.get(start + insn.length)
        if way is not None:
            steps, loaded = way
            ways[start] = steps + 1, loaded or (steps < 16 and rewrite._loads_eax(piece))
    arrived, starts = len(ways) - 1, at - first
    if starts and arrived < 0.7 * starts:
        return False
    loading = sum(loaded for _steps, loaded in ways.values())
    return loading * 2 > arrived and rewrite._goes_on(code, at + 2)


def code_of_all_kinds(source: random.Random) -> bytes:
    parts = [CPUID, b"\xb8\1\0\0\0", b"\x31\xc0", b"\x89\xc8", b"\x0f", b"\xa2"]
    choices = [*parts, b"\x90" * source.randrange(9), source.randbytes(source.randrange(5))]
    return b"".join(source.choice(choices) for _ in range(source.randrange(70)))


@pytest.mark.parametrize("part", [2, 3, 17, 1 << 17])
def test_parts_of_code_give_what_the_whole_gives(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrite, "_PART_BYTES", part)
    source, found = random.Random(part), 0
    for _ in range(300):
        code = code_of_all_kinds(source)
        expected = plainly(code)
        for _again in range(2):  # the second time it is remembered
            assert cpuid_sites(code) == expected
        found += len(expected)
    assert found > 100


def test_code_that_ends_early_is_searched_up_to_there() -> None:
    code = PROLOGUE + BEFORE * 8 + b"\x31\xc0" + CPUID + AFTER
    expected = plainly(code)
    assert len(expected) == 1
    for length in (len(code), len(code) + 1, 1 << 20):
        assert find_cpuid(lambda offset, size: code[offset : offset + size], length) == expected
    assert find_cpuid(lambda _offset, _size: b"", 1 << 20) == []


def test_this_interpreter_has_the_same_as_searched_plainly() -> None:
    code = Path(sys.executable).resolve().read_bytes()[: 1 << 18]
    libraries = [Path("/lib64/ld-linux-x86-64.so.2"), Path("/usr/bin/gcc")]
    for each in [code, *(path.read_bytes() for path in libraries if path.exists())]:
        assert cpuid_sites(each) == plainly(each)


def test_places_are_those_of_each_file_where_it_is_mapped() -> None:
    source = random.Random(7)
    for _ in range(50):
        places, expected = Places(), set()
        for _part in range(source.randrange(5)):
            base, distances = source.randrange(1 << 20), {source.randrange(64) for _ in range(5)}
            places.add(base, frozenset(distances))
            expected |= {base + each for each in distances}
        places.add(5, frozenset())
        copy = places.copy()
        copy.add(1 << 30, {1, 2})
        assert set(places) == expected
        assert sorted(places) == sorted(expected)
        assert all(place in places for place in expected)
        assert not any(place in places for place in range(2000) if place not in expected)
        assert set(copy) == expected | {(1 << 30) + 1, (1 << 30) + 2}
        assert (1 << 30) + 1 in copy and (1 << 30) + 1 not in places
