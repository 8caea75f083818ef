"""Pages by linear address are as dict and set of integers.

Method: the types of the compiled core and those of Python execute the same random steps.
"""

from __future__ import annotations

import gc
import random
import sys
import weakref
from typing import Any, cast

import pytest

from softsgx import compiled
from softsgx.arch import PAGE_BYTES
from softsgx.engines.native.memory.page_maps import PageMap, page_map, page_set

BLOCK = 64 * PAGE_BYTES
HIGHEST = (1 << 64) - PAGE_BYTES
PLACES = [
    *(number * PAGE_BYTES for number in range(150)),
    *(0x7F00_0000_0000 + number * BLOCK + PAGE_BYTES for number in range(60)),
    *(HIGHEST - number * PAGE_BYTES for number in range(3)),
]

needs_core = pytest.mark.skipif(compiled.speedups is None, reason=compiled.description)


def objects() -> PageMap[Any]:
    """Return an empty mapping."""
    return page_map()


def same(pages: Any, known: Any) -> None:
    """Assert that both have the same pages."""
    assert len(pages) == len(known) and bool(pages) is bool(known)
    assert sorted(pages) == sorted(known)
    assert all((at in pages) is (at in known) for at in PLACES)


@pytest.mark.parametrize("seed", range(6))
def test_a_mapping_is_as_a_dict(seed: int) -> None:
    chance, pages, known = random.Random(seed), objects(), dict[int, object]()
    places = chance.sample(PLACES, 30) if seed % 2 else PLACES
    for step in range(3000):
        at, number = chance.choice(places), chance.randrange(9)
        if number < 4:
            pages[at] = known[at] = [step]
        elif number < 7:
            assert pages.pop(at, None) is known.pop(at, None)
        elif number == 7:
            assert pages.get(at) is known.get(at)
            assert pages.get(at, step) is known.get(at, step)
        elif at in known:
            assert pages[at] is known[at]
            del pages[at], known[at]
        if step % 100 == 0:
            same(pages, known)
            assert all(pages[each] is known[each] for each in pages)
        if step % 1000 == 999:
            pages.clear()
            known.clear()
            same(pages, known)


@pytest.mark.parametrize("seed", range(6))
def test_a_set_is_as_a_set(seed: int) -> None:
    chance, pages, known = random.Random(seed), page_set(), set[int]()
    for step in range(3000):
        at, number = chance.choice(PLACES), chance.randrange(8)
        some = chance.sample(PLACES, 4)
        if number < 4:
            pages.add(at)
            known.add(at)
        elif number < 6:
            pages.discard(at)
            known.discard(at)
        else:
            name = ("update", "difference_update")[number % 2]
            getattr(pages, name)(some)
            getattr(known, name)(some)
        if step % 100 == 0:
            same(pages, known)
        if step % 1000 == 999:
            pages.clear()
            known.clear()
            same(pages, known)


@needs_core
def test_pages_ascend() -> None:
    pages, numbers = page_set(), objects()
    for at in random.Random(1).sample(PLACES, len(PLACES)):
        pages.add(at)
        numbers[at] = at
    assert list(pages) == list(numbers) == sorted(PLACES)


@pytest.mark.parametrize("at", [0, PAGE_BYTES])
def test_what_is_not_there_is_a_key_error(at: int) -> None:
    pages = objects()
    pages[2 * PAGE_BYTES] = at
    for wrong in (at, -PAGE_BYTES, 1 << 64):
        with pytest.raises(KeyError):
            pages[wrong]
        with pytest.raises(KeyError):
            del pages[wrong]
        with pytest.raises(KeyError):
            pages.pop(wrong)
        assert wrong not in pages and wrong not in page_set()
        page_set().discard(wrong)
    assert 2 * PAGE_BYTES + 1 not in pages and cast(Any, "a page") not in pages


@needs_core
@pytest.mark.parametrize("wrong", [1, PAGE_BYTES + 8, -PAGE_BYTES, 1 << 64, "a page", None])
def test_only_addresses_of_pages_are_taken(wrong: Any) -> None:
    pages, numbers = page_set(), objects()
    for take in (pages.add, lambda at: pages.update([at]), lambda at: numbers.__setitem__(at, 1)):
        with pytest.raises(ValueError, match="is no page"):
            take(wrong)
    assert not pages and not numbers
    with pytest.raises(TypeError):
        cast(Any, []) in pages  # noqa: B015
    with pytest.raises(TypeError):
        hash(numbers)


class _Thing:
    """An object with weak references."""


def test_objects_are_released() -> None:
    pages, thing = objects(), _Thing()
    before = sys.getrefcount(thing)
    for _ in range(100):
        for at in PLACES:
            pages[at] = thing
            pages[at] = thing
            assert pages.get(at) is thing
        for at in PLACES[::2]:
            assert pages.pop(at) is thing
        del pages[PLACES[1]]
        pages.clear()
    assert sys.getrefcount(thing) == before
    pages[0] = thing
    del pages
    assert sys.getrefcount(thing) == before


def test_a_cycle_is_collected() -> None:
    pages, thing = objects(), _Thing()
    pages[PAGE_BYTES], thing.pages = thing, pages  # type: ignore[attr-defined]
    gone = weakref.ref(thing)
    del pages, thing
    gc.collect()
    assert gone() is None
