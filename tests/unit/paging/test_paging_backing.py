"""Backing files: what is not marked dirty may be lost, limits, layouts, PCMD pages.

The defects B1, B3, B4 and B6 are shown on the layer that has them, one history each.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.failing import Fate

from softsgx.arch import PAGE_BYTES
from softsgx.defects import Defect
from softsgx.paging import (
    BackingError,
    BackingFile,
    Counters,
    FailingBacking,
    FileBacking,
    MemoryBacking,
)
from softsgx.paging.swapfile import Pinned, SwapFile, enclave_layout, va_layout

MAKERS: dict[str, Callable[[int | None], BackingFile]] = {
    "memory": MemoryBacking,
    "file": FileBacking,
}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[[int | None], BackingFile]:
    return MAKERS[request.param]


def test_what_was_marked_dirty_is_read_back(make: Callable[[int | None], BackingFile]) -> None:
    backing = make(None)
    page = backing.pin(7, create=True)
    page.data[:] = b"x" * PAGE_BYTES
    page.mark_dirty()
    page.unpin()
    again = backing.pin(7, create=False)
    assert again.data == b"x" * PAGE_BYTES and backing.pages() == 1
    again.unpin()
    backing.close()


def test_a_page_that_was_not_created_is_not_there(
    make: Callable[[int | None], BackingFile],
) -> None:
    backing = make(None)
    with pytest.raises(BackingError, match="no backing page 3"):
        backing.pin(3, create=False)
    backing.close()


def test_a_full_file_refuses_new_pages_only(make: Callable[[int | None], BackingFile]) -> None:
    backing = make(2)
    for index in (0, 5):
        backing.pin(index, create=True).unpin()
    with pytest.raises(BackingError, match="full"):
        backing.pin(9, create=True)
    backing.pin(5, create=True).unpin()
    backing.truncate(0)
    backing.pin(9, create=True).unpin()
    assert backing.pages() == 2
    backing.close()


def test_a_truncated_page_is_gone_and_comes_back_empty(
    make: Callable[[int | None], BackingFile],
) -> None:
    backing = make(None)
    page = backing.pin(0, create=True)
    page.data[:] = b"x" * PAGE_BYTES
    page.mark_dirty()
    backing.truncate(0)
    page.unpin()
    assert backing.pages() == 0
    page = backing.pin(0, create=True)
    assert not any(page.data)
    page.unpin()
    backing.close()


def test_two_pins_see_the_same_bytes(make: Callable[[int | None], BackingFile]) -> None:
    backing = make(None)
    first, second = backing.pin(0, create=True), backing.pin(0, create=True)
    first.data[0] = 1
    assert second.data[0] == 1
    first.mark_dirty()
    first.unpin()
    assert backing.pin(0, create=False).data[0] == 1
    backing.close()


def test_bytes_not_marked_dirty_are_lost_under_pressure() -> None:
    backing = MemoryBacking()
    page = backing.pin(0, create=True)
    page.data[0] = 1
    page.unpin()
    assert backing.pin(0, create=False).data[0] == 1  # not at once
    page.unpin()
    backing.squeeze()
    assert backing.pin(0, create=False).data[0] == 0


def test_a_file_loses_them_at_once() -> None:
    backing = FileBacking()
    page = backing.pin(0, create=True)
    page.data[0] = 1
    page.unpin()
    assert backing.pin(0, create=False).data[0] == 0
    backing.close()


def test_a_pinned_page_is_not_dropped_but_may_be_cleaned() -> None:
    backing = MemoryBacking()
    page = backing.pin(0, create=True)
    page.data[0] = 1
    page.mark_dirty()
    backing.write_out()
    page.data[0] = 2
    backing.drop_clean()
    assert backing.pin(0, create=False).data[0] == 2
    page.unpin()
    page.unpin()
    backing.drop_clean()
    assert backing.pin(0, create=False).data[0] == 1


def test_the_nth_request_fails_and_no_other() -> None:
    backing = FailingBacking.at(MemoryBacking(), 2)
    backing.pin(0, create=True).unpin()
    with pytest.raises(BackingError, match="request 2"):
        backing.pin(0, create=True)
    backing.pin(0, create=True).unpin()
    assert (backing.requests, backing.failures, backing.pages()) == (3, 1, 1)


# --- layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pages", "file_pages"), [(1, 3), (16, 18), (32, 35), (256, 266), (512, 530), (262144, 270338)]
)
def test_an_enclaves_file_has_linuxs_size(pages: int, file_pages: int) -> None:
    layout = enclave_layout(pages)
    assert max(layout(pages)) + 1 == file_pages


@pytest.mark.parametrize(
    ("pages", "index", "where"),
    [
        (64, 0, (0, 65)),
        (64, 31, (31, 65)),
        (64, 32, (32, 66)),
        (64, 64, (64, 67)),  # the SECS' PCMD, alone
        (16, 16, (16, 17)),  # among the children's
        (16, 3, (3, 17)),
        (32, 32, (32, 34)),
    ],
)
def test_a_pages_content_and_pcmd_are_where_linux_puts_them(
    pages: int, index: int, where: tuple[int, int]
) -> None:
    assert enclave_layout(pages)(index) == where


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_no_two_va_pages_share_more_than_a_pcmd_page(first: int, second: int) -> None:
    a, b = va_layout(first), va_layout(second)
    assert a[0] != b[1] and b[0] != a[1]
    assert (a[0] == b[0]) == (first == second)
    assert (a[1] == b[1]) == (first // 32 == second // 32)


@pytest.mark.parametrize("index", [0, 1, 31, 32, 64])
def test_a_pcmd_is_128_bytes_at_its_place(index: int) -> None:
    _backing, file = swap_file()
    pinned = file.reserve(index)
    pinned.pcmd_bytes[:] = b"\xff" * 128
    at = index % 32 * 128
    backed = _backing.pin(65 + index // 32, create=False)
    assert bytes(backed.data) == bytes(at) + b"\xff" * 128 + bytes(PAGE_BYTES - at - 128)


# --- PCMD pages -----------------------------------------------------------------------------------


def swap_file(*defects: Defect) -> tuple[MemoryBacking, SwapFile]:
    backing = MemoryBacking()
    file = SwapFile(
        backing,
        enclave_layout(64),
        counters=Counters(),
        tracer=None,
        defects=frozenset(defects),
    )
    return backing, file


def fill(pinned: Pinned, byte: int) -> None:
    """What EWB does."""
    pinned.data[:] = bytes([byte]) * PAGE_BYTES
    pinned.pcmd_bytes[:] = bytes([byte]) * 128


def evict(file: SwapFile, index: int, byte: int = 1) -> None:
    pinned = file.reserve(index)
    fill(pinned, byte)
    file.written(pinned)


def load(file: SwapFile, index: int) -> tuple[int, int]:
    """What ELDU does; return the first bytes of content and PCMD."""
    pinned = file.open(index)
    seen = pinned.data[0], pinned.pcmd_bytes[0]
    file.loaded(pinned)
    return seen


def test_a_loaded_page_leaves_nothing_behind() -> None:
    backing, file = swap_file()
    for index in range(65):
        evict(file, index)
    assert backing.pages() == 65 + 3
    for index in range(65):
        assert load(file, index) == (1, 1)
    assert backing.pages() == 0


def test_defect_b6_keeps_the_backing_of_loaded_pages() -> None:
    backing, file = swap_file(Defect.BACKING_KEPT_AFTER_ELDU)
    evict(file, 0)
    load(file, 0)
    assert backing.pages() == 2


def neighbours(*defects: Defect) -> tuple[int, int]:
    """Page 0 is evicted, page 1 about to be; page 0 comes back; then page 1 goes and comes back."""
    _backing, file = swap_file(*defects)
    evict(file, 0, 1)
    pinned = file.reserve(1)
    load(file, 0)
    fill(pinned, 2)
    file.written(pinned)
    return load(file, 1)


def test_a_pcmd_page_stays_while_a_neighbour_is_about_to_write_into_it() -> None:
    assert neighbours() == (2, 2)


def test_defect_b1_truncates_a_pcmd_page_under_a_neighbour() -> None:
    with pytest.raises(BackingError):
        neighbours(Defect.PCMD_PAGE_TRUNCATED_WHILE_SHARED)


def cleared_then_swapped(*defects: Defect) -> int:
    """Under pressure between two loads: the byte of a cleared PCMD that comes back."""
    backing, file = swap_file(*defects)
    evict(file, 0, 1)
    evict(file, 1, 1)
    backing.squeeze()
    load(file, 0)
    backing.squeeze()
    return backing.pin(65, create=False).data[0]


def test_a_cleared_pcmd_stays_cleared_under_pressure() -> None:
    assert cleared_then_swapped() == 0


def test_defect_b3_brings_a_cleared_pcmd_back() -> None:
    assert cleared_then_swapped(Defect.CLEARED_PCMD_NOT_DIRTY) == 1


def evicted_under_pressure(*defects: Defect) -> tuple[int, int]:
    """Pressure between the reservation and EWB, and again after it."""
    backing, file = swap_file(*defects)
    pinned = file.reserve(0)
    backing.squeeze()
    fill(pinned, 1)
    file.written(pinned)
    backing.squeeze()
    return load(file, 0)


def test_what_ewb_wrote_survives_pressure() -> None:
    assert evicted_under_pressure() == (1, 1)


def test_defect_b4_loses_what_ewb_wrote() -> None:
    assert evicted_under_pressure(Defect.BACKING_DIRTIED_BEFORE_EWB) == (0, 0)


@pytest.mark.parametrize("nth", [1, 2])
def test_a_reservation_that_fails_leaves_nothing_behind(nth: int) -> None:
    inner = MemoryBacking()
    file = SwapFile(
        FailingBacking.at(inner, nth),
        enclave_layout(64),
        counters=Counters(),
        tracer=None,
        defects=frozenset(),
    )
    with pytest.raises(BackingError):
        file.reserve(0)
    assert inner.pages() == 0
    file.cancel(file.reserve(0))
    assert inner.pages() == 0


def test_cancelling_keeps_the_pcmds_of_neighbours() -> None:
    _backing, file = swap_file()
    evict(file, 0)
    file.cancel(file.reserve(1))
    assert load(file, 0) == (1, 1)


def test_a_load_that_failed_leaves_everything_for_the_next() -> None:
    _backing, file = swap_file()
    evict(file, 0)
    file.close(file.open(0))
    assert load(file, 0) == (1, 1)


@given(st.lists(st.tuples(st.integers(0, 64), st.booleans()), max_size=60))
def test_the_file_holds_exactly_what_is_evicted(steps: list[tuple[int, bool]]) -> None:
    backing, file = swap_file()
    evicted: set[int] = set()
    for index, cancel in steps:
        if index in evicted:
            assert load(file, index) == (index + 1, index + 1)
            evicted.remove(index)
        elif cancel:
            file.cancel(file.reserve(index))
        else:
            evict(file, index, index + 1)
            evicted.add(index)
    assert backing.pages() == len(evicted) + len({index // 32 for index in evicted})


def test_a_page_that_cannot_be_written_stays_and_is_written_when_that_works_again() -> None:
    fate = Fate("write", 1, lasting=True)
    backing = fate.backing(0)
    page = backing.pin(3, create=True)
    page.data[:] = b"x" * PAGE_BYTES
    page.mark_dirty()
    page.unpin()
    with pytest.raises(BackingError, match="cannot be written: No space left on device"):
        backing.pin(4, create=True)
    fate.nth = 0
    backing.pin(4, create=True).unpin()
    writes = fate.requests["write"]
    again = backing.pin(3, create=False)
    assert bytes(again.data) == b"x" * PAGE_BYTES and fate.requests["read"] == 1
    assert writes == 3, "the page was not tried again"
    backing.close()


def test_a_short_write_goes_on_where_it_ended() -> None:
    fate = Fate("short write", 1)
    backing = fate.backing(0)
    page = backing.pin(0, create=True)
    page.data[:] = bytes(range(256)) * 16
    page.mark_dirty()
    page.unpin()
    assert bytes(backing.pin(0, create=False).data) == bytes(range(256)) * 16
    assert fate.requests["write"] == 2
    backing.close()


@pytest.mark.parametrize("kind", ["read", "short read"])
def test_a_page_that_cannot_be_read_can_be_read_later(kind: str) -> None:
    fate = Fate(kind, 1)
    backing = fate.backing(0)
    page = backing.pin(0, create=True)
    page.data[:] = b"y" * PAGE_BYTES
    page.mark_dirty()
    page.unpin()
    with pytest.raises(BackingError, match=r"cannot be read|only 100 bytes"):
        backing.pin(0, create=False)
    assert bytes(backing.pin(0, create=False).data) == b"y" * PAGE_BYTES
    backing.close()


def test_a_directory_that_is_not_there_is_a_refusal_of_the_store() -> None:
    with pytest.raises(BackingError, match="cannot be made: No such file"):
        FileBacking(directory="/no/such/directory")
