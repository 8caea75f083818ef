"""Batches of one enclave's pages that leave together: what the reclaimer asks of each, at once.

A batch is plain if all its pages belong to one enclave that one address space maps, all in one
mapping, and no task holds a lock that a step needs.  Everything is done in the order of
:mod:`softsgx.paging.reclaim`, a phase for all pages before the next one; where a page needs more,
it and those after it continue with the methods of :class:`PlainPage`.

For drivers without tracer and defects, and runtimes that do not interleave tasks.
"""

from __future__ import annotations

from itertools import compress
from operator import attrgetter
from typing import TYPE_CHECKING

from softsgx.arch import PAGE_SHIFT
from softsgx.driver.optimised import PlainPage
from softsgx.paging import Lru, SgxEpcPage
from softsgx.paging.optimised import PlainSwap
from softsgx.paging.plain_batch import (
    PlainReclaimer,
    Slot,
    evict_pages,
    reservation,
    reserve,
)

if TYPE_CHECKING:
    from softsgx.driver.enclave import Enclave

__all__ = ["evict_together"]

_ALL_PLAIN = {PlainPage}
_owner, _poisoned, _kept = attrgetter("owner"), attrgetter("poisoned"), attrgetter("kept")
_enclave, _index, _address = attrgetter("enclave"), attrgetter("index"), attrgetter("addr")


def evict_together(
    reclaimer: PlainReclaimer, lru: Lru, pages: list[SgxEpcPage], force: bool
) -> int | None:
    """As :data:`softsgx.paging.plain_batch.EvictTogether`."""
    first = pages[0].owner
    if type(first) is not PlainPage:
        return None
    enclave = first.enclave
    swap, mms = enclave._swap, enclave.mms
    if (
        len(mms) != 1
        or type(swap) is not PlainSwap
        or not enclave.references
        or _is_disturbed(enclave)
    ):
        return None
    mm = mms[0].mm
    if not mm.users or mm.mmap_lock.has_writer:
        return None
    owners: list[PlainPage] = list(map(_owner, pages))
    if (
        set(map(type, owners)) != _ALL_PLAIN
        or set(map(_enclave, owners)) != {enclave}
        or any(map(_poisoned, pages))
        or any(map(_kept, pages))
    ):
        return None
    base, indices = enclave.base, list(map(_index, owners))
    linaddrs = [base + (index << PAGE_SHIFT) for index in indices]
    vma = mm.find(linaddrs[0])
    if (
        vma is None
        or vma.enclave is not enclave
        or min(linaddrs) < vma.start
        or max(linaddrs) >= vma.end
    ):
        return None

    # A: isolate, and pin the enclave
    listed = lru.pages
    listed.remove_all(pages)
    enclave.references += len(pages)

    # B: age, reserve, mark
    if not force:
        young = mm.ptes.test_and_clear_pages(linaddrs)
        if any(young):
            for page, stays in zip(pages, young, strict=True):
                if stays:
                    assert page.tracked and page.lru is lru, f"{page!r} was not isolated from here"
                    listed.append(page)
            count = young.count(True)
            reclaimer.count_young(count)
            enclave.references -= count
            if count == len(pages):
                return 0
            old = [not stays for stays in young]
            pages, owners = list(compress(pages, old)), list(compress(owners, old))
            linaddrs, indices = list(compress(linaddrs, old)), list(compress(indices, old))
    slots = reserve(swap, indices)
    if slots is None:
        pages = reclaimer.block(lru, reclaimer.prepare(lru, pages))
        return reclaimer.write(lru, pages)
    for owner in owners:
        owner.being_reclaimed = True

    # C: unmap, block
    mm.ptes.zap_pages(linaddrs)
    blocked = swap._leaves.eblock_pages(list(map(_address, pages)))
    for page in pages[:blocked]:
        page.blocked = True
    if blocked < len(pages):
        _reserve(swap, owners, slots)
        pages = pages[:blocked] + reclaimer.block(lru, pages[blocked:])
        return reclaimer.write(lru, pages)

    # D: write; the first page starts an epoch and interrupts processors, if that is needed
    _reserve(swap, owners[:1], slots[:1])
    freed = reclaimer.write(lru, pages[:1])
    done = 0
    pages, owners, slots = pages[1:], owners[1:], slots[1:]
    if pages and not _is_disturbed(enclave) and swap.children > len(pages):
        done = evict_pages(swap, pages, indices[1:], slots)
        for owner in owners[:done]:
            owner.epc, owner.being_reclaimed = None, False
        enclave.counts.evictions += done
        reclaimer.core.free_evicted(lru, pages[:done])
        _unpin(enclave, done)
    if done < len(pages):
        _reserve(swap, owners[done:], slots[done:])
        return freed + done + reclaimer.write(lru, pages[done:])
    return freed + done


def _is_disturbed(enclave: Enclave) -> bool:
    """Return whether it was killed, or tasks wait for its pages or hold its lock."""
    return bool(enclave.dead or enclave.waiting or enclave.lock.held())


def _reserve(swap: PlainSwap, owners: list[PlainPage], slots: list[Slot]) -> None:
    """Give pages their reservations: they continue one by one."""
    for owner, slot in zip(owners, slots, strict=True):
        owner.reservation = reservation(swap, owner.index, slot)


def _unpin(enclave: Enclave, count: int) -> None:
    """Undo a number of pins, which may destroy the enclave."""
    if enclave.references > count:
        enclave.references -= count
    else:
        for _pin in range(count):
            enclave.put()
