"""The swapping of one enclave: EBLOCK, ETRACK, EWB, ELDU, and its SECS.

The driver has one of these for each enclave, and calls it from its pages'
:class:`~softsgx.paging.Reclaimable` methods and from its fault handler.  Every method is called
with the enclave's lock held, unless it says otherwise.

Lock order: the enclave's lock, then the VA tree's lock, then the core's locks.

Invariants: the SECS is resident while the enclave has resident pages (``children``); every evicted
page has a VA slot, its content and its PCMD; an eviction or a load that fails leaves the page where
it was, and can be tried again.

Source:
    ``sgx_encl_ewb()``, ``sgx_reclaimer_write()``, main.c; ``__sgx_encl_eldu()``,
    ``__sgx_encl_load_page()``, ``sgx_encl_load_secs()``, encl.c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from softsgx.arch import PAGE_BYTES, Status
from softsgx.defects import Defect
from softsgx.hw import Fault, PageFault
from softsgx.paging.claims import Claim
from softsgx.paging.entries import SwapEntry
from softsgx.paging.events import Evicted, Loaded, TrackingRound
from softsgx.paging.failures import BackingError, LoadFailed, MachineCheck
from softsgx.paging.flat import Backing
from softsgx.paging.idle_secs import IdleSecs
from softsgx.paging.interfaces import Group, Reclaimable
from softsgx.paging.leafio import LeafResult, eldu, ewb, result_name, vanished
from softsgx.paging.page import SgxEpcPage
from softsgx.paging.pins import Pin
from softsgx.paging.reclaim import EVICT_POISONED
from softsgx.paging.swapfile import Pinned
from softsgx.paging.swapspace import Reservation, SwapSpace
from softsgx.paging.va import VaSlot
from softsgx.runtime import Lock

if TYPE_CHECKING:
    from softsgx.paging.core import EpcCore

__all__ = ["EnclaveSwap"]

_SUCCESS, _NOT_TRACKED = Status.SUCCESS, Status.NOT_TRACKED


class EnclaveSwap(SwapSpace):
    """The swapping of one enclave; see :class:`SwapSpace` for VA slots and backing.

    Args:
        core: the EPC core.
        backing: the backing file of its pages; :meth:`destroy` closes it.
        pages: the enclave's size in pages (a power of two); index ``pages`` is the SECS.
        base: the enclave's linear address.
        lock: the enclave's lock.
        pin: keeps the enclave alive while the reclaimer works on its SECS or VA pages.
        kick: interrupts every processor that may be inside the enclave, and waits until each has
            left.
        group: charged for SECS and VA pages; ``None`` is the root.

    Attributes:
        secs: the EPC page of the SECS; ``None`` before :meth:`set_secs` and while it is evicted.
        secs_entry: where the SECS is while it is evicted.
        children: resident pages of the enclave (secs_child_cnt); ``peak_children``: the highest so
            far.
        ewbs, etracks: EWBs and ETRACKs executed, those of the SECS included.
    """

    __slots__ = (
        "_discards_failed",
        "_frees_failed",
        "_ignores_poison",
        "_kick",
        "_leaks_slots",
        "_secs_may_leave",
        "_secs_page",
        "secs",
        "secs_entry",
    )

    def __init__(
        self,
        core: EpcCore,
        backing: Backing,
        *,
        pages: int,
        base: int,
        lock: Lock,
        pin: Pin,
        kick: Callable[[], None],
        group: Group | None = None,
    ) -> None:
        super().__init__(core, backing, pages=pages, lock=lock, pin=pin, group=group)
        self.secs: SgxEpcPage | None = None
        self.secs_entry: SwapEntry | None = None
        self.children = self.peak_children = 0
        self.ewbs = self.etracks = 0
        self._secs_may_leave = False
        self._base, self._kick = base, kick
        self._secs_page = IdleSecs(self)
        self._frees_failed = Defect.PAGE_FREED_AFTER_FAILED_EWB in core.defects
        self._leaks_slots = Defect.VA_SLOT_LEAKED_BY_FAILED_EWB in core.defects
        self._discards_failed = Defect.PAGE_DESTROYED_BY_FAILED_ELDU in core.defects
        self._ignores_poison = not core.defects.isdisjoint(EVICT_POISONED)

    @property
    def secs_may_leave(self) -> bool:
        """Whether the SECS may be evicted: set when the enclave is initialized."""
        return self._secs_may_leave

    @secs_may_leave.setter
    def secs_may_leave(self, may: bool) -> None:
        self._secs_may_leave = may
        self.secs_idle()  # all its pages may be evicted already

    # --- the SECS and the count of its children ---------------------------------------------------

    def set_secs(self, page: SgxEpcPage) -> None:
        """ECREATE has made ``page`` the SECS; :meth:`grow` has promised a VA slot for it."""
        assert self.secs is None, "the enclave has a SECS already"
        self.secs = page
        page.owner = self._secs_page

    def load_secs(self, *, cpu_node: int = 0, claim: Claim | None = None) -> SgxEpcPage:
        """Return the SECS page; load it if it is evicted.  Never reclaims.

        Call :meth:`child_added` after a leaf that gave it a child.

        Raises:
            EpcBusy, NoEpc: no EPC page for it now, or at all.
            LoadFailed: ELDU refused.
        """
        if self.secs is not None:
            self._secs_page.cancel_eviction()
            return self.secs
        entry = self.secs_entry
        assert entry is not None, "the SECS is neither in the EPC nor evicted"
        page = self._eldu(entry, 0, 0, self._secs_page, "secs", cpu_node, self._group, claim)
        self.secs, self.secs_entry = page, None
        if claim is not None:
            self._core.claims.prerequisite_loaded(claim, self._secs_page, page)
        self._counters.secs_in += 1
        self.secs_idle()  # unless a child follows
        return page

    def child_added(self) -> None:
        """EADD or EAUG has given the enclave a resident page."""
        if not self.children and self.secs is not None:
            self._core.unmark_reclaimable(self.secs)  # a batch that has it sees the child
        self.children += 1
        if self.children > self.peak_children:
            self.peak_children = self.children

    def child_removed(self) -> None:
        """EREMOVE has removed a resident page of the enclave; the SECS stays until reclaim."""
        self.children -= 1
        assert self.children >= 0, "more pages removed than were resident"
        self.secs_idle()

    def secs_idle(self) -> None:
        """Put a SECS without resident children on its LRU list.

        Deviation: Linux evicts a SECS with its last child and tries no second time.
        """
        secs = self.secs
        if secs is not None and not self.children and self.secs_may_leave and not secs.tracked:
            self._core.mark_reclaimable(secs)

    # --- out --------------------------------------------------------------------------------------

    def block(self, page: SgxEpcPage) -> bool:
        """EBLOCK ``page``, which no PTE maps; set ``page.blocked``.

        Returns:
            ``False``: it is not blocked; the reservation still stands.  A page whose memory has
            failed is not blocked, since EBLOCK cannot be undone and EWB would read the page.
        """
        if page.poisoned and not self._ignores_poison:
            return False
        eblock = self._leaves.eblock
        try:
            status = eblock(page.addr)
        except PageFault:
            status = Status.PG_INVLD
        except Fault:
            return False
        # BLKSTATE: an earlier try has blocked it and failed. PG_INVLD: power was lost; EWB handles
        # that.
        if status is _SUCCESS or status in (Status.BLKSTATE, Status.PG_INVLD):
            page.blocked = True
            return True
        return False

    def write(self, page: SgxEpcPage, reservation: Reservation) -> SwapEntry | None:
        """EWB; again after ETRACK and after a kick if needed.  Ends the reservation.

        The SECS is evicted with the last child.  The reclaimer frees ``page``.

        Returns:
            Where the page is now.  ``None``: it is resident, still blocked; fault handlers wait
            (``page.blocked``) until another try has evicted it, or refuse it if it is poisoned.
        """
        entry = self._evict(page, reservation, "page")
        if entry is not None:
            self.children -= 1
            assert self.children >= 0, "more pages evicted than were resident"
            if not self.children and self.secs_may_leave:
                self._evict_secs()
        return entry

    def _evict(self, page: SgxEpcPage, reservation: Reservation, kind: str) -> SwapEntry | None:
        slot, pinned = reservation.slot, reservation.pinned
        if page.poisoned:
            if self._ignores_poison:
                raise MachineCheck(f"EWB has read poisoned memory at {page.addr:#x}")
            self.cancel(reservation)
            return None
        if pinned is None:  # Defect.BACKING_FETCHED_AFTER_BLOCK: a failure loses the page
            try:
                pinned = reservation.pinned = self._file.reserve(reservation.index)
            except BackingError:
                return self._lose(page, reservation)
        result = ewb(self._leaves, page.addr, slot.addr, pinned)
        return self._concluded(page, reservation, kind, pinned, result)

    def _concluded(
        self,
        page: SgxEpcPage,
        reservation: Reservation,
        kind: str,
        pinned: Pinned,
        result: LeafResult,
        tries: int = 1,
    ) -> SwapEntry | None:
        """The last of ``tries`` EWBs has ended with ``result``: do what is left of an eviction."""
        index, slot = reservation.index, reservation.slot
        if result is _NOT_TRACKED and tries == 1:
            result, tries = self._track(page, slot, pinned)
        self.ewbs += tries
        counters = self._counters
        if self._core.tracer is not None:
            self._core.tracer(Evicted(page.addr, kind, index, tries, result_name(result)))
        if slot.accepted(result):
            if tries == 1:
                counters.ewb_first += 1
            elif tries == 2:
                counters.ewb_second += 1
            else:
                counters.ewb_third += 1
            return self.written(reservation)
        if vanished(result, page.addr):
            # Power was lost: the EPCM entry is invalid, and the content is lost.
            return self._lose(page, reservation)
        counters.ewb_failed += 1
        if self._leaks_slots:
            slot.page.pins -= 1
            self._file.cancel(pinned)
        else:
            self.cancel(reservation)
        if self._frees_failed:
            counters.lost += 1
            return SwapEntry(index, None)
        return None

    def _lose(self, page: SgxEpcPage, reservation: Reservation) -> SwapEntry:
        self.cancel(reservation)
        self._counters.lost += 1
        return SwapEntry(reservation.index, None)

    def _track(self, page: SgxEpcPage, slot: VaSlot, pinned: Pinned) -> tuple[LeafResult, int]:
        """EWB once or twice more; return how the last one ended, and the number of EWBs in all."""
        leaves, slot_addr = self._leaves, slot.addr
        self._start_epoch()
        result = ewb(leaves, page.addr, slot_addr, pinned)
        if result is not _NOT_TRACKED:
            return result, 2
        # Only after ETRACK: a processor that enters in between is in the new epoch already.
        self._kick_cpus()
        return ewb(leaves, page.addr, slot_addr, pinned), 3

    def _start_epoch(self) -> None:
        """ETRACK; a previous tracking cycle that is incomplete is completed first.

        Deviation: Linux warns on PREV_TRK_INCMPL and executes a third EWB, which fails, because the
        epoch in which the page was blocked has not ended.
        """
        result = self._etrack()
        if result is Status.PREV_TRK_INCMPL:
            self._counters.prev_trk_incmpl += 1
            self._kick_cpus()
            self._etrack()

    def _etrack(self) -> LeafResult:
        secs = self.secs
        assert secs is not None, "the enclave has resident pages but no SECS"
        self._counters.etrack += 1
        self.etracks += 1
        result: LeafResult
        try:
            result = self._leaves.etrack(secs.addr)
        except Fault as fault:
            result = fault
        if self._core.tracer is not None:
            self._core.tracer(TrackingRound(secs.addr, "etrack", result_name(result)))
        return result

    def _kick_cpus(self) -> None:
        self._counters.kicks += 1
        if self._core.tracer is not None:
            secs = self.secs.addr if self.secs is not None else 0
            self._core.tracer(TrackingRound(secs, "ipi", "done"))
        self._kick()

    def _evict_secs(self) -> None:
        """Evict the SECS after its last child; the VA pages may be evicted then."""
        secs = self.secs
        assert secs is not None, "the enclave had resident pages but no SECS"
        if secs.kept:
            self.secs_idle()
            return
        if not self._core.unmark_reclaimable(secs):
            return  # a batch has it, and evicts it or puts it back on its list
        reservation = self.reserve_secs()
        if reservation is not None and self.write_secs(reservation):
            self._core.remove(secs)
        else:
            self.secs_idle()

    def reserve_secs(self) -> Reservation | None:
        """As :meth:`prepare`, for the SECS."""
        return self.prepare(self._pages)

    def write_secs(self, reservation: Reservation) -> bool:
        """EWB the SECS, which has no resident child; ends the reservation.

        Returns:
            Whether it was evicted; then the caller frees its EPC page.
        """
        assert self.secs is not None, "the SECS to be evicted is not resident"
        entry = self._evict(self.secs, reservation, "secs")
        if entry is None:
            return False
        self.secs, self.secs_entry = None, entry
        self._counters.secs_out += 1
        self.va.mark_all_reclaimable()
        return True

    # --- in ---------------------------------------------------------------------------------------

    def load(
        self,
        entry: SwapEntry,
        owner: Reclaimable | None,
        *,
        kind: str = "reg",
        cpu_node: int = 0,
        group: Group | None = None,
        claim: Claim | None = None,
    ) -> SgxEpcPage:
        """ELDU, after the SECS and the VA page; return the EPC page.

        ``entry`` is used up.  The caller records the EPC page, then marks it reclaimable.  Never
        reclaims.  ``claim``, of the thread that needs the page, records the loads.

        Raises:
            EpcBusy: no EPC page now; pages that were loaded first stay.
            NoEpc: no EPC page at all.
            LoadFailed: ELDU refused; ``entry`` stays valid and a later try may succeed.
        """
        if entry.slot is None:
            raise LoadFailed("lost")
        secs = self.secs
        if secs is None or self._secs_page.reservation is not None:
            secs = self.load_secs(cpu_node=cpu_node, claim=claim)
        linaddr = self._base + entry.index * PAGE_BYTES
        page = self._eldu(entry, linaddr, secs.addr, owner, kind, cpu_node, group, claim)
        self.child_added()
        if claim is not None and owner is not None:
            self._core.claims.loaded(claim, owner, page)
        return page

    def _eldu(
        self,
        entry: SwapEntry,
        linaddr: int,
        secs: int,
        owner: Reclaimable | None,
        kind: str,
        cpu_node: int,
        group: Group | None,
        claim: Claim | None,
    ) -> SgxEpcPage:
        core = self._core
        slot = self.load_va_page(entry, claim)
        page = core.alloc(
            owner, reclaim=False, group=group, kind=kind, cpu_node=cpu_node, claim=claim
        )
        try:
            pinned = self.pin_backing(entry)
        except LoadFailed:
            core.free(page)
            raise
        result = eldu(self._leaves, page.addr, slot.addr, pinned, linaddr, secs)
        if core.tracer is not None:
            core.tracer(Loaded(page.addr, kind, entry.index, result_name(result)))
        if result is not _SUCCESS:
            raise self._refused(page, pinned, result)
        self.loaded(slot, pinned)
        return page

    def _refused(self, page: SgxEpcPage, pinned: Pinned, result: LeafResult) -> LoadFailed:
        """ELDU has refused: free the EPC page; return what the load ends with."""
        if self._discards_failed:
            self._file.loaded(pinned)
            self._counters.eldu_failed += 1
        else:
            self.not_loaded(pinned)
        self._core.remove(page)
        return LoadFailed(result_name(result))

    # --- the end ----------------------------------------------------------------------------------

    def destroy(self) -> None:
        """As :meth:`SwapSpace.destroy`, after the SECS.

        Source:
            ``sgx_encl_release()``, encl.c.
        """
        secs = self.secs
        if secs is not None:
            unmarked = self._core.unmark_reclaimable(secs)
            assert unmarked, "an enclave is destroyed while a batch has its SECS"
            self._core.remove(secs)
            self.secs = None
        super().destroy()

    def check_invariants(self) -> None:
        """As :meth:`SwapSpace.check_invariants`; and resident pages have a resident SECS."""
        super().check_invariants()
        assert self.secs is not None or not self.children, (
            f"{self.children} resident pages, but the SECS is evicted"
        )
