"""VA pages: they hold the versions of evicted pages, and can be evicted themselves.

Each enclave has an array of level-1 VA pages, whose slots hold the versions of its own pages.  A VA
page can be evicted like any other page; its version then is in a slot of a page one level up.  All
enclaves share the upper levels, the :class:`VaTree`.

Invariants of a level-1 array, where *room* is the number of free slots of its usable pages:

* room ≥ ``promised`` − ``used``: each resident page of the enclave can be evicted without loading
  or making a VA page, so reclaim never waits for an EPC page.  A VA page whose eviction would break
  this stays resident.
* pages with room are at the head of the list, full and evicted pages at its tail.

Lock order: the array's lock (its enclave's; the tree's own for upper levels), then the tree's lock,
then what the core takes.

Deviation: Linux never evicts VA pages, though the architecture allows it; an enclave of 48 GiB
needs 96 MiB of them.

Source:
    ``struct sgx_va_page``, ``sgx_alloc_va_slot()``, ``sgx_free_va_slot()``, encl.c;
    ``sgx_encl_grow()``, ioctl.c.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from softsgx.arch import VA_SLOTS, PageType, Status
from softsgx.compiled import record
from softsgx.defects import Defect
from softsgx.hw import Fault
from softsgx.paging.claims import Claim
from softsgx.paging.events import Evicted, Loaded
from softsgx.paging.failures import BackingError, EpcBusy, LoadFailed, NoEpc
from softsgx.paging.interfaces import BackingFile, Group
from softsgx.paging.leafio import eldu, result_name, vanished
from softsgx.paging.page import SgxEpcPage
from softsgx.paging.pins import Pin
from softsgx.paging.swapfile import SwapFile, va_layout
from softsgx.paging.va_page import ALL_FREE, VaPage, VaPageList, VaSlot
from softsgx.runtime import Lock

if TYPE_CHECKING:
    from softsgx.paging.core import EpcCore

__all__ = ["VaArray", "VaPage", "VaSlot", "VaTree"]


class _AlwaysAlive:
    """The pin of the upper levels, which live as long as the core."""

    def get(self) -> bool:
        return True

    def put(self) -> None:
        pass


@record
class VaArray:
    """The VA pages of one enclave, or of one upper level.

    Args:
        tree: the upper levels.
        level: 1 for an enclave's.
        lock: protects the array; for upper levels the tree's own lock.
        pin: keeps the array alive while a page of it is in a batch.
        group: charged for its pages; ``None`` is the root.

    Attributes:
        promised: pages of the enclave that need a slot when they are evicted (page_cnt).
        used: slots taken, by evicted pages and by reservations.
        room: free slots of usable pages: resident, and not being evicted.
    """

    __slots__ = (
        "_made_by_count",
        "_pages",
        "group",
        "level",
        "lock",
        "pin",
        "promised",
        "room",
        "tree",
        "used",
    )

    def __init__(
        self, tree: VaTree, level: int, lock: Lock, *, pin: Pin, group: Group | None
    ) -> None:
        self.tree, self.level, self.lock, self.pin, self.group = tree, level, lock, pin, group
        self.promised = self.used = self.room = 0
        self._pages = VaPageList()
        self._made_by_count = Defect.VA_PAGE_EVERY_512_PAGES in tree.core.defects

    def __len__(self) -> int:
        return len(self._pages)

    def pages(self) -> list[VaPage]:
        """Return the pages in list order: those with room first, full and evicted ones last."""
        return list(self._pages)

    def tree_lock(self) -> AbstractContextManager[object]:
        """Return the tree's lock; for an upper level a null context, since it is held already."""
        return nullcontext() if self.lock is self.tree.lock else self.tree.lock

    # --- slots ------------------------------------------------------------------------------------

    def alloc_slot(self) -> VaSlot:
        """Take the lowest free slot of the first page; the page stays resident until EWB."""
        page = next(iter(self._pages), None)
        assert page is not None and page.free and page.epc is not None and page.eviction is None, (
            f"no free VA slot: {self.promised} promised, {self.used} used, {self.room} left;"
            " call grow() before a page is added"
        )
        free = page.free
        rest = page.free = free & (free - 1)
        bit = free ^ rest  # the lowest
        page.pins += 1
        page.accessed = True
        self.used += 1
        self.room -= 1
        if not rest:
            self._pages.move_to_end(page)
        return VaSlot(page, bit.bit_length() - 1)

    def slot_written(self, slot: VaSlot) -> None:
        """EWB has written a version to ``slot``: unpin its page."""
        page = slot.page
        page.pins -= 1
        if page.stale:
            page.stale &= ~(1 << slot.number)
        if not page.free or self.promised == self.used:
            self.mark_reclaimable(page)

    def cancel_slot(self, slot: VaSlot) -> None:
        """No version was written to ``slot``: free it and unpin its page."""
        slot.page.pins -= 1
        self._free(slot)

    def slot_loaded(self, slot: VaSlot) -> None:
        """ELDU has cleared ``slot``: free it."""
        slot.page.accessed = True
        self._free(slot)

    def slot_dropped(self, slot: VaSlot) -> None:
        """Free ``slot``, whose page will not be loaded: the version stays in it, stale."""
        slot.page.stale |= 1 << slot.number
        self._free(slot)

    def _free(self, slot: VaSlot) -> None:
        page = slot.page
        page.free |= 1 << slot.number
        self.used -= 1
        if page.epc is not None and page.eviction is None:
            self.room += 1
            self._pages.move_to_end(page, last=False)

    # --- pages ------------------------------------------------------------------------------------

    def needs_page(self) -> bool:
        """Return whether one more page of the enclave needs another VA page."""
        if self._made_by_count:
            return self.promised % VA_SLOTS == 0
        return self.room < self.promised + 1 - self.used

    def evicted_with_room(self) -> VaPage | None:
        """Return an evicted page with free slots: loading it saves making another page."""
        return next(
            (
                page
                for page in reversed(self._pages)
                if page.free and not page.epc and not page.lost
            ),
            None,
        )

    def make(self, epc: SgxEpcPage) -> VaPage:
        """EPA: make a VA page of ``epc``, to be linked by :meth:`link`; needs no lock.

        Raises:
            LoadFailed: the leaf faulted; ``epc`` was freed.
        """
        core = self.tree.core
        try:
            core.leaves.epa(PageType.VA, epc.addr)
        except Fault as fault:
            core.remove(epc)
            raise LoadFailed(str(fault)) from fault
        page = self.tree.new_page(self)
        page.epc, epc.owner = epc, page
        core.counters.va_made += 1
        return page

    def link(self, page: VaPage) -> None:
        """Add ``page`` to the array: slots can be taken from it."""
        self._pages.append(page)
        self._pages.move_to_end(page, last=False)
        self.room += page.free_slots
        self.tree.count(self.level, 1)

    def can_evict(self, page: VaPage) -> bool:
        """Return whether ``page`` can be evicted now without breaking the invariants."""
        if page.pins or not self.tree.core.policy.evict_va:
            return False
        if self.level > 1:
            return not page.free
        return self.room - page.free_slots * page.usable >= self.promised - self.used

    def mark_reclaimable(self, page: VaPage) -> None:
        """Put ``page`` on the LRU list if it can be evicted."""
        epc = page.epc
        if epc is not None and not epc.tracked and page.eviction is None and self.can_evict(page):
            self.tree.core.mark_reclaimable(epc)

    def mark_all_reclaimable(self) -> None:
        """Put every VA page that can be evicted on the LRU list: the enclave has left the EPC."""
        for page in self._pages:
            self.mark_reclaimable(page)

    def eviction_begun(self, page: VaPage) -> None:
        """``page`` is being evicted: its free slots cannot be taken."""
        self.room -= page.free_slots
        self._pages.move_to_end(page)

    def made_usable(self, page: VaPage) -> None:
        """``page`` was loaded, or its eviction was cancelled: its free slots can be taken."""
        self.room += page.free_slots
        if page.free:
            self._pages.move_to_end(page, last=False)

    def evicted(self, page: VaPage) -> None:
        """``page`` is no longer in the EPC: it was evicted, or lost."""
        if page.lost:
            self.room -= page.free_slots
        page.epc = None
        self._pages.move_to_end(page)

    def discard_invalid(self, page: VaPage) -> None:
        """Free the EPC page of ``page``, whose EPCM entry a loss of power has invalidated.

        The pages whose versions it held can never be loaded.  The array's lock is held.
        """
        core = self.tree.core
        if page.lost or page.pins or not page.usable or page.epc is None:
            return  # the last eviction with a slot of it reserved comes here again
        if not core.unmark_reclaimable(page.epc):
            return  # a batch has it, whose EWB fails and comes here again
        core.remove(page.epc)
        core.counters.lost += 1
        page.lost = True
        self.evicted(page)
        self.tree.free_if_unused(page)

    def make_resident(self, page: VaPage, claim: Claim | None = None) -> None:
        """Make ``page`` resident, after the pages above it; the array's lock is held.

        Raises:
            EpcBusy, NoEpc: no EPC page; pages that were loaded first stay.
            LoadFailed: ELDU refused.
        """
        page.accessed = True
        if page.epc is not None:
            if page.eviction is not None:
                page.cancel_eviction()
            return
        with self.tree_lock():
            self._load(page, claim)
        self.made_usable(page)
        self.mark_reclaimable(page)

    def _load(self, page: VaPage, claim: Claim | None) -> None:
        """ELDU ``page``; the tree's lock is held."""
        tree, core, slot = self.tree, self.tree.core, page.parent
        if page.lost or slot is None:
            raise LoadFailed("lost")
        slot.page.array.make_resident(slot.page, claim)
        epc = core.alloc(page, reclaim=False, group=self.group, kind="va", claim=claim)
        try:
            pinned = tree.file.open(page.index)
        except BackingError as error:
            core.free(epc)
            raise LoadFailed(str(error)) from error
        result = eldu(core.leaves, epc.addr, slot.addr, pinned, 0, 0)
        tree.trace(Loaded(epc.addr, "va", page.index, result_name(result)))
        if result is not Status.SUCCESS:
            tree.file.close(pinned)
            core.counters.eldu_failed += 1
            core.remove(epc)
            if vanished(result, slot.addr):
                slot.page.array.discard_invalid(slot.page)
            raise LoadFailed(result_name(result))
        tree.file.loaded(pinned)
        slot.page.array.slot_loaded(slot)
        page.parent, page.epc = None, epc
        core.counters.va_in += 1
        if claim is not None:
            core.claims.prerequisite_loaded(claim, page, epc)
        tree.free_if_unused(slot.page)

    def unlink(self, page: VaPage) -> None:
        """Remove ``page`` from the array and discard its versions; no batch has it."""
        core = self.tree.core
        self._pages.remove(page)
        if page.epc is not None:
            assert page.usable, "a VA page is removed while a batch has it"
            self.room -= page.free_slots
            unmarked = core.unmark_reclaimable(page.epc)
            assert unmarked, "a VA page is removed while a batch has it"
            core.remove(page.epc)
            page.epc = None
        self.tree.count(self.level, -1)
        with self.tree_lock():
            if page.parent is not None:
                self.tree.file.discard(page.index)
                page.parent.page.array.slot_dropped(page.parent)
                self.tree.free_if_unused(page.parent.page)
                page.parent = None
            self.tree.forget(page)
            self.tree.free_unused_level(self.level + 1)

    def check_invariants(self) -> None:
        """Compare the counts with the pages; call with the lock held or while no task runs."""
        room = sum(page.free_slots for page in self._pages if page.usable)
        used = sum(VA_SLOTS - page.free_slots for page in self._pages)
        assert room == self.room, f"VA room is {self.room}, recounted {room}"
        assert used == self.used, f"{self.used} VA slots in use, recounted {used}"
        if self.level == 1 and not any(page.lost for page in self._pages):
            assert self.room >= self.promised - self.used, (
                f"{self.promised} pages promised a slot, {self.used} have one, {self.room} left"
            )
        full = [not (page.free and page.usable) for page in self._pages]
        assert full == sorted(full), "a VA page with room is behind one without"


class VaTree:
    """The upper levels of VA pages, shared by all enclaves, and the file VA pages are evicted to.

    Args:
        core: the EPC core.
        backing: backing file of evicted VA pages.

    Attributes:
        pages: every VA page, of all levels, by its index in the file.
        lock: protects the upper levels and the file.
        file: contents and PCMDs of evicted VA pages of all levels.
    """

    def __init__(self, core: EpcCore, backing: BackingFile) -> None:
        self.core = core
        self.lock = core.runtime.lock("VA tree")
        self.file = SwapFile(
            backing,
            va_layout,
            counters=core.counters,
            tracer=core.tracer,
            defects=frozenset(),
        )
        self._levels: dict[int, VaArray] = {}
        self._latch = core.runtime.latch()
        self.pages: dict[int, VaPage] = {}
        self._counts: dict[int, int] = {}
        self._spare: list[int] = []

    def array(self, lock: Lock, *, pin: Pin, group: Group | None) -> VaArray:
        """Return an empty level-1 array for an enclave."""
        return VaArray(self, 1, lock, pin=pin, group=group)

    def levels(self) -> dict[int, VaArray]:
        """Return the upper levels by number, from 2."""
        return dict(self._levels)

    def trace(self, event: Evicted | Loaded) -> None:
        """Hand ``event`` to the tracer."""
        if self.core.tracer is not None:
            self.core.tracer(event)

    def count(self, level: int, change: int) -> None:
        """Count the VA pages of each level, resident or evicted."""
        with self._latch:
            self._counts[level] = self._counts.get(level, 0) + change

    def _worth_a_page(self, level: int) -> bool:
        """Return whether an upper page for ``level`` pays: it must let two pages be evicted."""
        return self._counts.get(level, 0) > 1

    def new_page(self, array: VaArray) -> VaPage:
        """Return a VA page of ``array`` with an index that no other one has."""
        with self._latch:
            index = self._spare.pop() if self._spare else len(self.pages)
            page = self.pages[index] = VaPage(array, index)
        return page

    def forget(self, page: VaPage) -> None:
        """``page`` was removed: its index may be used again."""
        with self._latch:
            del self.pages[page.index]
            self._spare.append(page.index)

    def needs_spare_upper_page(self) -> bool:
        """Return whether an upper page should be made now, before an eviction needs it.

        A small EPC that is full of VA pages could not make one.
        """
        if not self.core.policy.evict_va or not self._worth_a_page(1):
            return False
        above = self._levels.get(2)
        return above is None or not above.room

    def add_spare_upper_page(self, epc: SgxEpcPage) -> None:
        """Make an upper page of ``epc``; free it if another task has made one.  Takes the lock."""
        with self.lock:
            if self.needs_spare_upper_page():
                array = self._above(1)
                array.link(array.make(epc))
                return
        self.core.free(epc)

    def _above(self, level: int) -> VaArray:
        array = self._levels.get(level + 1)
        if array is None:
            array = VaArray(self, level + 1, self.lock, pin=_AlwaysAlive(), group=None)
            self._levels[level + 1] = array
        return array

    def alloc_upper_slot(self, level: int) -> VaSlot | None:
        """Take a slot one level above ``level``, from a new page if need be; the lock is held.

        Returns:
            ``None``: there is no slot, and no EPC page is free for a new page, or a new page would
            only serve to evict one page.
        """
        array = self._above(level)
        if not array.room:
            try:
                evicted = array.evicted_with_room()
                if evicted is not None:
                    array.make_resident(evicted)
                elif not self._worth_a_page(level):
                    return None
                else:
                    epc = self.core.alloc(None, reclaim=False, kind="va")
                    array.link(array.make(epc))
            except (NoEpc, EpcBusy, LoadFailed):
                return None
        return array.alloc_slot()

    def free_unused_level(self, level: int) -> None:
        """Free the upper pages of ``level`` that hold no version; the lock is held."""
        array = self._levels.get(level)
        if array is not None and not array.used:
            for page in array.pages():
                self.free_if_unused(page)

    def free_if_unused(self, page: VaPage) -> None:
        """Free an upper page that holds no version and is not needed; the lock is held."""
        array = page.array
        if page.lost and page.free == ALL_FREE:
            array.unlink(page)
            return
        if page.free != ALL_FREE or page.pins or not page.usable or page.epc is None:
            return
        if array.room <= VA_SLOTS and self._worth_a_page(array.level - 1):
            return  # the only upper page, and there are pages to evict with it
        if self.core.unmark_reclaimable(page.epc):  # otherwise a batch has it
            array.unlink(page)

    def check_invariants(self) -> None:
        """Compare the counts of the upper levels with their pages."""
        for array in self._levels.values():
            array.check_invariants()
