"""Progress: a thread gets every page that its instruction needs at once, however small the EPC.

An instruction completes when all pages that it touches are resident together.  Where several
threads fault, each load may evict what another thread has loaded and not used yet, and none of
them completes.  So each thread has a :class:`Claim`, which remembers its latest loads.  A thread
that must load a page again which is among them was thrashes, and queues.  The first of the queue
*holds*: until its instruction has completed

* the pages that it has loaded since, as many as an instruction can touch, are kept: the reclaimer
  passes over them;
* while it loads one, what it has fetched for that (SECS, VA pages) is kept as well; afterwards the
  loaded page itself keeps these in the EPC;
* while it waits for a page, allocations of others in the group that is short stand aside.

One thread holds at a time, so what is kept is bounded, whatever the number of threads.  A turn ends
when the engine says that the instruction has completed (:meth:`Claims.release`), when more was
loaded than an instruction can touch, or when others need a page and the thread was given time to
execute: an engine that runs threads on real processors does not hear of completed instructions.

Modelled: Linux promises nothing of the kind.  Threads of one machine can rob each other there for
as long as they like; with the EPC of real machines it is not seen.

Lock order: the latch is innermost.
"""

from __future__ import annotations

from collections import OrderedDict, deque
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
"""How long others sleep at a time while a thread has its turn."""

_CODE_PAGES, _DATA_PAGES = 2, 4
"""What one instruction touches at most: it, its source and its destination may each cross a page
border; the largest operand is the area of XRSTOR with AMX state, of four pages.  String, gather and
scatter instructions and tile loads keep what they have done when they fault."""
_UPPER_VA_PAGES = 2
_FIRST_GRACE_NS, _LONGEST_GRACE_NS = 1_000_000, 1_000_000_000


def pages_at_once(config: MachineConfig) -> int:
    """Return how many pages of its enclave a thread needs together at most.

    They are what one instruction touches, and TCS, XSAVE pages and GPR page of the SSA frame,
    without which the thread cannot resume after an exit.
    """
    xsave_pages = -(-config.xsave_bytes(config.xfrm) // PAGE_BYTES)
    return _CODE_PAGES + _DATA_PAGES + 1 + xsave_pages + 1


def needed_pages(config: MachineConfig) -> int:
    """Return how many EPC pages let every thread of every program make progress.

    They are those of one thread, since threads take turns: the pages that it needs together; for
    each of them a VA page, which stays for its version; the SECS; and two upper levels of VA pages.
    """
    return 2 * pages_at_once(config) + 1 + _UPPER_VA_PAGES


class Claim:
    """One thread's latest loads.

    Attributes:
        loads: the owner of each page of its enclave and where it was loaded, oldest first.
        fetched: the same of what the load in progress needs first: SECS, VA pages.
        since_ns: while it holds: when its thread was last seen to need a page.
        grace_ns: how long the thread may take from then on to execute its instruction.
        left: while it holds: loads until its instruction must have completed.
    """

    __slots__ = ("fetched", "grace_ns", "left", "loads", "since_ns")

    def __init__(self) -> None:
        self.loads: OrderedDict[Reclaimable, SgxEpcPage] = OrderedDict()
        self.fetched: dict[Reclaimable, SgxEpcPage] = {}
        self.since_ns = self.left = 0
        self.grace_ns = _FIRST_GRACE_NS


class Claims:
    """Who holds, and who comes next.

    Args:
        runtime: for time and the latch.
        pages: how many pages a thread needs together.
        counters: told of turns.
        released: called when pages that were kept are candidates again.

    Attributes:
        pages: as given.
        holder: whose turn it is, ``None`` when no thread was thrashes.
        short: the group in which the holder waits for a page; allocations of others that are
            charged there stand aside.
    """

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
        self.short: Group | None = None
        self._runtime, self._counters, self._released = runtime, counters, released
        self._latch = runtime.latch()
        self._queue: deque[Claim] = deque()
        self._kept: list[SgxEpcPage] = []  # of the holder's enclave
        self._kept_fetched: list[SgxEpcPage] = []

    # --- of the thread itself ---------------------------------------------------------------------

    def prerequisite_loaded(self, claim: Claim, owner: Reclaimable, page: SgxEpcPage) -> None:
        """Note that a SECS or VA page was loaded, which the load in progress needs first."""
        thrashes = owner in claim.fetched
        claim.fetched[owner] = page
        if claim is self.holder:
            claim.since_ns = self._runtime.now_ns()
            page.kept = True
            self._kept_fetched.append(page)
        elif thrashes:
            self._line_up(claim)

    def loaded(self, claim: Claim, owner: Reclaimable, page: SgxEpcPage) -> None:
        """Note that a page of its enclave was loaded for the thread of ``claim``."""
        loads = claim.loads
        thrashes = loads.pop(owner, None) is not None
        loads[owner] = page
        if len(loads) > self.pages:
            loads.popitem(last=False)
        claim.fetched.clear()
        if claim is self.holder:
            self._let_go_of_fetched()
            claim.since_ns = self._runtime.now_ns()
            claim.left -= 1
            page.kept = True
            self._kept.append(page)
        elif thrashes:
            self._line_up(claim)

    def allocating(self, claim: Claim | None) -> None:
        """The thread of ``claim`` is about to allocate a page."""
        if claim is not None and claim is self.holder and not claim.left:
            # It has loaded what an instruction can touch, so one has completed.
            self.release(claim)

    def waiting(self, claim: Claim | None, group: Group) -> None:
        """The thread of ``claim`` waits until a page leaves in the subtree of ``group``."""
        if claim is not None and claim is self.holder:
            self.short = group
            claim.since_ns = self._runtime.now_ns()

    def got_page(self, claim: Claim | None) -> None:
        """The thread of ``claim`` waits no more."""
        if claim is self.holder:
            self.short = None

    def release(self, claim: Claim) -> None:
        """The thread's instruction has completed, or never will: it needs nothing any more."""
        claim.loads.clear()
        claim.fetched.clear()
        claim.grace_ns = _FIRST_GRACE_NS
        self._end(claim)

    # --- of others --------------------------------------------------------------------------------

    def must_stand_back(self, claim: Claim | None, group: Group) -> bool:
        """Return whether an allocation charged to ``group`` must leave the next page to others."""
        short = self.short
        return (
            short is not None
            and claim is not self.holder
            and group.is_below(short)
            and self.held_by_other(claim)
        )

    def held_by_other(self, claim: Claim | None) -> bool:
        """Return whether pages are kept from the thread of ``claim``, which needs one."""
        holder = self.holder
        if holder is None or holder is claim:
            return False
        if self._runtime.now_ns() - holder.since_ns <= holder.grace_ns:
            return True
        # It had time to execute; if that was not enough, it is thrashes again and gets more.
        holder.grace_ns = min(2 * holder.grace_ns, _LONGEST_GRACE_NS)
        self._end(holder)
        return self.holder is not None

    # --- turns ------------------------------------------------------------------------------------

    def _line_up(self, claim: Claim) -> None:
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
            self._let_go_of_fetched()
            self.holder = self.short = None
            self._next()
        self._released()

    def _let_go_of_fetched(self) -> None:
        for page in self._kept_fetched:
            page.kept = False
        self._kept_fetched.clear()

    def _next(self) -> None:
        """Begin the turn of the first in the queue; the latch is held."""
        if not self._queue:
            return
        claim = self.holder = self._queue.popleft()
        claim.left, claim.since_ns = self.pages, self._runtime.now_ns()
        self._counters.claims += 1
