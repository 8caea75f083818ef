"""The pages of an enclave: a mapping, and what the host remembers of each page."""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softsgx.arch import PAGE_BYTES, Attributes, AttributesFlags, Secs
from softsgx.driver.page import EnclavePage
from softsgx.driver.pages import EnclavePages
from softsgx.host import Platform
from softsgx.image import SECINFO_RW, Blob
from softsgx.paging import FlatBacking

BASE = 0x7000_0000_0000
EPC_PAGES = 256
SEALED_BYTES = PAGE_BYTES + 16


class Page:
    def __init__(self, index: int) -> None:
        self.index = index


INDICES = st.sampled_from([0, 1, 126, 127, 128, 129, 1 << 20, (1 << 40) + 5])


@given(steps=st.lists(st.tuples(st.sampled_from(["set", "set", "del", "get", "clear"]), INDICES)))
def test_pages_are_a_mapping_in_order_of_indices(steps: list[tuple[str, int]]) -> None:
    pages: Any = EnclavePages()
    model: dict[int, Page] = {}
    for kind, index in steps:
        match kind:
            case "set":
                pages[index] = model[index] = Page(index)
            case "del" if index in model:
                del pages[index], model[index]
            case "clear" if index == 0:
                pages.clear()
                model.clear()
            case _:
                for ask in (pages.__getitem__, pages.__delitem__):
                    if index not in model:
                        with pytest.raises(KeyError):
                            ask(index)
        assert pages.get(index) is model.get(index) and (index in pages) is (index in model)
        assert pages.get(index, 7) is model.get(index, 7)
        assert len(pages) == len(pages.values()) == len(model)
        assert list(pages.items()) == sorted(model.items()) and list(pages) == sorted(model)
        assert list(pages.values()) == [page for _index, page in sorted(model.items())]
        assert len(pages.chunks) == len({index >> 7 for index in model})


def test_pages_may_be_removed_and_added_during_a_walk() -> None:
    pages: Any = EnclavePages()
    for index in range(0, 1000, 2):
        pages[index] = Page(index)
    seen = []
    for page in pages.values():
        seen.append(page.index)
        if page.index == 250:
            for index in range(256, 520, 2):
                del pages[index]
            pages[251], pages[999] = Page(251), Page(999)
    assert seen == [*range(0, 252, 2), 251, 252, 254, *range(520, 1000, 2), 999]


def test_pages_are_gone_as_they_are_drained() -> None:
    pages: Any = EnclavePages()
    for index in (300, 5, 127, 128):
        pages[index] = Page(index)
    drained = pages.drain()
    assert next(drained).index == 5 and len(pages) == 2 and 5 not in pages and 128 in pages
    assert [page.index for page in drained] == [127, 128, 300]
    assert not pages and not pages.chunks


# --- memory ---------------------------------------------------------------------------------------


def remembered(pages: int) -> Iterator[int]:
    """Yield what Python has allocated: before an enclave, and when most of it is evicted."""
    with Platform(epc=EPC_PAGES * PAGE_BYTES, policy="fifo") as platform:
        process = platform.process()
        gc.collect()
        yield tracemalloc.get_traced_memory()[0]
        plan = Blob().heap(pages).plan()
        attributes = AttributesFlags.MODE64BIT.value | AttributesFlags.DEBUG.value
        secs = Secs(
            size=plan.size,
            base=BASE,
            ssa_frame_size=1,
            attributes=Attributes(flags=attributes, xfrm=3),
        )
        fd = process.open()
        process.create(fd, secs.pack())
        for first in range(0, pages, 256):
            data = os.urandom(PAGE_BYTES) * 256
            process.add_pages(fd, first * PAGE_BYTES, data, SECINFO_RW, measure=False)
        assert platform.driver is not None
        (enclave,) = platform.driver.enclaves
        assert enclave.resident_pages < EPC_PAGES and len(enclave.pages) == pages
        assert isinstance(enclave.swap._backing, FlatBacking)
        assert len(enclave.swap._backing.sealed) == pages - enclave.resident_pages
        del data, secs, plan
        gc.collect()
        yield tracemalloc.get_traced_memory()[0]


def test_an_evicted_page_takes_little_more_than_its_bytes() -> None:
    """An object of the page, its index, its VA slot: 1.05 bytes for each byte, all told."""
    counts, taken = (1024, 5 * 1024), []
    tracemalloc.start()
    try:
        list(remembered(counts[0]))  # what the first enclave of a process imports and caches
        for count in counts:
            before, after = remembered(count)
            taken.append(after - before)
    finally:
        tracemalloc.stop()
    grown = (taken[1] - taken[0]) / (counts[1] - counts[0])
    assert grown < 190, f"{grown:.0f} bytes of Python for each evicted page"
    assert SEALED_BYTES + grown <= 1.05 * PAGE_BYTES


def test_an_object_of_a_page_is_small() -> None:
    assert EnclavePage.__basicsize__ <= 80, "with its head of 16 bytes, 96 of pymalloc"
