"""The host's view of one virtual machine: the lock of its virtual EPC, and stopping its processors.

On Linux this state is in two places, the VMM's address space and KVM; here it is one object.

Lock order: ``lock``, then the core's locks, then ``cpu.busy`` and the gate's lock, which are
innermost.  An instruction of the guest holds ``cpu.busy``, or is inside the gate, only while it
executes: a VM exit ends it, and ``lock`` is taken after that.

Invariants: while ``host_work`` is odd the host evicts or loads a page of this machine, and any
tracking cycle that it has begun is complete when ``host_work`` is even again; ``resident`` is the
number of virtual EPC pages of the machine that are in the EPC.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from softsgx.arch import Status
from softsgx.hw import Fault, GeneralProtection, LogicalProcessor, interrupt
from softsgx.kvm.events import GuestStopped
from softsgx.paging import EpcCore, Group, LeafResult
from softsgx.runtime import Runtime
from softsgx.trace import Tracer

if TYPE_CHECKING:
    from softsgx.kvm.page import VepcPage
    from softsgx.kvm.vepc import Vepc

__all__ = ["CONFLICT_CODES", "Gate", "GuestCounters", "Monitor"]

_MOST_TRIES = 1000
CONFLICT_CODES = frozenset({Status.EPC_PAGE_CONFLICT, Status.ENTRYEPOCH_LOCKED})
"""Codes of a leaf that was in conflict with another leaf at the same page or enclave."""


@dataclass(slots=True)
class GuestCounters:
    """Events of one guest since it was made; each number only grows.

    Attributes:
        violations: EPT violations in the EPC.
        fresh, loaded: pages taken for the first time; pages loaded after an eviction.
        evicted: pages evicted, of which ``secs_out``, ``va_out`` and ``unused_out`` were SECS
            and VA pages of the guest and pages it did not use; the rest were enclave pages.
        guest_blocked: evicted pages that the guest itself had blocked.
        kept_secs, kept_pinned, kept_ballast, kept_failed: pages that reclaim left resident: a SECS
            with children in the EPC, a page that an instruction needs, the ballast, a failed leaf.
        secs_in: SECS pages loaded.
        etrackc: tracking cycles that the host began; ``prev_incomplete``: tries at which the
            previous cycle was not complete.
        kicks: rounds of interrupts to the guest's processors.
        host_waits: times that a leaf of the host had to wait for a leaf of the guest.
        again: leaves that the guest executed again, since the host worked on its EPC.
        reflected: conflicts among the guest's own leaves.
        trapped: ECREATEs and EINITs that the host trapped.
        lost: pages that were resident or evicted when the machine lost power.
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
        """Return a copy of the counters by name."""
        return asdict(self)


class Gate:
    """Counts the leaves of a guest that are executing: their operands may be translated already.

    On silicon a TLB shoot-down waits for the instruction that executes; here :meth:`drain` waits
    for the leaves.  Both methods do nothing if tasks do not interleave within a leaf.
    """

    def __init__(self, runtime: Runtime, name: str) -> None:
        self._needed = runtime.interleaves
        self._lock = runtime.lock(f"{name}.gate")
        self._left = runtime.condition(self._lock)
        self._running: set[int] = set()
        self._next = 0

    @contextmanager
    def executing(self) -> Iterator[None]:
        """Hold this while a leaf executes."""
        if not self._needed:
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
        """Wait until every leaf that executes now has ended."""
        if not self._needed:
            return
        with self._lock:
            last = self._next
            while any(ticket < last for ticket in self._running):
                self._left.wait()


class Monitor:
    """One virtual machine: its virtual EPC, its processors, whether it runs.

    Args:
        core: the host's EPC core.
        name: in messages and schedules.
        group: the group that its EPC is charged to; ``None``: the root.
        ballast_pages: resident pages that the host never evicts.
        tracer: receives events.

    Attributes:
        lock: protects its virtual EPC: pages, mappings, counts.
        host: the host's EPC core.
        changed: notified when an eviction has ended, and when the guest is stopped or continues.
        stopped: why it was stopped; ``None`` while it runs.
        paused: its processors execute nothing.
        resident: virtual EPC pages that are in the EPC.
        evicting: how many of them the host is evicting.
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
        self.resident = self.evicting = 0
        self.host_work = 0
        self.vepcs: list[Vepc] = []
        self.cpus: Sequence[LogicalProcessor] = ()

    def __repr__(self) -> str:
        return f"<guest {self.name}: {self.resident} EPC pages>"

    @property
    def alive(self) -> bool:
        """Whether it was not stopped."""
        return self.stopped is None

    # --- stopping processors --------------------------------------------------------------------

    def quiesce(self) -> None:
        """Wait for the instructions that may use an entry that was removed."""
        if not self.runtime.interleaves:
            return
        self.gate.drain()
        for cpu in self.cpus:
            with cpu.busy:
                pass

    def kick(self) -> None:
        """Interrupt every processor: a VM exit, which is an asynchronous exit inside an enclave."""
        self.counters.kicks += 1
        for cpu in self.cpus:
            if not interrupt(cpu):
                with cpu.busy:
                    cpu.flush_tlb()

    # --- leaves of the host ---------------------------------------------------------------------

    @contextmanager
    def host_working(self) -> Iterator[None]:
        """Hold this while the host evicts or loads a page; ``lock`` is held all the time."""
        assert not self.host_work % 2, f"{self.name}: two tasks of the host work on its EPC"
        self.host_work += 1
        try:
            yield
        finally:
            self.host_work += 1

    def host_leaf(self, call: Callable[[], Status]) -> LeafResult:
        """Execute a leaf of the host on this machine's EPC, while :meth:`host_working`.

        It waits for a leaf of the guest that conflicts with it.  Such conflicts arise only at a
        SECS page and its tracking, since the guest cannot reach the page itself.

        Returns:
            Its code, or the fault.
        """
        assert self.host_work % 2, f"{self.name}: the guest would reflect a conflict with the host"
        for _try in range(_MOST_TRIES):
            result: LeafResult
            try:
                result = call()
            except Fault as fault:
                result = fault
            if result not in CONFLICT_CODES and not isinstance(result, GeneralProtection):
                return result
            self.counters.host_waits += 1
            self.quiesce()
            if not self.runtime.interleaves:
                break  # no other task runs, so another try would end in the same way
        return result

    def host_worked_since(self, before: int) -> bool:
        """Return whether the host has worked since ``host_work`` was ``before``."""
        return before % 2 == 1 or self.host_work != before

    # --- pages ----------------------------------------------------------------------------------

    def page_at(self, gpa: int) -> VepcPage | None:
        """Return the virtual EPC page at a guest-physical address, if the guest has touched it."""
        for vepc in self.vepcs:
            page = vepc.page_at(gpa)
            if page is not None:
                return page
        return None

    def above_ballast(self) -> bool:
        """Return whether one more page can be evicted: pages of the ballast cannot."""
        return self.resident - self.evicting > self.ballast_pages

    # --- the end --------------------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """Stop the guest and release all its EPC; other guests continue.

        May be called with any lock held: if ``lock`` is not free, a separate task waits for it.
        """
        if self.stopped is not None:
            return
        self.stopped = reason
        if self.tracer is not None:
            self.tracer(GuestStopped(self.name, reason))
        self.reap()

    def reap(self) -> None:
        """Free the EPC of a stopped guest.

        Never waits: if ``lock`` is not free, a separate task waits for it.
        """
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
        with self.host_working():
            for _pass in range(2):  # a SECS may have children in another virtual EPC
                for vepc in self.vepcs:
                    vepc.free_all()
