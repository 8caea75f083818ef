"""Ciphertexts of evicted pages in blocks of memory."""

from __future__ import annotations

import mmap
import random
from array import array

import pytest

from softsgx.paging import BackingError, Counters, FlatBacking
from softsgx.paging.flat import FlatFile
from softsgx.paging.sealed import BLOCK_PAGES, SealedPages, free_places
from softsgx.paging.sparse import SparseNumbers
from softsgx.paging.swapfile import enclave_layout


def sealed(number: int) -> bytes:
    return number.to_bytes(4, "little") * 1028


def test_pages_are_those_that_were_put() -> None:
    rng, pages, kept = random.Random(7), SealedPages(), dict[int, bytes]()
    for step in range(6000):
        index = rng.choice((rng.randrange(900), 1 << 40 | rng.randrange(4), 127, 128))
        if rng.random() < (0.6 if step < 3000 else 0.3):
            kept[index] = sealed(step)
            pages.put(index, kept[index])
        elif index in kept:
            pages.drop(index)
            del kept[index]
        else:
            with pytest.raises(KeyError):
                pages.drop(index)
        assert (index in pages) == (index in kept) and len(pages) == len(kept)
        assert pages.get(index) == kept.get(index)
    assert dict(pages.items()) == kept and list(dict(pages.items())) == sorted(kept)


def test_a_place_is_used_again() -> None:
    pages = SealedPages()
    for index in range(3 * BLOCK_PAGES):
        pages.put(index, sealed(index))
    for index in range(2, 3 * BLOCK_PAGES):
        pages.drop(index)
        pages.put(10_000 + index, sealed(index))
    assert len(pages._blocks) == 3 and not pages.free
    assert len(pages) == 3 * BLOCK_PAGES


def test_blocks_are_freed_with_the_last_page() -> None:
    pages = SealedPages()
    for _round in range(2):
        for index in range(3 * BLOCK_PAGES):
            pages.put(index, sealed(index))
        for index in range(3 * BLOCK_PAGES):
            assert bytes(pages.get(index) or b"") == sealed(index)
            pages.drop(index)
        assert len(pages._blocks) == 1 and len(pages.free) == BLOCK_PAGES
    pages.clear()
    assert not pages._blocks and not pages.free and not len(pages)


def test_a_page_is_not_evicted_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    backing = FlatBacking()
    file = FlatFile(backing, enclave_layout(4096), counters=Counters(), tracer=None)
    for index in range(BLOCK_PAGES - 2):
        file.keep(file.reserve(index), (sealed(index), 0x203, 1))
    pinned = [file.reserve(1000), file.reserve(1001)]
    monkeypatch.setattr(mmap, "mmap", no_memory)
    with pytest.raises(BackingError, match="backing memory cannot grow: Cannot allocate memory"):
        file.reserve(1002)
    for each in pinned:
        file.keep(each, (sealed(each.index), 0x203, 1))
    kept: tuple[object, ...] = file.kept(1001)
    assert kept == (sealed(1001), 0x203, 1)
    pages = backing.pages()
    file.forget(5)
    file.cancel(file.reserve(1002))
    assert backing.pages() == pages - 1


def no_memory(*_args: object, **_options: object) -> None:
    raise OSError(12, "Cannot allocate memory")


def test_numbers_are_zero_where_none_was_put() -> None:
    numbers = SparseNumbers()
    assert numbers.get(5) == 0 and not numbers.chunks
    for index, number in ((1 << 50, 7), (127, 8), (128, 9), (129, 1), (129, 0)):
        numbers.put(index, number)
    assert list(numbers.items()) == [(127, 8), (128, 9), (1 << 50, 7)]
    with pytest.raises(OverflowError):
        numbers.put(3, 1 << 32)
    numbers.clear()
    assert numbers.get(127) == 0


def test_free_places_are_an_array_of_numbers() -> None:
    rng, model = random.Random(3), array("I")
    places = free_places(())
    for _step in range(3000):
        match rng.randrange(5):
            case 0 | 1:
                number = rng.choice((rng.randrange(1000), (1 << 32) - 1))
                places.append(number)
                model.append(number)
            case 2:
                more = [rng.randrange(1 << 32) for _ in range(rng.randrange(4))]
                places.extend(more)
                model.extend(more)
            case 3 if model:
                assert places.pop() == model.pop()
            case _:
                if not model:
                    with pytest.raises(IndexError):
                        places.pop()
        assert len(places) == len(model) and list(places) == list(model)
        assert not model or places[-1] == places[len(model) - 1] == model[-1]
    with pytest.raises(IndexError):
        places[len(model)]
    for wrong, error in ((1 << 32, OverflowError), (-1, OverflowError), ("1", TypeError)):
        kept = len(places)
        with pytest.raises(error):
            places.append(wrong)  # type: ignore[arg-type]
        assert len(places) == kept
    assert list(free_places(range(3, -1, -1))) == [3, 2, 1, 0]
