"""The state of an ordinary program that is recorded as if it were enclosed.

The object has the names of :mod:`.state`; address spaces take the place of enclaves.  Without an
EPC, ``epc`` is ``None`` and there are no groups; ``recording`` has the counts of intervals.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from softsgx.arch import PAGE_BYTES
from softsgx.engines.ordinary import Progress, SpaceProgress
from softsgx.live.state import About, described, epc_state, group_states, names_of, settled

__all__ = ["OrdinaryState"]

_PAGER = "userfaultfd"


class OrdinaryState:
    """Returns the state of a recording, in any thread, after :meth:`started`.

    Args:
        clock: returns seconds.

    Attributes:
        progress: what is recorded; ``None`` before the program's first step.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began_s = clock, clock()
        self.progress: Progress | None = None

    def started(self, progress: Progress) -> None:
        """The program is about to take its first step."""
        self.progress, self._began_s = progress, self._clock()

    def __call__(self, about: About) -> dict[str, Any]:
        """Return the object; :mod:`json` can encode it."""
        progress = self.progress
        assert progress is not None, "a state before the program has started"
        counts = settled(lambda: _counts(progress))
        names = names_of(pid for space in counts["enclaves"] for pid in space["pids"])
        for space in counts["enclaves"]:
            space["name"] = names[space["pids"][0]]
        platform = progress.platform
        return {
            **described(about, self._clock() - self._began_s),
            "profile": "" if platform is None else platform.config.profile,
            "pager": _PAGER,
            "as_enclave": True,
            **counts,
        }


def _counts(progress: Progress) -> dict[str, Any]:
    platform, counts = progress.platform, progress.counts
    totals = {"faults": counts.faults, "fault_seconds": round(counts.serving_ns / 1e9, 6)}
    paged = {"evictions": 0, "reloads": 0}
    reclaim: dict[str, float] = {"batches": 0, "seconds": 0.0}
    if platform is not None:
        core, of_core = platform.core, platform.core.counters
        reloads = of_core.eldu - of_core.secs_in - of_core.va_in
        paged = {"evictions": of_core.reclaimed, "reloads": reloads}
        reclaim = {"batches": of_core.batches, "seconds": round(core.reclaim_ns / 1e9, 6)}
    return {
        "epc": None if platform is None else epc_state(platform),
        "recording": {
            "interval_seconds": progress.interval_ns / 1e9,
            "intervals": counts.intervals,
            "late_intervals": counts.long,
            "accesses": counts.accesses,
            "used_bytes": counts.pages * PAGE_BYTES,
            "most_bytes": counts.most_pages * PAGE_BYTES,
        },
        "totals": {**totals, **paged, **_NO_CROSSINGS},
        "reclaim": reclaim,
        "groups": [] if platform is None else group_states(platform),
        "enclaves": [_space(space) for space in progress.spaces()],
    }


_NO_CROSSINGS = {"eenter": 0, "eexit": 0, "aex": 0, "eresume": 0}


def _space(space: SpaceProgress) -> dict[str, Any]:
    return {
        "number": space.number,
        "pids": [space.pid],
        "group": "/",
        "state": "recorded",
        "mrenclave": None,
        "base": 0,
        "size_bytes": space.pages * PAGE_BYTES,
        "resident_bytes": space.resident_pages * PAGE_BYTES,
        "faults_by_kind": {},
        "faults": space.faults,
        "fault_seconds": 0.0,
        "evictions": space.evictions,
        "reloads": space.reloads,
        **_NO_CROSSINGS,
    }
