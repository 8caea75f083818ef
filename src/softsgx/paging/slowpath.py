"""The slow path of an allocation that finds no page: reclaim, wait, or fail with a reason.

Lock order: as for :meth:`EpcCore.alloc`; this module holds no lock.

Source:
    ``sgx_alloc_epc_page()``, main.c; charging as in the EPC cgroup series, v17.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from softsgx.ondemand import dataclass
from softsgx.paging.claims import PAUSE_NS, Claim, Claims
from softsgx.paging.counters import Counters
from softsgx.paging.events import ChargeRefused, Refused
from softsgx.paging.failures import EpcBusy, Interrupted, NoEpc
from softsgx.paging.free_pages import FreePages
from softsgx.paging.interfaces import Group
from softsgx.paging.ksgxd import Ksgxd
from softsgx.paging.page import SgxEpcPage
from softsgx.paging.reclaim import Batch, Pressure
from softsgx.runtime import Runtime
from softsgx.trace import Tracer

__all__ = ["AllocRequest", "AllocSlowPath", "no_signal"]


def no_signal() -> bool:
    """Return ``False``: the caller has no signals."""
    return False


@dataclass(slots=True)
class AllocRequest:
    """How an allocation may be served.

    Attributes:
        reclaim: whether the caller itself reclaims, which may wait; otherwise it gets ``EpcBusy``.
        signal_pending: returns whether a signal is pending; called before each batch.
        claim: of the thread that needs the page; ``None``: no thread has a claim to it.
    """

    reclaim: bool
    signal_pending: Callable[[], bool]
    claim: Claim | None


class _Core(Protocol):
    """The part of the core that this module uses."""

    root: Group
    counters: Counters
    runtime: Runtime
    tracer: Tracer | None
    claims: Claims

    def reclaim(self, group: Group | None = None, *, force: bool = False) -> Batch: ...


class AllocSlowPath:
    """The slow path of one core.

    Args:
        core: the core.
        pool: its free pages.
        ksgxd: reclaims for callers that must not.
        patience_passes: batches without a freed page after which accessed pages are evicted too;
            ``None``: they never are.
        in_use: returns how many EPC pages are not free.  A caller gives up after a forced look at
            as many pages.

    Attributes:
        backing_error: why backing could not be reserved for the last page that reclaim prepared;
            empty if it could.
    """

    __slots__ = (
        "_core",
        "_in_use",
        "_ksgxd",
        "_patience_passes",
        "_pool",
        "backing_error",
    )

    def __init__(
        self,
        core: _Core,
        pool: FreePages,
        ksgxd: Ksgxd,
        *,
        patience_passes: int | None,
        in_use: Callable[[], int],
    ) -> None:
        self._core, self._pool, self._ksgxd = core, pool, ksgxd
        self._patience_passes, self._in_use = patience_passes, in_use
        self.backing_error = ""

    def refused(self, kind: str, error: NoEpc | EpcBusy | Interrupted) -> None:
        """Count and trace that an allocation of a page of ``kind`` fails with ``error``."""
        counters, tracer = self._core.counters, self._core.tracer
        if isinstance(error, EpcBusy):
            result = "busy"
            counters.alloc_busy += 1
        elif isinstance(error, NoEpc):
            result = "none"
            counters.alloc_none += 1
        else:
            result = "interrupted"
            counters.alloc_interrupted += 1
        if tracer is not None:
            tracer(Refused(kind, result))

    def stand_back(self, group: Group, request: AllocRequest) -> None:
        """Wait while the next page of ``group`` belongs to the thread that holds the claim.

        Raises:
            EpcBusy: the caller must not wait here.
            Interrupted: a signal is pending.
        """
        core = self._core
        while core.claims.must_stand_back(request.claim, group):
            if not request.reclaim:
                raise EpcBusy(group=group, pause=True)
            if request.signal_pending():
                raise Interrupted
            core.runtime.sleep(PAUSE_NS)

    def charge(
        self, group: Group, refused: Group, seen: tuple[int, int], request: AllocRequest
    ) -> None:
        """Charge a page to ``group`` after a limit refused it, reclaiming below that limit.

        Args:
            group: the group to charge.
            refused: the group whose limit refused.
            seen: ksgxd's ``generation`` and ``outcomes`` before the charge.
            request: what the caller may do.

        Raises:
            NoEpc, EpcBusy, Interrupted: as for :meth:`EpcCore.alloc`; nothing is charged.
        """
        core, ksgxd = self._core, self._ksgxd
        pressure = Pressure(self._patience_passes)
        while True:
            if core.tracer is not None:
                core.tracer(ChargeRefused("reclaim" if request.reclaim else "busy"))
            try:
                self._reclaim_or_wait(refused, seen, pressure, request)
            except NoEpc:
                if not refused.reclaim_failed():
                    raise
            seen = ksgxd.generation, ksgxd.outcomes
            still_refused = group.try_charge()
            if still_refused is None:
                return
            refused = still_refused

    def take(self, cpu_node: int, request: AllocRequest) -> SgxEpcPage:
        """Return a free page, reclaiming in the whole EPC until there is one.

        Raises:
            NoEpc, EpcBusy, Interrupted: as for :meth:`EpcCore.alloc`.
        """
        ksgxd = self._ksgxd
        pressure = Pressure(self._patience_passes)
        while True:
            seen = ksgxd.generation, ksgxd.outcomes
            page = self._pool.take(cpu_node)
            if page is not None:
                return page
            self._reclaim_or_wait(self._core.root, seen, pressure, request)

    def _reclaim_or_wait(
        self, group: Group, seen: tuple[int, int], pressure: Pressure, request: AllocRequest
    ) -> None:
        """Run one batch, or wait for one; return when the caller should look for a page again.

        Args:
            group: a page of its subtree has to be freed.
            seen: ksgxd's ``generation`` and ``outcomes`` before the caller found no page.
            pressure: what the caller has tried so far.
            request: what the caller may do.

        Raises:
            NoEpc: no page can be freed.
            EpcBusy: the caller must not reclaim; ksgxd was woken.
            Interrupted: a signal is pending.
        """
        generation, outcomes = seen
        core, ksgxd = self._core, self._ksgxd
        claims = core.claims
        if not group.has_reclaimable():
            idle = not ksgxd.working.value
            # Read after working: a batch that is no longer counted there has changed it.
            if ksgxd.generation != generation:
                return
            # Deviation: Linux returns ENOMEM, although the running batch may hold every page there
            # is. In a small EPC it often does.
            if idle:
                raise self._no_epc(group)
            if request.reclaim:
                if request.signal_pending():
                    raise Interrupted
                ksgxd.wait_for_batch(generation)
                return
        if not request.reclaim:
            if ksgxd.take_oom_verdict(group) and not claims.held_by_other(request.claim):
                raise self._no_epc(group)
            ksgxd.request(group)
            claims.waiting(request.claim, group)
            raise EpcBusy(outcomes, group, pause=claims.held_by_other(request.claim))
        if request.signal_pending():
            raise Interrupted
        core.counters.direct += 1
        pressure.account(core.reclaim(group, force=pressure.force))
        if pressure.exhausted(self._in_use()):
            if not claims.held_by_other(request.claim):
                raise self._no_epc(group)
            core.runtime.sleep(PAUSE_NS)
        core.runtime.yield_now()

    def _no_epc(self, group: Group) -> NoEpc:
        """Return the refusal, with its reason."""
        why = f", because {self.backing_error}" if self.backing_error else ""
        return NoEpc(f"{group.describe()} has no free page, and none can be evicted{why}")
