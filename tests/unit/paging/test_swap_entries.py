"""Where evicted pages are, packed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from softsgx.paging import SwapEntry
from softsgx.paging.entries import SwapEntries
from softsgx.paging.va_page import VaPage, VaSlot


def test_entries_are_those_that_were_put() -> None:
    array: Any = SimpleNamespace()
    pages = {index: VaPage(array, index) for index in (0, 1, 4, (1 << 23) - 2)}
    entries = SwapEntries(pages)
    kept: dict[int, tuple[VaPage, int] | None] = {}
    for step, page in enumerate(pages.values()):
        for number in (0, 1, 255, 511):
            index = step * 100 + number
            kept[index] = page, number
            entries.put(index, SwapEntry(index, VaSlot(page, number)))
    kept[1 << 50] = None
    entries.put(1 << 50, SwapEntry(1 << 50, None))
    for index, place in kept.items():
        entry = entries.get(index)
        assert entry is not None and entry.index == index and entry.lost is (place is None)
        assert (entry.slot and (entry.slot.page, entry.slot.number)) == place
    for index in kept:
        entries.put(index, None)
        assert entries.get(index) is None
    assert entries.get(1 << 40) is None
    entries.put(1 << 40, None)
    assert entries.get(1 << 40) is None


def test_a_slot_that_has_no_number_is_refused() -> None:
    array: Any = SimpleNamespace()
    page = VaPage(array, 1 << 23)
    entries = SwapEntries({page.index: page})
    with pytest.raises(OverflowError):
        entries.put(0, SwapEntry(0, VaSlot(page, 0)))


def test_the_entries_of_an_owner_that_has_ended_are_gone() -> None:
    array: Any = SimpleNamespace()
    page = VaPage(array, 0)
    entries = SwapEntries({0: page})
    entries.put(3, SwapEntry(3, VaSlot(page, 3)))
    entries.clear()
    assert entries.get(3) is None
