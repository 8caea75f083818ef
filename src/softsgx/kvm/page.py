"""One page of a virtual EPC, to the reclaimer a page like any other.

Its calls decide *whether* the page leaves; :mod:`softsgx.kvm.motion` does it.

Source:
    ``sgx_virt_reclaimer_{get_ref,put_ref,age,get_backing,block,write}()``, virt.c of
    intel/kvm-sgx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.arch import PAGE_BYTES
from softsgx.kvm import motion
from softsgx.kvm.events import PageKept
from softsgx.kvm.fate import Evicted, Fate
from softsgx.paging import EpcPage, Reservation

if TYPE_CHECKING:
    from softsgx.kvm.vepc import Vepc

__all__ = ["VepcPage"]


class VepcPage:
    """One page of a virtual EPC that was ever touched; ``Monitor.lock`` protects it.

    Attributes:
        vepc: what it is a page of.
        index: which one.
        epc: the EPC page that it is in; ``None`` before its first use and while it is evicted.
        evicted: where it is while it is evicted; else ``None``.
        promised: there is room for its version.
        reclaiming: a batch has it: nobody may map it.
        pins: instructions that wait for it and for other pages at once.
        evicted_children: if it holds a SECS, pages of that enclave that the host has evicted;
            VIRTCHILDCNT of the SECS is the same number, but for ``owed``.
        owed: how much of VIRTCHILDCNT is to be subtracted when the SECS is loaded.
    """

    __slots__ = (
        "epc",
        "evicted",
        "evicted_children",
        "fate",
        "guest_blocked",
        "index",
        "owed",
        "pins",
        "promised",
        "reclaiming",
        "reservation",
        "secs",
        "vepc",
    )

    def __init__(self, vepc: Vepc, index: int) -> None:
        self.vepc, self.index = vepc, index
        self.epc: EpcPage | None = None
        self.evicted: Evicted | None = None
        self.promised = self.reclaiming = False
        self.pins = self.evicted_children = self.owed = 0
        # Of the eviction that is going on.
        self.reservation: Reservation | None = None
        self.fate: Fate | None = None
        self.secs: VepcPage | None = None
        self.guest_blocked = False

    def __repr__(self) -> str:
        where = "resident" if self.epc else "evicted" if self.evicted else "untouched"
        return f"<{self.vepc.monitor.name} vEPC page {self.gpa:#x}, {where}>"

    @property
    def gpa(self) -> int:
        """Its guest-physical address, which is its enclaves' ENCLAVECONTEXT too."""
        return self.vepc.base + self.index * PAGE_BYTES

    @property
    def stuck(self) -> bool:
        """Whether the host has blocked it, so that it must leave before the guest may use it."""
        return self.epc is not None and self.epc.blocked

    # --- Reclaimable ----------------------------------------------------------------------------

    def get(self) -> bool:
        """Keep the virtual EPC; ``False`` when it is closed or its guest has stopped."""
        return self.vepc.monitor.stopped is None and self.vepc.get()

    def put(self) -> None:
        """Give it back."""
        self.vepc.put()
        self.vepc.monitor.reap()

    def age(self) -> bool:
        """Return whether no processor of the guest used it since the last call."""
        return not self.pins and not self.vepc.test_and_clear_accessed(self.index)

    def prepare(self) -> bool:
        """Reserve backing and a VA slot, unless the page is spoken for."""
        monitor, counters = self.vepc.monitor, self.vepc.monitor.counters
        with monitor.lock:
            if self.epc is None or self.reclaiming or monitor.stopped is not None:
                return False
            if self.pins:
                counters.kept_pinned += 1
                self.tell_kept("pinned")
                return False
            if not monitor.may_shrink():
                counters.kept_ballast += 1
                self.tell_kept("ballast")
                return False
            self.reservation = self.vepc.swap.prepare(self.index)
            if self.reservation is None:
                return False
            self.reclaiming = True
            monitor.leaving += 1
            return True

    def block(self) -> bool:
        """Take it out of the guest's reach, see what it is, and EBLOCK it."""
        monitor = self.vepc.monitor
        with monitor.lock:
            # Before ERDINFO, so that the guest cannot change what that says.
            self.vepc.unmap(self)
        monitor.quiesce()
        with monitor.lock, monitor.working():
            if monitor.stopped is None and motion.block(self):
                return True
            self.stay()
            return False

    def write(self) -> bool:
        """EWB, or nothing where the guest has no use for the page."""
        monitor = self.vepc.monitor
        with monitor.lock, monitor.working():
            left = monitor.stopped is None and motion.write_out(self)
            if left:
                self.moved()
            else:
                self.stay()
            return left

    # --- how an eviction ends; the lock is held -------------------------------------------------

    def stay(self) -> None:
        """It does not leave after all."""
        assert self.reservation is not None, f"{self!r} was not prepared"
        self.vepc.swap.cancel(self.reservation)
        self.moved()

    def moved(self) -> None:
        """The eviction has ended."""
        monitor = self.vepc.monitor
        self.reservation = self.fate = self.secs = None
        self.guest_blocked = self.reclaiming = False
        monitor.leaving -= 1
        monitor.changed.notify_all()

    def tell_kept(self, reason: str) -> None:
        """Say that it is not reclaimed now."""
        monitor = self.vepc.monitor
        if monitor.tracer is not None:
            monitor.tracer(PageKept(monitor.name, self.gpa, reason))
