"""What the host's memory management knows of one virtual machine.

Linux has this in two places, the VMM's address space and KVM; here it is one object.  It owns the
lock under which the host works on the machine's virtual EPC, and knows how to stop its processors.

Lock order: ``lock``, then what the core takes, then ``cpu.busy`` and the gate's own lock, which are
innermost.  An instruction of the guest holds its ``busy``, or stands inside the gate, for no longer
than it executes: a VM exit ends it, and only then does anybody take ``lock``.

Invariants: while ``host_work`` is odd the host moves a page of this machine's EPC, and whatever it
does to an enclave's tracking is complete when it is even again; ``resident`` is the number of its
virtual EPC pages that are in the EPC.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from softsgx.arch import Status
from softsgx.hw import Fault, GeneralProtection, LogicalProcessor, interrupt
from softsgx.kvm.events import GuestStopped
from softsgx.paging import EpcCore, Group
from softsgx.runtime import Runtime
from softsgx.trace import Tracer

if TYPE_CHECKING:
    from softsgx.kvm.page import VepcPage
    from softsgx.kvm.vepc import Vepc

__all__ = ["Gate", "GuestCounters", "Monitor"]

_PATIENCE = 1000
_BUSY = frozenset({Status.EPC_PAGE_CONFLICT, Status.ENTRYEPOCH_LOCKED})


@dataclass(slots=True)
class GuestCounters:
    """What happened to one guest since it was made; only ever grows.

    Attributes:
        violations: second-level faults in the EPC.
        fresh, loaded: of them, pages that were never used before, and that came back.
        evicted: pages that left, of which ``secs_out``, ``va_out`` and ``unused_out`` were SECS
            and VA pages of the guest and pages it did not use; the rest were enclaves' pages.
        guest_blocked: evicted pages that the guest itself had blocked.
        kept_secs, kept_pinned, kept_ballast, kept_failed: reclaim gave up on a page: a SECS with
            children in the EPC, a page that an instruction waits for, the ballast, a failed leaf.
        secs_in: SECS pages loaded.
        etrackc: tracking cycles that the host began; ``prev_incomplete`` of them in vain at first.
        kicks: rounds of interrupts to the guest's processors.
        host_waits: leaves of the host that a leaf of the guest was in the way of.
        again: leaves of the guest that were executed again, since the host was in the way.
        reflected: conflicts among the guest's own leaves.
        trapped: ECREATE and EINIT that the host looked at.
        lost: pages that were in the EPC or evicted when the machine lost power.
    """

    violations: int = 0
    fresh: int = 0
    loaded: int = 0
    evicted: int = 0
    secs_out: int = 0
    secs_in: int = 0
    va_out: int = 0
    unused_out: int = 0
    guest_blocked: int = 0
    kept_secs: int = 0
    kept_pinned: int = 0
    kept_ballast: int = 0
    kept_failed: int = 0
    etrackc: int = 0
    prev_incomplete: int = 0
    kicks: int = 0
    host_waits: int = 0
    again: int = 0
    reflected: int = 0
    trapped: int = 0
    lost: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return all of them by name, a copy."""
        return asdict(self)


class Gate:
    """Who is between the translation of operands and the end of a leaf.

    On silicon the shoot-down after an entry was removed waits for instructions; here
    :meth:`drain` does.  It costs nothing where tasks do not interleave within a leaf.
    """

    def __init__(self, runtime: Runtime, name: str) -> None:
        self._on = runtime.interleaves
        self._lock = runtime.lock(f"{name}.gate")
        self._left = runtime.condition(self._lock)
        self._running: set[int] = set()
        self._next = 0

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Execute a leaf."""
        if not self._on:
            yield
            return
        with self._lock:
            ticket = self._next
            self._next += 1
            self._running.add(ticket)
        try:
            yield
        finally:
            with self._lock:
                self._running.remove(ticket)
                self._left.notify_all()

    def drain(self) -> None:
        """Wait until every leaf that has begun by now has ended."""
        if not self._on:
            return
        with self._lock:
            last = self._next
            while any(ticket < last for ticket in self._running):
                self._left.wait()


class Monitor:
    """One virtual machine, as far as reclaiming its EPC goes.

    Args:
        core: the host's EPC core.
        name: for people and schedules.
        group: who is charged for its EPC; the root when ``None``.
        ballast_pages: EPC pages that are never taken from it once it has them.
        tracer: receives events.

    Attributes:
        lock: protects its virtual EPC: pages, mappings, counts.
        changed: something that a fault may have waited for has happened.
        stopped: why it cannot go on; ``None`` while it can.
        paused: its processors execute nothing.
        resident: virtual EPC pages that are in the EPC.
        leaving: of them, how many a batch of reclaim is about to take.
        host_work: see the module.
        vepcs: its open virtual EPCs.
        cpus: its processors.
    """

    def __init__(
        self,
        core: EpcCore,
        name: str,
        *,
        group: Group | None = None,
        ballast_pages: int = 0,
        tracer: Tracer | None = None,
    ) -> None:
        runtime = core.runtime
        self.host, self.runtime, self.name, self.tracer = core, runtime, name, tracer
        self.group, self.ballast_pages = group, ballast_pages
        self.counters = GuestCounters()
        self.lock = runtime.lock(f"{name}.vepc")
        self.changed = runtime.condition(self.lock)
        self.gate = Gate(runtime, name)
        self.stopped: str | None = None
        self.paused = False
        self.resident = self.leaving = 0
        self.host_work = 0
        self.vepcs: list[Vepc] = []
        self.cpus: Sequence[LogicalProcessor] = ()

    def __repr__(self) -> str:
        return f"<guest {self.name}: {self.resident} EPC pages>"

    @property
    def alive(self) -> bool:
        """Whether it can go on."""
        return self.stopped is None

    # --- stopping processors --------------------------------------------------------------------

    def quiesce(self) -> None:
        """Wait until no instruction that has used an entry which is gone still executes."""
        if not self.runtime.interleaves:
            return
        self.gate.drain()
        for cpu in self.cpus:
            with cpu.busy:
                pass

    def kick(self) -> None:
        """Interrupt every processor: a VM exit, and an asynchronous exit of whoever is inside."""
        self.counters.kicks += 1
        for cpu in self.cpus:
            if not interrupt(cpu):
                with cpu.busy:
                    cpu.flush_tlb()

    # --- leaves of the host ---------------------------------------------------------------------

    @contextmanager
    def working(self) -> Iterator[None]:
        """Move a page; ``lock`` is held all the time."""
        assert not self.host_work % 2, f"{self.name}: two work on its EPC at once"
        self.host_work += 1
        try:
            yield
        finally:
            self.host_work += 1

    def leaf(self, call: Callable[[], Status]) -> Status | Fault:
        """Execute a leaf of the host on this machine's EPC, :meth:`working`.

        A leaf of the guest that is in its way is waited for: only a SECS page and its tracking can
        be in the use of both, since all else is out of the guest's reach by then.

        Returns:
            Its code, or the fault.
        """
        assert self.host_work % 2, f"{self.name}: a leaf of the host that nobody may know of"
        for _try in range(_PATIENCE):
            ending: Status | Fault
            try:
                ending = call()
            except Fault as fault:
                ending = fault
            if ending not in _BUSY and not isinstance(ending, GeneralProtection):
                return ending
            self.counters.host_waits += 1
            self.quiesce()
            if not self.runtime.interleaves:
                break  # nobody else executes, so nothing will change
        return ending

    def host_may_be_in_the_way(self, before: int) -> bool:
        """Return whether the host has worked since ``host_work`` was ``before``."""
        return before % 2 == 1 or self.host_work != before

    # --- pages ----------------------------------------------------------------------------------

    def page_at(self, gpa: int) -> VepcPage | None:
        """Return the virtual EPC page at a guest-physical address that is or was in use."""
        for vepc in self.vepcs:
            page = vepc.page_at(gpa)
            if page is not None:
                return page
        return None

    def may_shrink(self) -> bool:
        """Return whether one more page can be taken: the ballast stays."""
        return self.resident - self.leaving > self.ballast_pages

    # --- the end --------------------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """It cannot go on, and all its EPC is given back; others are not concerned.

        May be called whatever the caller holds: if ``lock`` is not free, a task waits for it.
        """
        if self.stopped is not None:
            return
        self.stopped = reason
        if self.tracer is not None:
            self.tracer(GuestStopped(self.name, reason))
        self.reap()

    def reap(self) -> None:
        """Free what a stopped machine has; never waits: if ``lock`` is not free, a task does."""
        if self.stopped is None:
            return
        if not self.lock.try_acquire():
            self.runtime.spawn(self._reap_later, f"{self.name}.reap", daemon=True)
            return
        try:
            self._free_all()
        finally:
            self.lock.release()

    def _reap_later(self) -> None:
        with self.lock:
            self._free_all()

    def _free_all(self) -> None:
        self.paused = False
        self.changed.notify_all()
        for vepc in self.vepcs:
            vepc.unmap_all()
        self.kick()
        with self.working():
            for _pass in range(2):  # a SECS may have children in another one
                for vepc in self.vepcs:
                    vepc.free_all()
