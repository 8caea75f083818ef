"""One page of a virtual EPC, as the reclaimer sees it.

Its calls decide *whether* the page is evicted; :mod:`softsgx.kvm.eviction` evicts it.

Source:
    ``sgx_virt_reclaimer_{get_ref,put_ref,age,get_backing,block,write}()``, virt.c of
    intel/kvm-sgx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.arch import PAGE_BYTES
from softsgx.kvm import eviction
from softsgx.kvm.events import PageKept
from softsgx.kvm.evicted_page import EvictedPage, PageKind
from softsgx.paging import Reservation, SgxEpcPage

if TYPE_CHECKING:
    from softsgx.kvm.vepc import Vepc

__all__ = ["VepcPage"]


class VepcPage:
    """One page of a virtual EPC that the guest has touched; ``Monitor.lock`` protects it.

    Attributes:
        vepc: its virtual EPC.
        index: its index there.
        epc: the EPC page that it is in; ``None`` before its first use and while it is evicted.
        evicted: its record while it is evicted; otherwise ``None``.
        promised: its virtual EPC has a VA slot for its version.
        being_reclaimed: the host is evicting it: it must not be mapped.
        pins: instructions of the guest that need it together with other pages.
        evicted_children: if it holds a SECS, pages of that enclave that the host has evicted;
            VIRTCHILDCNT of the SECS is this plus ``deferred_edecvirtchild``.
        deferred_edecvirtchild: EDECVIRTCHILDs to execute when the SECS is loaded.
        reservation, kind, secs, guest_blocked: of the current eviction: backing and VA slot; the
            page's kind; the page with its SECS; whether the guest has blocked it.
    """

    __slots__ = (
        "being_reclaimed",
        "deferred_edecvirtchild",
        "epc",
        "evicted",
        "evicted_children",
        "guest_blocked",
        "index",
        "kind",
        "pins",
        "promised",
        "reservation",
        "secs",
        "vepc",
    )

    def __init__(self, vepc: Vepc, index: int) -> None:
        self.vepc, self.index = vepc, index
        self.epc: SgxEpcPage | None = None
        self.evicted: EvictedPage | None = None
        self.promised = self.being_reclaimed = False
        self.pins = self.evicted_children = self.deferred_edecvirtchild = 0
        self.reservation: Reservation | None = None
        self.kind: PageKind | None = None
        self.secs: VepcPage | None = None
        self.guest_blocked = False

    def __repr__(self) -> str:
        where = "resident" if self.epc else "evicted" if self.evicted else "untouched"
        return f"<{self.vepc.monitor.name} vEPC page {self.gpa:#x}, {where}>"

    @property
    def gpa(self) -> int:
        """Its guest-physical address; of a SECS, also the ENCLAVECONTEXT of its enclave."""
        return self.vepc.base + self.index * PAGE_BYTES

    @property
    def blocked_by_host(self) -> bool:
        """Whether the host has blocked it, so that it must be evicted before the guest uses it."""
        return self.epc is not None and self.epc.blocked

    # --- Reclaimable ----------------------------------------------------------------------------

    def get(self) -> bool:
        """Pin the virtual EPC; ``False`` when it is closed or its guest has stopped."""
        return self.vepc.monitor.stopped is None and self.vepc.get()

    def put(self) -> None:
        """Unpin it."""
        self.vepc.put()
        self.vepc.monitor.reap()

    def age(self) -> bool:
        """Return whether no processor of the guest used it since the last call."""
        return not self.pins and not self.vepc.test_and_clear_accessed(self.index)

    def prepare(self) -> bool:
        """Reserve backing and a VA slot, unless the page is pinned or belongs to the ballast."""
        monitor, counters = self.vepc.monitor, self.vepc.monitor.counters
        with monitor.lock:
            if self.epc is None or self.being_reclaimed or monitor.stopped is not None:
                return False
            if self.pins:
                counters.kept_pinned += 1
                self.trace_kept("pinned")
                return False
            if not monitor.above_ballast():
                counters.kept_ballast += 1
                self.trace_kept("ballast")
                return False
            self.reservation = self.vepc.swap.prepare(self.index)
            if self.reservation is None:
                return False
            self.being_reclaimed = True
            monitor.evicting += 1
            return True

    def block(self) -> bool:
        """Unmap it from the guest, find out its kind, and EBLOCK it."""
        monitor = self.vepc.monitor
        with monitor.lock:
            # Before ERDINFO, so that the guest cannot change what that returns.
            self.vepc.unmap(self)
        monitor.quiesce()
        with monitor.lock, monitor.host_working():
            if monitor.stopped is None and eviction.block(self):
                return True
            self.cancel_eviction()
            return False

    def write(self) -> bool:
        """Execute EWB, unless the guest does not use the page."""
        monitor = self.vepc.monitor
        with monitor.lock, monitor.host_working():
            evicted = monitor.stopped is None and eviction.write(self)
            if evicted:
                self.end_eviction()
            else:
                self.cancel_eviction()
            return evicted

    # --- the end of an eviction; the lock is held -----------------------------------------------

    def cancel_eviction(self) -> None:
        """Release the reservation: the page stays resident."""
        assert self.reservation is not None, f"{self!r} was not prepared"
        self.vepc.swap.cancel(self.reservation)
        self.end_eviction()

    def end_eviction(self) -> None:
        """End the eviction, successful or not: wake the faults that wait for it."""
        monitor = self.vepc.monitor
        self.reservation = self.kind = self.secs = None
        self.guest_blocked = self.being_reclaimed = False
        monitor.evicting -= 1
        monitor.changed.notify_all()

    def trace_kept(self, reason: str) -> None:
        """Trace why it is not reclaimed now."""
        monitor = self.vepc.monitor
        if monitor.tracer is not None:
            monitor.tracer(PageKept(monitor.name, self.gpa, reason))
