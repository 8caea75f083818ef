"""What an allocation does that finds no page: reclaim, wait, stand aside, or give up with a reason.

Lock order: as for :meth:`EpcCore.alloc`; nothing is held here.

Source:
    ``sgx_alloc_epc_page()``, main.c; charging as in the EPC cgroup series, v17.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from softsgx.paging.claims import PAUSE_NS, Claim, Claims
from softsgx.paging.counters import Counters
from softsgx.paging.failures import EpcBusy, Interrupted, NoEpc
from softsgx.paging.interfaces import Group
from softsgx.paging.ksgxd import Ksgxd
from softsgx.paging.reclaim import Batch, Pressure
from softsgx.runtime import Runtime

__all__ = ["Relief", "Request", "no_signal"]


def no_signal() -> bool:
    """Return ``False``: the caller has no signals."""
    return False


@dataclass(frozen=True, slots=True)
class Request:
    """How an allocation may be served.

    Attributes:
        reclaim: whether the caller reclaims, waiting; otherwise it is refused with ``EpcBusy``.
        signal: returns whether a signal is pending; asked before each batch.
        claim: the thread's that needs the page, ``None`` for none.
    """

    reclaim: bool
    signal: Callable[[], bool]
    claim: Claim | None


class _Core(Protocol):
    """What is asked of the core."""

    counters: Counters

    def reclaim(self, group: Group | None = None, *, force: bool = False) -> Batch: ...


class Relief:
    """One core's way out of a shortage.

    Args:
        core: whose batches to run.
        runtime: to let others run.
        ksgxd: works for callers that may not reclaim.
        claims: whose turn it is.
        patience_passes: fruitless passes after which use is ignored; ``None`` for never.
        in_use: returns how many EPC pages are not free: as many are tried before giving up.

    Attributes:
        backing_error: why the last page that was to leave had no backing; empty after one that
            had.
    """

    def __init__(
        self,
        core: _Core,
        runtime: Runtime,
        ksgxd: Ksgxd,
        claims: Claims,
        *,
        patience_passes: int | None,
        in_use: Callable[[], int],
    ) -> None:
        self._core, self._runtime, self._ksgxd, self._claims = core, runtime, ksgxd, claims
        self._patience_passes, self._in_use = patience_passes, in_use
        self.backing_error = ""

    def pressure(self) -> Pressure:
        """Return the beginning of a new effort."""
        return Pressure(self._patience_passes)

    def now(self) -> tuple[int, int]:
        """Return what to give to :meth:`step` as ``seen``, before looking for a page."""
        return self._ksgxd.generation, self._ksgxd.outcomes

    def stand_aside(self, group: Group, request: Request) -> None:
        """Leave the next page of ``group`` to the thread that holds.

        Raises:
            EpcBusy, Interrupted: as for :meth:`step`.
        """
        while self._claims.excludes(request.claim, group):
            if not request.reclaim:
                raise EpcBusy(group=group, pause=True)
            if request.signal():
                raise Interrupted
            self._runtime.sleep(PAUSE_NS)

    def step(
        self, group: Group, seen: tuple[int, int], pressure: Pressure, request: Request
    ) -> None:
        """Do one step towards a page for ``group``; raise when the caller should not try again.

        Args:
            group: in whose subtree a page has to leave.
            seen: :meth:`now` before the caller found that there was none.
            pressure: how hard the caller has tried.
            request: what the caller may do.

        Raises:
            NoEpc: none can leave.
            EpcBusy: one may leave later, and the caller may not wait here.
            Interrupted: a signal is pending.
        """
        generation, outcomes = seen
        ksgxd, claims = self._ksgxd, self._claims
        if not group.has_reclaimable():
            if ksgxd.generation != generation:
                return
            # Deviation: Linux says ENOMEM, although a batch that runs now may hold every page
            # there is; in a small EPC it often does.
            if not ksgxd.working.value:
                raise self._nothing(group)
            if request.reclaim:
                if request.signal():
                    raise Interrupted
                ksgxd.wait_for_batch(generation)
                return
        if not request.reclaim:
            if ksgxd.take_ticket(group) and not claims.others_hold(request.claim):
                raise self._nothing(group)
            ksgxd.request(group)
            claims.waits(request.claim, group)
            raise EpcBusy(outcomes, group, pause=claims.others_hold(request.claim))
        if request.signal():
            raise Interrupted
        core = self._core
        core.counters.direct += 1
        pressure.note(core.reclaim(group, force=pressure.force))
        if pressure.hopeless(self._in_use()):
            if not claims.others_hold(request.claim):
                raise self._nothing(group)
            self._runtime.sleep(PAUSE_NS)
        self._runtime.yield_now()

    def _nothing(self, group: Group) -> NoEpc:
        """Return the refusal, with its reason."""
        why = f", because {self.backing_error}" if self.backing_error else ""
        return NoEpc(f"{group.describe()} has no free page, and none can leave{why}")
