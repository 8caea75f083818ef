"""A page of an enclave, as the reclaimer sees it.

Source:
    sgx_reclaim_pages() and its callees, main.c; struct sgx_encl_page, encl.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.arch import PAGE_SHIFT, PageType
from softsgx.defects import Defect
from softsgx.paging import Reservation, SgxEpcPage, SwapEntry

if TYPE_CHECKING:
    from softsgx.driver.enclave import Enclave

__all__ = ["LABELS", "EnclavePage"]

LABELS = {kind: kind.name.lower() for kind in PageType}
"""What the core's counters call an EPC page of each type."""


class EnclavePage:
    """One page of an enclave, resident or not: ``struct sgx_encl_page``.

    Attributes:
        enclave: whose page it is.
        index: page index in the enclave.
        max_prot: the most a mapping may allow, PROT_*; only REG to TCS changes it.
        kind: the page type as the driver knows it.
        epc: where it is, ``None`` while it is evicted.
        entry: where it was written to, ``None`` while it is resident.
        reclaiming: a batch is about to evict it: BEING_RECLAIMED.
        busy: an ioctl has let go of the lock in the middle of changing it.
    """

    __slots__ = (
        "busy",
        "enclave",
        "entry",
        "epc",
        "index",
        "kind",
        "max_prot",
        "reclaiming",
        "reservation",
    )

    def __init__(self, enclave: Enclave, index: int, max_prot: int, kind: PageType) -> None:
        self.enclave, self.index = enclave, index
        self.max_prot, self.kind = max_prot, kind
        self.epc: SgxEpcPage | None = None
        self.entry: SwapEntry | None = None
        self.reservation: Reservation | None = None
        self.reclaiming = self.busy = False

    @property
    def linaddr(self) -> int:
        """Its linear address."""
        return self.enclave.base + (self.index << PAGE_SHIFT)

    @property
    def in_motion(self) -> bool:
        """Whether faults must wait: it is being evicted or changed, or blocked for good."""
        return self.reclaiming or self.busy or (self.epc is not None and self.epc.blocked)

    def __repr__(self) -> str:
        return f"<page {self.linaddr:#x} of {self.enclave!r}>"

    # --- Reclaimable ----------------------------------------------------------------------------

    def get(self) -> bool:
        """Pin the enclave."""
        return self.enclave.get()

    def put(self) -> None:
        """Unpin it; may destroy it."""
        self.enclave.put()

    def age(self) -> bool:
        """Test and clear the accessed bits in every address space."""
        enclave = self.enclave
        return enclave.dead or not enclave.test_and_clear_accessed(self)

    def prepare(self) -> bool:
        """Reserve backing and mark the page, in one critical section."""
        enclave = self.enclave
        at_once = Defect.BACKING_RESERVED_BEFORE_MARK not in enclave.driver.defects
        enclave.lock.acquire()
        try:
            if not enclave.dead:
                self.reservation = enclave.swap.prepare(self.index, announced=at_once)
                if self.reservation is None:
                    return False
            self.reclaiming = at_once
        finally:
            enclave.lock.release()
        if not at_once:
            self._mark_late()
        return True

    def _mark_late(self) -> None:
        """B2: what was reserved may have been given back before the page was marked."""
        enclave = self.enclave
        with enclave.lock:
            if self.reservation is not None:
                enclave.swap.announce(self.reservation)
            self.reclaiming = True

    def block(self) -> bool:
        """Remove every PTE, then EBLOCK."""
        enclave = self.enclave
        enclave.zap(self)
        enclave.lock.acquire()
        try:
            if enclave.dead:
                return True
            assert self.epc is not None and self.reservation is not None, f"{self!r} not prepared"
            if enclave.swap.block(self.epc):
                return True
            enclave.swap.cancel(self.reservation)
            self.reservation = None
            self.reclaiming = False
            if enclave.waiting:
                enclave.changed.notify_all()
            return False
        finally:
            enclave.lock.release()

    def write(self) -> bool:
        """EWB; or EREMOVE, when the enclave was killed meanwhile."""
        enclave = self.enclave
        enclave.lock.acquire()
        try:
            epc, reservation = self.epc, self.reservation
            assert epc is not None, f"{self!r} in a batch is not resident"
            self.reservation = None
            if enclave.dead:
                if reservation is not None:
                    enclave.swap.cancel(reservation)
                written = enclave.discard(epc)
            else:
                assert reservation is not None, f"{self!r} has no reservation"
                entry = self.entry = enclave.swap.write(epc, reservation)
                written = entry is not None
                if written:
                    enclave.counts.evictions += 1
            if written:
                self.epc = None
            self.reclaiming = False
            if enclave.waiting:
                enclave.changed.notify_all()
            return written
        finally:
            enclave.lock.release()
