"""Stubs of one kind: places, jumps that lead there, and what is known of them after fork."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from softsgx.engines.native.vdso.stubs import Stub, Stubs, jump

AREA, SIZE, MOST = 0x4000, 32, 3
NO_THREAD: Any = None


@dataclass(frozen=True)
class Code:
    """A site whose stub has its address, and then a byte."""

    start: int
    byte: bytes = b"a"

    @property
    def at(self) -> int:
        return self.start + 5

    def stub(self, place: int) -> tuple[bytes, dict[str, int]]:
        return place.to_bytes(8, "little") + self.byte, {"byte": 8}


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "memory", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def make() -> Stubs[Code]:
    return Stubs(SIZE, (AREA, MOST))


def test_each_site_gets_a_place_of_its_own_once(memory: int) -> None:
    stubs, one, other = make(), Code(0x1000), Code(0x1000, b"b")
    assert stubs.jump_from(one, memory) == jump(0x1000, AREA)
    assert stubs.jump_from(other, memory) == jump(0x1000, AREA + SIZE)
    assert stubs.jump_from(one, memory) == jump(0x1000, AREA)
    assert len(stubs) == 2
    assert os.pread(memory, 9, AREA + SIZE) == (AREA + SIZE).to_bytes(8, "little") + b"b"


def test_an_address_in_a_stub_is_found_and_no_other(memory: int) -> None:
    stubs = make()
    stubs.jump_from(Code(0x1000), memory)
    assert stubs.find(AREA + 31) == (Stub(Code(0x1000), {"byte": 8}), 31)
    assert stubs.find(AREA - 1) is stubs.find(AREA + SIZE) is None


def test_there_is_room_for_so_many_and_within_reach(memory: int) -> None:
    stubs = make()
    for number in range(MOST):
        stubs.jump_from(Code(number), memory)
    assert not stubs.can_have(Code(MOST), NO_THREAD) and stubs.can_have(Code(0), NO_THREAD)
    assert make().can_have(Code(AREA + (1 << 30) - 6), NO_THREAD)
    assert not make().can_have(Code(AREA + (1 << 30) - 5), NO_THREAD)


def test_a_fork_child_has_stubs_and_looks_at_plain_sites_again(memory: int) -> None:
    stubs = make()
    stubs.jump_from(Code(0x1000), memory)
    stubs.plain.add(7)
    child = stubs.copy()
    child.jump_from(Code(0x2000), memory)
    assert (len(stubs), len(child), child.plain) == (1, 2, set())


def test_only_a_jump_that_is_there_leads_to_a_stub(memory: int) -> None:
    stubs, code = make(), Code(0x1000)
    stubs.jump_from(code, memory)
    assert stubs.leads_from(code.at, {0x1000: 5})
    assert not stubs.leads_from(code.at, {}) and not stubs.leads_from(code.at + 1, {0x1000: 5})


def test_a_jump_reaches_both_ways() -> None:
    for target in (0x1000, 0x3000):
        code = jump(0x2000, target)
        assert code[0] == 0xE9
        assert 0x2005 + int.from_bytes(code[1:], "little", signed=True) == target
