"""Backing and VA slots of one owner of EPC pages, and the bookkeeping of each eviction and load.

The owner is an enclave or a virtual EPC; this class does not ask what a page belongs to, and
executes neither EWB nor ELDU.  Every method is called with the owner's lock held, unless it says
otherwise.

Lock order: the owner's lock, then the VA tree's lock, then what the core takes.

Invariants: every page of the owner has been promised a VA slot; a reservation holds a slot and two
pinned backing pages until it ends; every evicted page has a slot, its content and its PCMD.

Source:
    ``sgx_encl_grow()``, ioctl.c; ``sgx_encl_get_backing()``, ``sgx_alloc_va_slot()``, encl.c.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from softsgx.compiled import record
from softsgx.defects import Defect
from softsgx.paging.claims import Claim
from softsgx.paging.entries import SwapEntries, SwapEntry
from softsgx.paging.failures import BackingError, EpcBusy, LoadFailed, NoEpc
from softsgx.paging.flat import Backing, FlatFile, open_swap_file
from softsgx.paging.interfaces import Group
from softsgx.paging.page import SgxEpcPage
from softsgx.paging.pins import Pin
from softsgx.paging.slowpath import no_signal
from softsgx.paging.swapfile import Pinned, enclave_layout
from softsgx.paging.va import VaArray, VaPage, VaSlot
from softsgx.runtime import Lock

if TYPE_CHECKING:
    from softsgx.paging.core import EpcCore

__all__ = ["Reservation", "SwapCounts", "SwapEntry", "SwapSpace"]


@record
class Reservation:
    """The resources of one eviction, reserved by :meth:`SwapSpace.prepare`.

    The compiled core records which slot it is, and the file; the slot and the backing are objects
    once Python code has asked for them.

    Args:
        index: page index in the enclave.
        slot: the VA slot for its version.
        pinned: its backing; ``None`` only with :attr:`Defect.BACKING_FETCHED_AFTER_BLOCK`.

    Attributes:
        index: as given.
    """

    __slots__ = ("_file", "_number", "_pinned", "_slot", "_va_page", "index")

    def __init__(self, index: int, slot: VaSlot, pinned: Pinned | None) -> None:
        self.index = index
        self._slot: VaSlot | None = slot
        self._pinned = pinned
        self._va_page: VaPage | None = None
        self._number = 0
        self._file: FlatFile | None = None

    @property
    def slot(self) -> VaSlot:
        """The VA slot, as given."""
        slot = self._slot
        if slot is None:
            assert self._va_page is not None, "a reservation without a VA slot"
            slot = self._slot = VaSlot(self._va_page, self._number)
        return slot

    @property
    def pinned(self) -> Pinned | None:
        """The backing, as given, or as set later."""
        if self._pinned is None and self._file is not None:
            self._pinned = self._file.buffer(self.index)
        return self._pinned

    @pinned.setter
    def pinned(self, pinned: Pinned) -> None:
        self._pinned = pinned


@record
class SwapCounts:
    """What changes at each eviction and load of an enclave; not of a virtual EPC.

    :class:`EnclaveSwap` describes the fields.  It is the base of :class:`SwapSpace`, since those of
    the compiled core are the first of an object.
    """

    __slots__ = ("_base", "children", "etracks", "ewbs", "peak_children")


class SwapSpace(SwapCounts):
    """Backing and VA slots of one owner.

    Args:
        core: the EPC core.
        backing: the backing file of its pages.
        pages: how many pages the owner may have (a power of two); index ``pages`` is a SECS.
        lock: the owner's lock.
        pin: keeps the owner alive while the reclaimer works on its VA pages.
        group: charged for VA pages; ``None`` is the root.

    Attributes:
        entries: where evicted pages are, for an owner whose pages do not keep it themselves.
        va: the VA pages.
        pin: as given.
        lock: as given.
    """

    __slots__ = (
        "_backing",
        "_core",
        "_counters",
        "_file",
        "_group",
        "_late_backing",
        "_leaves",
        "_pages",
        "entries",
        "lock",
        "pin",
        "va",
    )

    def __init__(
        self,
        core: EpcCore,
        backing: Backing,
        *,
        pages: int,
        lock: Lock,
        pin: Pin,
        group: Group | None,
    ) -> None:
        self.lock, self.pin = lock, pin
        self.va: VaArray = core.va.array(lock, pin=pin, group=group)
        self.entries = SwapEntries(core.va.pages)
        self._core, self._leaves, self._counters = core, core.leaves, core.counters
        self._backing, self._pages, self._group = backing, pages, group
        self._file = open_swap_file(
            backing,
            enclave_layout(pages),
            counters=core.counters,
            tracer=core.tracer,
            defects=core.defects,
        )
        self._late_backing = Defect.BACKING_FETCHED_AFTER_BLOCK in core.defects

    # --- room: a VA slot for every page the enclave has -----------------------------------------

    def grow(self, *, cpu_node: int = 0, signal_pending: Callable[[], bool] = no_signal) -> None:
        """Promise a VA slot for one more page (the SECS counts), making a VA page if need be.

        Called WITHOUT the enclave's lock; may reclaim.

        Raises:
            NoEpc, Interrupted: there is no EPC page for it.
            LoadFailed: EPA refused.

        Source:
            ``sgx_encl_grow()``, ioctl.c, which compares the number of pages with multiples of 512,
            not with the free slots (:attr:`Defect.VA_PAGE_EVERY_512_PAGES`).
        """
        tree = self._core.va
        if tree.needs_spare_upper_page():
            with suppress(NoEpc, LoadFailed):
                tree.add_spare_upper_page(
                    self._core.alloc(None, reclaim=True, kind="va", signal_pending=signal_pending)
                )
        with self.lock:
            if self._promised():
                return
        epc = self._core.alloc(
            None,
            reclaim=True,
            group=self._group,
            kind="va",
            cpu_node=cpu_node,
            signal_pending=signal_pending,
        )
        with self.lock:
            self._link(epc)

    def grow_locked(self, *, cpu_node: int = 0, claim: Claim | None = None) -> None:
        """As :meth:`grow`, with the lock held and without reclaim.

        Raises:
            EpcBusy: there is no EPC page now.
            NoEpc, LoadFailed: as for :meth:`grow`.
        """
        if not self._promised():
            epc = self._core.alloc(
                None, reclaim=False, group=self._group, kind="va", cpu_node=cpu_node, claim=claim
            )
            self._link(epc)

    def _promised(self) -> bool:
        """Promise a slot of an existing VA page, if one has room."""
        va = self.va
        evicted = va.evicted_with_room() if va.needs_page() else None
        if evicted is not None:
            try:
                va.make_resident(evicted)
            except (EpcBusy, NoEpc, LoadFailed):
                return False
        if va.needs_page():
            return False
        va.promised += 1
        return True

    def _link(self, epc: SgxEpcPage) -> None:
        """Make a VA page of ``epc`` and promise one of its slots."""
        self.va.link(self.va.make(epc))
        self.va.promised += 1

    def shrink(self) -> None:
        """Undo one promise: a page was removed, or was not added.  VA pages stay."""
        assert self.va.promised > 0, "more pages removed than there were"
        self.va.promised -= 1

    # --- reservations -----------------------------------------------------------------------------

    def prepare(self, index: int, *, announced: bool = True) -> Reservation | None:
        """Reserve backing and a VA slot for page ``index``: :meth:`Reclaimable.prepare`.

        Args:
            index: the page's index.
            announced: ``False`` (:attr:`Defect.BACKING_RESERVED_BEFORE_MARK`) leaves it to a later
                :meth:`announce` to protect the PCMD page from truncation.

        Returns:
            ``None``: no backing; nothing has changed.
        """
        pinned = None
        if not self._late_backing:
            try:
                pinned = self._file.reserve(index, announced=announced)
            except BackingError as error:
                self._core.slowpath.backing_error = str(error)
                return None
            self._core.slowpath.backing_error = ""
        return Reservation(index, self.va.alloc_slot(), pinned)

    def announce(self, reservation: Reservation) -> None:
        """Protect the PCMD page of an eviction that was prepared with ``announced=False``."""
        if reservation.pinned is not None:
            self._file.announce(reservation.pinned)

    def cancel(self, reservation: Reservation) -> None:
        """Free what :meth:`prepare` reserved: the page is not evicted."""
        if reservation.pinned is not None:
            self._file.cancel(reservation.pinned)
        self.va.cancel_slot(reservation.slot)

    def written(self, reservation: Reservation) -> SwapEntry:
        """EWB has evicted the page: end the reservation; return where the page is now."""
        assert reservation.pinned is not None, "EWB without backing"
        self._file.written(reservation.pinned)
        self.va.slot_written(reservation.slot)
        return SwapEntry(reservation.index, reservation.slot)

    # --- loads ------------------------------------------------------------------------------------

    def load_va_page(self, entry: SwapEntry, claim: Claim | None) -> VaSlot:
        """Make the VA page of an evicted page resident; return the slot with the version.

        Raises:
            EpcBusy, NoEpc: no EPC page for it now, or at all.
            LoadFailed: the page is lost, or its VA page cannot be loaded.
        """
        slot = entry.slot
        if slot is None:
            raise LoadFailed("lost")
        self.va.make_resident(slot.page, claim)
        return slot

    def pin_backing(self, entry: SwapEntry) -> Pinned:
        """Pin the backing of an evicted page; end it with :meth:`loaded` or :meth:`not_loaded`.

        Raises:
            LoadFailed: the backing store cannot give it; ``entry`` stays valid.
        """
        try:
            return self._file.open(entry.index)
        except BackingError as error:
            self._counters.eldu_failed += 1
            raise LoadFailed(str(error)) from error

    def loaded(self, slot: VaSlot, pinned: Pinned) -> None:
        """ELDU has loaded the page: its slot and its backing are free again."""
        self._file.loaded(pinned)
        self.va.slot_loaded(slot)
        self._counters.eldu += 1

    def not_loaded(self, pinned: Pinned) -> None:
        """ELDU has refused the page: slot and backing stay for the next try."""
        self._file.close(pinned)
        self._counters.eldu_failed += 1

    def drop(self, entry: SwapEntry) -> None:
        """Discard an evicted page, and shrink: its slot and its backing are free again."""
        if entry.slot is not None:
            self._file.discard(entry.index)
            self.va.slot_dropped(entry.slot)
        self.shrink()

    # --- the end ----------------------------------------------------------------------------------

    def destroy(self) -> None:
        """Give back the VA pages and close the backing; the owner has no resident page.

        Pages that are still evicted need not be dropped first.  No batch has a VA page of this
        owner, since a batch pins it.
        """
        for page in self.va.pages():
            self.va.unlink(page)
        self.entries.clear()
        self._backing.close()

    def check_invariants(self) -> None:
        """Compare the counts of VA slots with raw state; lock held, or while no task runs."""
        self.va.check_invariants()
