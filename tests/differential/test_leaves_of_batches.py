"""EBLOCK and EWB of pages in turn: they end before the first page that needs the leaf itself.

Method: the fast leaves execute on pages of an enclave, one of which differs; then its entry, and
those behind it, are as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.model.test_random_programs import World

from softsgx.arch import VA_SLOT_BYTES, PageType, SecInfoFlags
from softsgx.hw import EpcPage

PAGES, ODD = 4, 2
Change = Callable[["Batch"], None]


class Batch:
    """Some pages of an enclave, as a batch has them, and slots for their versions."""

    def __init__(self) -> None:
        world = World(80, optimised=True, data_pages=8)
        self.machine = world.system.machine
        self.leaves: Any = world.system.core.leaves
        enclave = world.system.driver.enclaves[0]
        pages = [page for page in enclave.pages.values() if page.kind is PageType.REG][:PAGES]
        self.pages = [world.system.epcm(page.epc.addr) for page in pages if page.epc is not None]
        assert enclave.swap.secs is not None
        self.secs = world.system.epcm(enclave.swap.secs.addr)
        (va_page,) = enclave.swap.va.pages()
        assert va_page.epc is not None
        self.va = world.system.epcm(va_page.epc.addr)
        self.addresses: list[int] = [page.addr for page in self.pages]
        self.slots = [self.va.addr + 8 * VA_SLOT_BYTES * number for number in range(PAGES)]

    @property
    def odd(self) -> EpcPage:
        return self.pages[ODD]

    def seen(self) -> list[object]:
        return [(repr(page), page.bepoch, page.blocked) for page in self.pages]

    def block(self) -> int:
        blocked: int = self.leaves.eblock_pages(self.addresses)
        return blocked

    def track(self) -> None:
        assert self.block() == PAGES
        self.leaves.etrack(self.secs.addr)

    def evict(self) -> list[Any]:
        found: list[Any] = self.leaves.ewb_pages(self.addresses, self.slots)
        return found


def field(of: str, name: str, value: object) -> Change:
    """Change a field of an entry, or of the enclave."""

    def change(batch: Batch) -> None:
        target: Any = batch.secs.owner if of == "enclave" else getattr(batch, of)
        setattr(target, name, value)

    return change


def test_pages_are_blocked_in_the_present_epoch() -> None:
    batch = Batch()
    batch.secs.owner.epoch = 7
    assert batch.block() == PAGES
    assert all(page.blocked and page.bepoch == 7 for page in batch.pages)


@pytest.mark.parametrize(
    ("change", "done"),
    [
        (field("odd", "valid", False), ODD),
        (field("odd", "blocked", True), ODD),
        (field("odd", "lock", 1), ODD),
        (field("odd", "lock", -1), ODD),
        (field("odd", "secs", None), ODD),
        (field("enclave", "etrack_running", True), 0),
    ],
)
def test_blocking_ends_before_a_page_that_needs_the_leaf(change: Change, done: int) -> None:
    batch = Batch()
    change(batch)
    before = batch.seen()
    assert batch.block() == done
    assert batch.seen()[done:] == before[done:]
    assert all(page.blocked for page in batch.pages[:done])


def test_blocking_ends_before_an_address_outside_the_epc() -> None:
    batch = Batch()
    batch.addresses[ODD] = 0
    assert batch.block() == ODD


def test_evicted_pages_leave_nothing_behind() -> None:
    batch = Batch()
    batch.track()
    batch.odd.pending = True
    children, store = batch.secs.owner.children, batch.machine.store
    sealed = batch.evict()
    assert len(sealed) == PAGES and batch.secs.owner.children == children - PAGES
    for number, (page, (data, flags, eid)) in enumerate(zip(batch.pages, sealed, strict=True)):
        pending = SecInfoFlags.PENDING if number == ODD else 0
        assert flags == PageType.REG << 8 | 3 | pending and eid == batch.secs.owner.eid
        assert len(data) == 4112 and not page.valid and page.secs is None
        with pytest.raises(KeyError):
            store.freeze(page)
    versions = [batch.va.versions[8 * number] for number in range(PAGES)]
    assert versions == sorted(set(versions)) and versions[0]


@pytest.mark.parametrize(
    ("change", "done"),
    [
        (field("odd", "valid", False), ODD),
        (field("odd", "secs", None), ODD),
        (field("odd", "blocked", False), ODD),
        (field("odd", "lock", 1), ODD),
        (field("odd", "bepoch", 1 << 20), ODD),
        (field("va", "valid", False), 0),
        (field("va", "lock", -1), 0),
        (field("va", "slots", None), 0),
        (field("enclave", "tracking_lock", True), 0),
        (field("enclave", "prev_count", 1), 0),
        (lambda batch: batch.va.versions.__setitem__(8 * ODD, 8), ODD),
        (lambda batch: batch.slots.__setitem__(ODD, batch.slots[ODD] + 4), ODD),
        (lambda batch: batch.slots.__setitem__(ODD, 0), ODD),
        (lambda batch: batch.addresses.__setitem__(ODD, 0), ODD),
    ],
)
def test_evicting_ends_before_a_page_that_needs_the_leaf(change: Change, done: int) -> None:
    batch = Batch()
    batch.track()
    change(batch)
    before, children = batch.seen(), batch.secs.owner.children
    assert len(batch.evict()) == done
    assert batch.seen()[done:] == before[done:] and batch.secs.owner.children == children - done
    assert not any(page.valid for page in batch.pages[:done])


def test_pages_of_this_epoch_are_not_evicted_and_older_ones_are() -> None:
    batch = Batch()
    assert batch.block() == PAGES
    assert not batch.evict()
    batch.leaves.etrack(batch.secs.addr)
    batch.secs.owner.prev_count = 1  # a processor has not left since
    assert not batch.evict()
    batch.odd.bepoch -= 1  # blocked before the epoch in which that entered
    batch.addresses, batch.slots = [batch.odd.addr], batch.slots[:1]
    assert len(batch.evict()) == 1
