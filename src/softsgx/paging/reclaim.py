"""Reclaim batches: which pages are evicted, and in which order the steps are done.

The reclaimer knows a page only as a :class:`~softsgx.paging.Reclaimable`.  A batch has four phases.
Each phase ends for all pages before the next begins, so that one tracking cycle and one round of
interrupts serve all pages of an enclave.

Lock order: the reclaimer holds no lock; owners take theirs inside the calls.

Source:
    ``sgx_reclaim_pages()``, main.c.
"""

from __future__ import annotations

from collections.abc import Callable

from softsgx.defects import Defect
from softsgx.ondemand import dataclass
from softsgx.paging.counters import Counters
from softsgx.paging.events import Aged, BatchDone, Isolated, NotPrepared
from softsgx.paging.interfaces import Reclaimable
from softsgx.paging.lru import Lru
from softsgx.paging.page import SgxEpcPage
from softsgx.paging.policy import Policy
from softsgx.runtime import Runtime
from softsgx.trace import Tracer

__all__ = ["EVICT_POISONED", "Batch", "Pressure", "Reclaimer"]

EVICT_POISONED = frozenset(
    {Defect.POISONED_PAGE_STAYS_ON_LRU, Defect.PAGE_POISONED_IN_BATCH_EVICTED}
)
"""Defects under which a batch evicts poisoned pages."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one batch did.

    Attributes:
        scanned: pages that the batch isolated.
        freed: pages of them that it evicted; a SECS that is evicted with its last child does not
            count.
    """

    scanned: int
    freed: int


class Pressure:
    """What a task that needs a page has tried so far.

    After some batches without a freed page, the task ignores accessed bits (``force``).  When such
    batches have scanned as many pages as are in use, it gives up.

    Deviation: Linux does not stop while every page is young.

    Args:
        patience_passes: batches without a freed page after which accessed bits are ignored;
            ``None``: they never are (:attr:`Defect.DIRECT_RECLAIM_WITHOUT_END`).
    """

    def __init__(self, patience_passes: int | None) -> None:
        self._patience_passes = patience_passes
        self._fruitless = 0
        self._forced_scans = 0

    @property
    def force(self) -> bool:
        """Whether the next batch ignores accessed bits."""
        return self._patience_passes is not None and self._fruitless >= self._patience_passes

    def account(self, batch: Batch) -> None:
        """Take the result of a batch into account."""
        if batch.freed:
            self._fruitless = self._forced_scans = 0
            return
        if self.force:
            self._forced_scans += batch.scanned
        self._fruitless += 1

    def exhausted(self, pages: int) -> bool:
        """Return whether forced batches have scanned ``pages`` pages and evicted none."""
        return self.force and self._fruitless > 1 and self._forced_scans >= pages


class Reclaimer:
    """Runs batches.

    Args:
        policy: which pages are evicted, and how many.
        epc_pages: size of the EPC, which limits the size of a batch.
        runtime: for the scheduling points between the phases.
        free: frees an evicted page.
        counters: the core's.
        tracer: receives events; ``None`` for none.
        ignore_poison: one of :data:`EVICT_POISONED` is on.
    """

    def __init__(
        self,
        policy: Policy,
        epc_pages: int,
        runtime: Runtime,
        *,
        free: Callable[[SgxEpcPage], None],
        counters: Counters,
        tracer: Tracer | None,
        ignore_poison: bool = False,
    ) -> None:
        self._policy = policy
        self._batch_pages, self._scan_pages = policy.batch(epc_pages), policy.scan_pages
        self._point = runtime.point
        self._free, self._counters, self.tracer = free, counters, tracer
        self._ignore_poison = ignore_poison

    def batch(self, lru: Lru, *, force: bool = False) -> Batch:
        """Evict the pages that were not accessed among the oldest of ``lru``.

        Args:
            lru: the list.
            force: whether to evict pages that were accessed too.
        """
        scanned, victims = self._choose(lru, force=force)
        return self._evict(lru, scanned, victims)

    def evict(self, lru: Lru, page: SgxEpcPage) -> bool:
        """Evict one page of ``lru``, even if it was accessed; ``False``: it is still resident."""
        if not lru.isolate_page(page):
            return False
        return bool(self._evict(lru, 1, self._prepare(lru, [page], force=True)).freed)

    def _evict(self, lru: Lru, scanned: int, victims: list[SgxEpcPage]) -> Batch:
        """Phases C and D for pages that are prepared."""
        self._point("reclaim: block")
        # Phase by phase: one round of interrupts then serves every victim.
        victims = self._block(lru, victims)
        self._point("reclaim: write")
        freed = self._write(lru, victims)
        counters = self._counters
        counters.batches += 1
        counters.scanned += scanned
        counters.reclaimed += freed
        if self.tracer is not None:
            self.tracer(BatchDone(scanned, freed))
        return Batch(scanned, freed)

    def _choose(self, lru: Lru, *, force: bool) -> tuple[int, list[SgxEpcPage]]:
        """Phases A and B: isolate, age, prepare; return how many were scanned, and the victims."""
        victims: list[SgxEpcPage] = []
        scanned, limit = 0, min(max(self._scan_pages, self._batch_pages), len(lru))
        while scanned < limit and len(victims) < self._batch_pages:
            wanted = min(limit - scanned, self._batch_pages - len(victims))
            isolated, dying = self._isolate(lru, wanted)
            if self.tracer is not None:
                self.tracer(Isolated(len(isolated), dying, force))
            self._counters.dying += dying
            scanned += len(isolated) + dying
            self._point("reclaim: age")
            victims += self._prepare(lru, isolated, force=force)
            if not isolated and not dying:
                break
        return scanned, victims

    def _isolate(self, lru: Lru, count: int) -> tuple[list[SgxEpcPage], int]:
        """As :meth:`Lru.isolate`."""
        return lru.isolate(count)

    def _prepare(self, lru: Lru, pages: list[SgxEpcPage], *, force: bool) -> list[SgxEpcPage]:
        """Age and prepare each page; return the victims."""
        victims: list[SgxEpcPage] = []
        counters, old = self._counters, self._policy.old
        for page in pages:
            owner = page.owner
            assert owner is not None, f"{page!r} in a batch has no owner"
            if page.poisoned and not self._ignore_poison:
                self._skip(lru, page, owner, "poisoned")
                continue
            if page.kept:
                counters.kept += 1
                self._skip(lru, page, owner, "kept")
                continue
            leaves = force or old(owner)
            if self.tracer is not None:
                self.tracer(Aged(page.addr, not leaves))
            if not leaves:
                counters.young += 1
                _requeue(lru, page, owner)
            elif owner.prepare():
                victims.append(page)
            else:
                counters.not_prepared += 1
                self._skip(lru, page, owner, "prepare")
        return victims

    def _block(self, lru: Lru, pages: list[SgxEpcPage]) -> list[SgxEpcPage]:
        """Phase C; return the pages that no processor can reach any more."""
        blocked: list[SgxEpcPage] = []
        for page in pages:
            owner = page.owner
            assert owner is not None, f"{page!r} in a batch has no owner"
            if owner.block():
                blocked.append(page)
            else:
                self._counters.not_blocked += 1
                self._skip(lru, page, owner, "block")
        return blocked

    def _write(self, lru: Lru, pages: list[SgxEpcPage]) -> int:
        """Phase D; return how many pages were evicted."""
        freed, free = 0, self._free
        for page in pages:
            owner = page.owner
            assert owner is not None, f"{page!r} in a batch has no owner"
            if owner.write():
                lru.forget(page)
                free(page)
                owner.put()
                freed += 1
            else:
                self._counters.not_written += 1
                self._skip(lru, page, owner, "write")
        return freed

    def _skip(self, lru: Lru, page: SgxEpcPage, owner: Reclaimable, stage: str) -> None:
        if self.tracer is not None:
            self.tracer(NotPrepared(page.addr, stage))
        _requeue(lru, page, owner)


def _requeue(lru: Lru, page: SgxEpcPage, owner: Reclaimable) -> None:
    lru.put_back(page)
    owner.put()  # last: it may destroy the owner, which takes its pages off their lists
