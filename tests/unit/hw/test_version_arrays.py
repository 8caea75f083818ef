"""Versions: those that a VA page holds, and those that a paging key counts."""

from __future__ import annotations

import gc
import struct
import sys
from typing import Any

import pytest

from softsgx import compiled
from softsgx.hw.epcm import pack_versions, unpack_versions
from softsgx.hw.secrets import PagingKey

SLOTS = 512
NUMBERS = [0x0102_0304_0506_0700 + 8 * number for number in range(SLOTS)]
BYTES = struct.pack(f"<{SLOTS}Q", *NUMBERS)


def test_a_va_page_has_the_versions_in_its_bytes() -> None:
    versions = unpack_versions(BYTES)
    assert list(versions) == NUMBERS and len(versions) == SLOTS
    assert pack_versions(versions) == BYTES


def test_a_slot_holds_64_bits() -> None:
    versions = unpack_versions(BYTES)
    versions[0], versions[SLOTS - 1] = 2**64 - 1, 0
    assert list(versions) == [2**64 - 1, *NUMBERS[1:-1], 0]
    assert versions[-SLOTS] == 2**64 - 1
    for value, error in ((2**64, OverflowError), (-1, OverflowError), ("8", TypeError)):
        changed: Any = value
        with pytest.raises(error):
            versions[3] = changed
        assert versions[3] == NUMBERS[3]


@pytest.mark.parametrize("slot", [SLOTS, -SLOTS - 1, 2**40])
def test_a_va_page_has_512_slots(slot: int) -> None:
    versions = unpack_versions(BYTES)
    with pytest.raises(IndexError):
        versions[slot]
    with pytest.raises(IndexError):
        versions[slot] = 8
    assert list(versions) == NUMBERS


@pytest.mark.parametrize("size", [0, 8, 4088, 4104])
def test_a_va_page_is_made_of_4096_bytes(size: int) -> None:
    with pytest.raises((ValueError, struct.error)):
        unpack_versions(bytes(size))


def test_two_va_pages_share_no_slot() -> None:
    one, other = unpack_versions(BYTES), unpack_versions(BYTES)
    one[7] = 0
    assert other[7] == NUMBERS[7]


def test_versions_are_multiples_of_8_and_each_key_has_its_own() -> None:
    one, other = PagingKey(bytes(16)), PagingKey(bytes(16))
    assert [one.next_version() for _ in range(1000)] == [*range(8, 8008, 8)]
    assert other.next_version() == 8


@pytest.mark.skipif(compiled.speedups is None, reason=compiled.description)
def test_compiled_versions_are_freed() -> None:
    core: Any = compiled.speedups
    with pytest.raises(TypeError):
        del unpack_versions(BYTES)[3]
    unpack_versions(BYTES)
    gc.collect()
    before = sys.getrefcount(core.VaVersions), sys.getallocatedblocks()
    for _ in range(100):
        versions = unpack_versions(BYTES)
        versions[5] = versions[6]
        with pytest.raises(IndexError):
            versions[SLOTS]
    del versions
    gc.collect()
    assert sys.getrefcount(core.VaVersions) - before[0] < 5
    assert sys.getallocatedblocks() - before[1] < 50
    counter = core.VersionCounter()
    assert iter(counter) is counter and next(counter) == 8
