"""The compiled search for instructions finds what the readable one finds.

Of each opcode, code that is cut off behind each of its bytes shows where the instruction ends: it
can be decoded from there on.  Random code, and that of this machine's libraries, is searched.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from softsgx import compiled
from softsgx.engines.native.x86 import rewrite
from softsgx.engines.native.x86.insn import decode

CPUID = rewrite.CPUID
LONGEST = 15
#: Nothing; operand size; REX.W; both; REX.W that does not count; two; a prefix of the second map.
PREFIXES = ("", "66", "48", "6648", "4866", "f366", "f2", "4f")
MAPS = (
    "",
    "0f",
    "0f38",
    "0f3a",
    "c5f8",
    "c578",
    "c4e178",
    "c4e278",
    "c4e378",
    "62f17c48",
    "62f27d48",
)
MODRMS = (0x00, 0x04, 0x05, 0x08, 0x10, 0x38, 0x44, 0x45, 0x84, 0x85, 0xC0, 0xC8, 0xD0, 0xF8)
SIBS = (0x00, 0x05, 0x25)
ORDINARY = tuple(
    bytes.fromhex(each)
    for each in (
        *("90", "31c0", "b807000000", "4889c7", "488b45f0", "7408", "0f1f4000", "83c001", "04b8"),
        *("48b80102030405060708", "8d05b8b8b8b8", "58", "c5f877", "660f6fc1", "0404", "8b45b8"),
    )
)


@pytest.fixture(autouse=True)
def _needs_core() -> None:
    if compiled.speedups is None:
        pytest.skip(compiled.description)


def core_in_step(code: bytes, at: int) -> bool:
    assert compiled.speedups is not None
    found: bool = compiled.speedups.in_step(code, at)
    return found


def instructions(prefixes: Iterable[str], maps: Iterable[str]) -> Iterator[bytes]:
    for prefix in prefixes:
        for table in maps:
            for opcode in range(256):
                for modrm in MODRMS:
                    for sib in SIBS if modrm & 7 == 4 and modrm < 0xC0 else SIBS[:1]:
                        yield bytes.fromhex(prefix + table) + bytes((opcode, modrm, sib))


def test_each_instruction_is_as_long() -> None:
    every = list(instructions(PREFIXES, MAPS))
    samples = [*instructions([""], ["", "0f"]), *random.Random(1).sample(every, 8000)]
    for number, sample in enumerate(samples):
        code = sample + b"\x90" * (LONGEST + 2 - len(sample))
        insn = decode(code[:LONGEST])
        size = number % LONGEST if insn is None else insn.length
        for end in {max(size - 1, 1), max(size, 1), len(code)}:
            part = code[:end]
            assert core_in_step(part, 0) == rewrite._in_step(part, 0), part.hex()


@pytest.mark.parametrize("seed", range(6))
def test_random_code_is_searched_alike(seed: int) -> None:
    source = random.Random(seed)
    likely = b"\x0f\xa2\x31\xc0\x89\xd8\xb8\x90\x48\x8b\x44\x24\x08\x0f\x66\x74\x05\x58\x83\xff\x41"
    found = 0
    for _round in range(250):
        code = bytes(
            source.choice(likely) if source.random() < source.random() else source.randrange(256)
            for _byte in range(source.randrange(1, 260))
        )
        for at in {0, len(code), *(source.randrange(len(code)) for _place in range(4))}:
            assert core_in_step(code, at) == rewrite._in_step(code, at), (code.hex(), at)
        found += same_cpuids(code)
    assert found


@pytest.mark.parametrize("seed", range(3))
def test_ordinary_code_is_searched_alike(seed: int) -> None:
    source = random.Random(seed)
    for _round in range(200):
        before = b"".join(source.choices(ORDINARY, k=source.randrange(60)))
        code = before + CPUID + b"".join(source.choices(ORDINARY, k=8))
        same_cpuids(code)
        assert core_in_step(code, len(before)) == rewrite._in_step(code, len(before)), code.hex()


@pytest.mark.parametrize("prefixes", range(10, 18))
def test_long_instructions_are_searched_alike(prefixes: int) -> None:
    code = b"\x66" * prefixes + b"\x90" * 3
    assert core_in_step(code, 0) == rewrite._in_step(code, 0) == (prefixes < LONGEST)


@pytest.mark.parametrize("after", range(70))
def test_as_many_places_count(after: int) -> None:
    for prefixes in (10, 14, 18, 20, 21, 60):
        code = b"\x66" * prefixes + b"\x90" * (after + 12)
        at = prefixes + after
        assert core_in_step(code, at) == rewrite._in_step(code, at)


@pytest.mark.parametrize("since", range(30))
def test_a_leaf_is_loaded_shortly_before(since: int) -> None:
    code = b"\x90" * 40 + b"\xb8\7\0\0\0" + b"\x90" * since + CPUID + b"\x90" * 60
    assert same_cpuids(code) == 1


def same_cpuids(code: bytes) -> int:
    """Check that both find the same CPUIDs; return how many places have the bytes of one."""
    assert compiled.speedups is not None
    places = rewrite._cpuid_pairs(code)
    assert compiled.speedups.cpuid_pairs(code) == places
    for at in places:
        expected = rewrite._is_instruction(code, at, 0, {})
        assert compiled.speedups.executes_cpuid(code, at) == expected, (code.hex(), at)
    return len(places)


@pytest.mark.parametrize("code", [b"", b"\xa2", CPUID, b"\x0f", CPUID * 3, b"\x0f" + CPUID])
def test_short_code_is_searched_alike(code: bytes) -> None:
    same_cpuids(code)
    for at in range(len(code) + 1):
        assert core_in_step(code, at) == rewrite._in_step(code, at)


def test_this_machines_code_is_searched_alike() -> None:
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split()[-1] for line in lines if " r-xp " in line and "/ld-" in line}
    for path in [*map(Path, paths), Path(sys.executable).resolve()]:
        code = path.read_bytes()
        for at in rewrite._cpuid_pairs(code):
            near = code[max(at - 128, 0) : at + 128]
            same_cpuids(near)
            for before in range(min(at, 24)):
                assert core_in_step(near, min(at, 128) - before) == rewrite._in_step(
                    near, min(at, 128) - before
                )


@pytest.mark.parametrize("name", ["in_step", "executes_cpuid"])
@pytest.mark.parametrize("at", [-1, 3])
def test_a_place_outside_the_code_is_refused(name: str, at: int) -> None:
    with pytest.raises(ValueError, match="no place in the code"):
        getattr(compiled.speedups, name)(b"\x0f\xa2", at)
    with pytest.raises(TypeError):
        getattr(compiled.speedups, name)(b"\x0f\xa2")
    with pytest.raises(TypeError):
        getattr(compiled.speedups, name)("\x0f", 0)
