"""A page of an enclave, as the reclaimer sees it.

Source:
    sgx_reclaim_pages() and its callees, main.c; struct sgx_encl_page, encl.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.arch import PAGE_SHIFT, PageType
from softsgx.compiled import record
from softsgx.defects import Defect
from softsgx.paging import EnclaveSwap, Reservation, SgxEpcPage, SwapEntry

if TYPE_CHECKING:
    from softsgx.driver.enclave import Enclave

__all__ = ["LABELS", "EnclavePage"]

LABELS = {kind: kind.name.lower() for kind in PageType}
"""The label of an EPC page of each type in the core's counters."""


@record
class EnclavePage:
    """One page of an enclave, resident or not: ``struct sgx_encl_page``.

    Attributes:
        enclave: its enclave.
        index: page index in the enclave.
        max_prot: the PROT_* rights that a mapping may have at most; only MODIFY_TYPES from REG to
            TCS changes them.
        kind: the page type as the driver knows it.
        epc: its EPC page; ``None`` while it is evicted.
        reservation: backing and VA slot of an eviction that is prepared.
        being_reclaimed: a batch is about to evict it: SGX_ENCL_PAGE_BEING_RECLAIMED.
        touched: a fault has mapped it at some time.
    """

    __slots__ = (
        "being_reclaimed",
        "enclave",
        "epc",
        "index",
        "kind",
        "max_prot",
        "reservation",
        "touched",
    )

    def __init__(self, enclave: Enclave, index: int, max_prot: int, kind: PageType) -> None:
        self.enclave, self.index = enclave, index
        self.max_prot, self.kind = max_prot, kind
        self.epc: SgxEpcPage | None = None
        self.reservation: Reservation | None = None
        self.being_reclaimed = self.touched = False

    @property
    def swap(self) -> EnclaveSwap:
        """The enclave's swapping."""
        return self.enclave.swap

    @property
    def being_modified(self) -> bool:
        """Whether an ioctl that changes it has released the enclave's lock for a while."""
        return self in self.enclave.modified

    @being_modified.setter
    def being_modified(self, modified: bool) -> None:
        (self.enclave.modified.add if modified else self.enclave.modified.discard)(self)

    @property
    def linaddr(self) -> int:
        """Its linear address."""
        return self.enclave.base + (self.index << PAGE_SHIFT)

    @property
    def entry(self) -> SwapEntry | None:
        """Its place in backing storage while it is evicted; ``None`` while it is resident."""
        return self.swap.entries.get(self.index)

    @entry.setter
    def entry(self, entry: SwapEntry | None) -> None:
        self.swap.entries.put(self.index, entry)

    @property
    def busy(self) -> bool:
        """Whether faults must wait: it is being evicted or modified, or is blocked."""
        return (
            self.being_reclaimed
            or self.being_modified
            or (self.epc is not None and self.epc.blocked)
        )

    @property
    def unusable(self) -> bool:
        """Whether it can neither be mapped nor evicted: its memory has failed after EBLOCK."""
        epc = self.epc
        return epc is not None and epc.blocked and epc.poisoned

    def __repr__(self) -> str:
        return f"<page {self.linaddr:#x} of {self.enclave!r}>"

    # --- Reclaimable ----------------------------------------------------------------------------

    def get(self) -> bool:
        """Pin the enclave."""
        return self.enclave.get()

    def put(self) -> None:
        """Unpin the enclave; may destroy it."""
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
                self.reservation = self.swap.prepare(self.index, announced=at_once)
                if self.reservation is None:
                    return False
            self.being_reclaimed = at_once
        finally:
            enclave.lock.release()
        if not at_once:
            self._mark_late()
        return True

    def _mark_late(self) -> None:
        """Mark the page in a critical section of its own: BACKING_RESERVED_BEFORE_MARK."""
        enclave = self.enclave
        with enclave.lock:
            if self.reservation is not None:
                self.swap.announce(self.reservation)
            self.being_reclaimed = True

    def block(self) -> bool:
        """Remove every PTE, then execute EBLOCK, unless the page is poisoned by now."""
        enclave = self.enclave
        enclave.zap(self)
        enclave.lock.acquire()
        try:
            if enclave.dead:
                return True
            assert self.epc is not None and self.reservation is not None, f"{self!r} not prepared"
            if self.swap.block(self.epc):
                return True
            self.swap.cancel(self.reservation)
            self.reservation = None
            self.being_reclaimed = False
            if enclave.waiting:
                enclave.changed.notify_all()
            return False
        finally:
            enclave.lock.release()

    def write(self) -> bool:
        """Execute EWB, or EREMOVE if the enclave was killed."""
        enclave = self.enclave
        enclave.lock.acquire()
        try:
            epc, reservation = self.epc, self.reservation
            assert epc is not None, f"{self!r} in a batch is not resident"
            self.reservation = None
            if enclave.dead:
                if reservation is not None:
                    self.swap.cancel(reservation)
                written = enclave.remove_killed(epc)
            else:
                assert reservation is not None, f"{self!r} has no reservation"
                entry = self.entry = self.swap.write(epc, reservation)
                written = entry is not None
                if written:
                    enclave.counts.evictions += 1
            if written:
                self.epc = None
            self.being_reclaimed = False
            if enclave.waiting:
                enclave.changed.notify_all()
            return written
        finally:
            enclave.lock.release()
