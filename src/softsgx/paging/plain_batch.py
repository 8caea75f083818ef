"""Batches whose pages belong to one owner and leave together.

A batch is *plain* if the owner of its pages says so: then what the readable classes do page by page
is done for all pages in one function a phase, with the same effects.  The owner's function
(:data:`EvictTogether`) is an argument of :class:`PlainReclaimer`, and calls the functions here.

Between two phases no other task runs, except that the first page's EWB may interrupt processors.
So the pages are prepared and marked then, but their :class:`Reservation` exists only in parts: the
slot of each, and backing that is counted.  :func:`reservation` makes one where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

from softsgx.arch import VA_SLOT_BYTES, VA_SLOTS
from softsgx.paging.entries import FIRST
from softsgx.paging.lru import Lru
from softsgx.paging.page import SgxEpcPage
from softsgx.paging.policy import Fifo, Policy
from softsgx.paging.reclaim import Batch, Reclaimer
from softsgx.paging.sealed import BLOCK_PAGES, SEALED_BYTES
from softsgx.paging.sparse import MASK, SHIFT
from softsgx.paging.swapfile import PCMDS_PER_PAGE
from softsgx.paging.swapspace import Reservation
from softsgx.paging.va_page import VaPage, VaSlot

if TYPE_CHECKING:
    from softsgx.paging.optimised import PlainCore, PlainSwap

__all__ = ["EvictTogether", "PlainReclaimer", "Slot", "evict_pages", "reservation", "reserve"]

Slot: TypeAlias = tuple[VaPage, int]
"""A VA slot: as :class:`VaSlot`."""


class PlainReclaimer(Reclaimer):
    """As :class:`Reclaimer`, where tasks do not interleave and nothing is traced.

    Attributes:
        core: the core.
        evict_together: evicts the pages of a plain batch; ``None``: no batch is plain.
    """

    core: PlainCore
    evict_together: EvictTogether | None = None

    def batch(self, lru: Lru, *, force: bool = False) -> Batch:
        """As :meth:`Reclaimer.batch`."""
        evict, old = self.evict_together, type(self._policy).old
        force_all = force or old is Fifo.old
        usual = force_all or old is Policy.old
        if evict is None or not usual or self._scan_pages > self._batch_pages:
            return super().batch(lru, force=force)
        pages = list(islice(lru.pages, self._batch_pages))
        freed = evict(self, lru, pages, force_all) if pages else None
        if freed is None:
            return super().batch(lru, force=force)
        scanned, counters = len(pages), self._counters
        counters.batches += 1
        counters.scanned += scanned
        counters.reclaimed += freed
        return Batch(scanned, freed)

    def prepare(self, lru: Lru, pages: list[SgxEpcPage]) -> list[SgxEpcPage]:
        """Prepare isolated pages one by one; return the victims."""
        return self._prepare(lru, pages, force=True)

    def block(self, lru: Lru, pages: list[SgxEpcPage]) -> list[SgxEpcPage]:
        """Phase C for prepared pages, one by one; return those that are blocked."""
        return self._block(lru, pages)

    def write(self, lru: Lru, pages: list[SgxEpcPage]) -> int:
        """Phase D for blocked pages, one by one; return how many were evicted."""
        return self._write(lru, pages)

    def count_young(self, pages: int) -> None:
        """Count pages that were put back to their list because they were accessed."""
        self._counters.young += pages

    def _prepare(self, lru: Lru, pages: list[SgxEpcPage], *, force: bool) -> list[SgxEpcPage]:
        """As :meth:`Reclaimer._prepare`."""
        victims: list[SgxEpcPage] = []
        counters, old, listed = self._counters, self._policy.old, lru.pages
        asks_owner = type(self._policy).old is Policy.old
        for page in pages:
            owner = page.owner
            assert owner is not None, f"{page!r} in a batch has no owner"
            if page.poisoned:
                self._skip(lru, page, owner, "poisoned")
            elif page.kept:
                counters.kept += 1
                self._skip(lru, page, owner, "kept")
            elif not (force or (owner.age() if asks_owner else old(owner))):
                counters.young += 1
                assert page.tracked and page.lru is lru, f"{page!r} was not isolated from here"
                listed.append(page)
                owner.put()
            elif owner.prepare():
                victims.append(page)
            else:
                counters.not_prepared += 1
                self._skip(lru, page, owner, "prepare")
        return victims

    def _write(self, lru: Lru, pages: list[SgxEpcPage]) -> int:
        """As :meth:`Reclaimer._write`."""
        freed, free, listed = 0, self._free, lru.pages
        for page in pages:
            owner = page.owner
            assert owner is not None, f"{page!r} in a batch has no owner"
            if owner.write():
                assert page.tracked and page not in listed, f"{page!r} was not isolated"
                page.tracked, page.lru = False, None
                free(page)
                owner.put()
                freed += 1
            else:
                self._counters.not_written += 1
                self._skip(lru, page, owner, "write")
        return freed


EvictTogether: TypeAlias = Callable[[PlainReclaimer, Lru, list[SgxEpcPage], bool], int | None]
"""Evict the oldest pages of a list, which are still on it, as :meth:`Reclaimer.batch` does.

Args:
    reclaimer: for pages that do not leave together after all, and for its counts.
    lru: the list.
    pages: see above.
    force: whether to evict pages that were accessed too.

Returns:
    How many pages were evicted.  ``None``: the batch is not plain, and nothing has changed.
"""


def reserve(swap: PlainSwap, indices: list[int]) -> list[Slot] | None:
    """Reserve backing and VA slots of pages, as :meth:`SwapSpace.prepare` of each.

    Returns:
        The slots.  ``None``: one of the pages needs more than this; nothing has changed.
    """
    file, va, count = swap._file, swap.va, len(indices)
    flat, sharers = file._flat, file._sharers
    room = len(flat.sealed.free) - flat.reserved
    if flat.limit_pages is not None or room < count or va.room < count:
        return None
    swap._core.slowpath.backing_error = ""
    for index in indices:
        group = index // PCMDS_PER_PAGE
        others = sharers.get(group)
        sharers.put(group, others + 1)
        flat.pcmd_pages += not others
    flat.reserved += count
    slots: list[Slot] = []
    while len(slots) < count:
        page = next(iter(va._pages))
        assert page.free and page.usable, f"{va.room} free VA slots are not at the head of the list"
        free, before = page.free, len(slots)
        while free and len(slots) < count:
            rest = free & (free - 1)
            slots.append((page, (free ^ rest).bit_length() - 1))  # the lowest
            free = rest
        page.free, page.accessed = free, True
        page.pins += len(slots) - before
        if not free:
            va._pages.move_to_end(page)
    va.used += count
    va.room -= count
    return slots


def reservation(swap: PlainSwap, index: int, slot: Slot) -> Reservation:
    """Return the reservation of one page of :func:`reserve`."""
    return Reservation(index, VaSlot(*slot), swap._file.buffer(index))


def evict_pages(
    swap: PlainSwap, pages: list[SgxEpcPage], indices: list[int], slots: list[Slot]
) -> int:
    """EWB of blocked and tracked pages: as :meth:`EnclaveSwap.write` of each, and their entries.

    Args:
        swap: of their enclave, which has further resident pages.
        pages: the pages.
        indices: their indices in the enclave.
        slots: of :func:`reserve`.

    Returns:
        How many were evicted; the next page needs more than this, and is still reserved.
    """
    addresses: list[int] = [page.addr for page in pages if not page.poisoned]
    resident = [page.epc for page, _number in slots]
    if len(addresses) < len(pages) or None in resident:
        return 0
    done = swap._leaves.ewb_pages(
        addresses,
        [
            epc.addr + number * VA_SLOT_BYTES
            for epc, (_page, number) in zip(resident, slots, strict=True)
            if epc is not None
        ],
    )
    file, va, counters = swap._file, swap.va, swap._counters
    flat = file._flat
    store = flat.sealed
    places, blocks, room = store._places.chunks, store._blocks, store.free
    entries, usual = swap.entries._numbers, flat.usual
    for (sealed, flags, eid), index, (page, number) in zip(done, indices, slots, strict=False):
        flat.reserved -= 1
        high, low = index >> SHIFT, index & MASK
        chunk = places.get(high)
        if chunk is None or chunk[low]:
            store.put(index, sealed)
        else:
            place = room.pop()
            chunk[low] = place + 1
            at = place % BLOCK_PAGES * SEALED_BYTES
            blocks[place // BLOCK_PAGES][at : at + SEALED_BYTES] = sealed
        if usual is None or usual[0] != flags or usual[1] != eid:
            file.keep_kind(index, flags, eid)
            usual = flat.usual
        page.pins -= 1
        if page.stale:
            page.stale &= ~(1 << number)
        if not page.pins and (not page.free or va.promised == va.used):
            va.mark_reclaimable(page)
        chunk = entries.chunks.get(high)
        if chunk is None:
            entries.put(index, page.index * VA_SLOTS + number + FIRST)
        else:
            chunk[low] = page.index * VA_SLOTS + number + FIRST
    count = len(done)
    swap.ewbs += count
    counters.ewb_first += count
    swap.children -= count
    return count
