"""Progress: a thread gets every page that its instruction needs together, however small the EPC.

An instruction completes when all pages that it touches are resident together.  When several threads
fault in a small EPC, each load may evict a page that another thread has loaded and not used yet, so
that no instruction completes.  Therefore each thread has a :class:`Claim`, which records its latest
loads.  A thread *thrashes* when it must load one of these pages again; it then joins a queue.  The
first thread of the queue *holds* the EPC until its instruction has completed:

* the reclaimer keeps the pages that it loads, as many as an instruction can touch;
* while it loads a page, the reclaimer also keeps the pages that must be loaded first (SECS, VA
  pages); afterwards they stay because the loaded page needs them;
* allocations of other threads in its group stand back, and once it has waited for a page, those in
  the group that had none: each would evict pages, and an eviction makes threads leave their
  enclaves, which then need pages to come back.

One thread holds at a time, so the number of kept pages is bounded, whatever the number of threads.
A turn ends when the engine reports that the instruction has completed (:meth:`Claims.release`),
when the thread has loaded more pages than an instruction can touch, or when another thread needs a
page and the holder has had time to execute: an engine that runs threads on real processors does not
learn of completed instructions.  How long that takes depends on the machine and on the number of
threads, so it is measured: between the pages that a holder needs in its turn, and when a thread
thrashes again whose turn has ended by time.

Deviation: Linux guarantees no progress.  Its threads can evict each other's pages without end; with
the EPC of real machines this is not seen.

Lock order: the latch is innermost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from softsgx.arch import PAGE_BYTES
from softsgx.hw import MachineConfig
from softsgx.paging.counters import Counters
from softsgx.paging.page import SgxEpcPage
from softsgx.runtime import Runtime

if TYPE_CHECKING:
    from softsgx.paging.interfaces import Group, Reclaimable

__all__ = ["PAUSE_NS", "Claim", "Claims", "needed_pages", "pages_at_once"]

PAUSE_NS = 50_000
"""How long other threads sleep at a time while a thread holds."""

_CODE_PAGES, _DATA_PAGES = 2, 4
"""Pages that one instruction touches at most.  Instruction, source and destination may each cross a
page border; the largest operand is the area of XRSTOR with AMX state, of four pages.  String,
gather and scatter instructions and tile loads keep their progress when they fault."""
_UPPER_VA_PAGES = 2
_SHORTEST_GRACE_NS, _LONGEST_GRACE_NS = 1_000_000, 1_000_000_000
_GAPS = 4
"""How many times the time between two needs of a holder it gets to execute its instruction."""


def pages_at_once(config: MachineConfig) -> int:
    """Return how many pages of its enclave a thread needs together at most.

    They are the pages that one instruction touches, and TCS, XSAVE pages and GPR page of the SSA
    frame, which the thread needs to resume after an exit.
    """
    xsave_pages = -(-config.xsave_bytes(config.xfrm) // PAGE_BYTES)
    return _CODE_PAGES + _DATA_PAGES + 1 + xsave_pages + 1


def needed_pages(config: MachineConfig) -> int:
    """Return how many EPC pages let every thread of every program make progress.

    They are the pages of one thread, since threads take turns: those that it needs together; for
    each of them a VA page, which may have a slot for its version; the SECS; and two upper levels of
    VA pages.
    """
    return 2 * pages_at_once(config) + 1 + _UPPER_VA_PAGES


class Claim:
    """One thread's latest loads.

    Attributes:
        loads: owner and EPC page of its latest loads of enclave pages, oldest first.
        prerequisites: owner and EPC page of the SECS and VA pages that the load in progress needed.
        since_ns: when its thread last needed a page in its turn.
        loads_left: while it holds: loads until its instruction must have completed.
        expired: whether its last turn has ended by time, and it has not thrashed since.
        group: that of the page by which it thrashes; ``None``: it has not thrashed.
    """

    __slots__ = ("expired", "group", "loads", "loads_left", "prerequisites", "since_ns")

    def __init__(self) -> None:
        self.loads: dict[Reclaimable, SgxEpcPage] = {}
        self.prerequisites: dict[Reclaimable, SgxEpcPage] = {}
        self.since_ns = self.loads_left = 0
        self.expired = False
        self.group: Group | None = None


class Claims:
    """The claim that holds, and the queue of those that wait for their turn.

    Args:
        runtime: for time and the latch.
        pages: how many pages a thread needs together.
        counters: the core's.
        released: called when pages that were kept can be evicted again.

    Attributes:
        pages: as given.
        holder: the claim that holds; ``None`` while no thread thrashes.
        short_in: the group of the holder's pages, or in which it has waited for a page; allocations
            of other threads that are charged there stand back.
        grace_ns: how long the holder may take to execute its instruction after it needed a page.
    """

    __slots__ = (
        "_counters",
        "_kept",
        "_kept_prerequisites",
        "_latch",
        "_queue",
        "_released",
        "_runtime",
        "grace_ns",
        "holder",
        "pages",
        "short_in",
    )

    def __init__(
        self,
        runtime: Runtime,
        *,
        pages: int,
        counters: Counters,
        released: Callable[[], None],
    ) -> None:
        self.pages = pages
        self.holder: Claim | None = None
        self.short_in: Group | None = None
        self.grace_ns = _SHORTEST_GRACE_NS
        self._runtime, self._counters, self._released = runtime, counters, released
        self._latch = runtime.latch()
        self._queue: deque[Claim] = deque()
        self._kept: list[SgxEpcPage] = []  # pages of the holder's enclave
        self._kept_prerequisites: list[SgxEpcPage] = []

    # --- calls for the thread of a claim ----------------------------------------------------------

    def prerequisite_loaded(self, claim: Claim, owner: Reclaimable, page: SgxEpcPage) -> None:
        """Record the load of a SECS or VA page that the load in progress needs first."""
        thrashes = owner in claim.prerequisites
        claim.prerequisites[owner] = page
        if claim is self.holder:
            self._needs_page(claim)
            page.kept = True
            self._kept_prerequisites.append(page)
        elif thrashes:
            self._line_up(claim, page.group)

    def loaded(self, claim: Claim, owner: Reclaimable, page: SgxEpcPage) -> None:
        """Record the load of a page of its enclave for the thread of ``claim``."""
        loads = claim.loads
        thrashes = loads.pop(owner, None) is not None
        loads[owner] = page
        if len(loads) > self.pages:
            del loads[next(iter(loads))]
        claim.prerequisites.clear()
        if claim is self.holder:
            self._release_prerequisites()
            self._needs_page(claim)
            claim.loads_left -= 1
            page.kept = True
            self._kept.append(page)
        elif thrashes:
            self._line_up(claim, page.group)

    def allocating(self, claim: Claim | None) -> None:
        """The thread of ``claim`` is about to allocate a page."""
        if claim is not None and claim is self.holder and not claim.loads_left:
            # It has loaded as many pages as an instruction can touch, so one has completed.
            self.release(claim)

    def waiting(self, claim: Claim | None, group: Group) -> None:
        """The thread of ``claim`` waits until a page leaves in the subtree of ``group``."""
        if claim is not None and claim is self.holder:
            self.short_in = group
            self._needs_page(claim)

    def _needs_page(self, holder: Claim) -> None:
        """The holder needs a page: measure how long that took, and begin to wait again."""
        now = self._runtime.now_ns()
        gap, holder.since_ns = now - holder.since_ns, now
        # A single long gap is forgotten in some turns.
        grace = max(_GAPS * gap, self.grace_ns - self.grace_ns // 16, _SHORTEST_GRACE_NS)
        self.grace_ns = min(grace, _LONGEST_GRACE_NS)

    def release(self, claim: Claim) -> None:
        """The thread's instruction has completed, or never will: forget its loads, end its turn."""
        claim.loads.clear()
        claim.prerequisites.clear()
        claim.expired = False
        self._end(claim)

    # --- calls for other threads ------------------------------------------------------------------

    def must_stand_back(self, claim: Claim | None, group: Group) -> bool:
        """Return whether an allocation charged to ``group`` must leave a page to the holder."""
        short = self.short_in
        return (
            short is not None
            and claim is not self.holder
            and group.is_below(short)
            and self.held_by_other(claim)
        )

    def held_by_other(self, claim: Claim | None) -> bool:
        """Return whether another claim holds while the thread of ``claim`` needs a page."""
        holder = self.holder
        if holder is None or holder is claim:
            return False
        if self._runtime.now_ns() - holder.since_ns <= self.grace_ns:
            return True
        holder.expired = True
        self._end(holder)
        return self.holder is not None

    # --- turns ------------------------------------------------------------------------------------

    def _line_up(self, claim: Claim, group: Group | None) -> None:
        claim.group = group
        if claim.expired:  # its turn may have been too short
            claim.expired = False
            self.grace_ns = min(2 * self.grace_ns, _LONGEST_GRACE_NS)
        with self._latch:
            if claim not in self._queue and claim is not self.holder:
                self._queue.append(claim)
            if self.holder is None:
                self._next()

    def _end(self, claim: Claim) -> None:
        """Take ``claim`` out of the queue, or end its turn."""
        with self._latch:
            if claim is not self.holder:
                if claim in self._queue:
                    self._queue.remove(claim)
                return
            for page in self._kept:
                page.kept = False
            self._kept.clear()
            self._release_prerequisites()
            self.holder = self.short_in = None
            self._next()
        self._released()

    def _release_prerequisites(self) -> None:
        for page in self._kept_prerequisites:
            page.kept = False
        self._kept_prerequisites.clear()

    def _next(self) -> None:
        """Begin the turn of the first in the queue; the latch is held."""
        if not self._queue:
            return
        claim = self.holder = self._queue.popleft()
        self.short_in = claim.group
        claim.loads_left, claim.since_ns = self.pages, self._runtime.now_ns()
        self._counters.claims += 1
