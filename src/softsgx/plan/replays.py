"""The choice between the two replays, and residency over time.

The compiled replay runs where it covers the policy, the readable one otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from softsgx.plan.core_replay import CoreReplay
from softsgx.plan.linux_replay import LinuxReplay, covers
from softsgx.plan.result import Residency
from softsgx.plan.scene import Counts, Epc, Scene

__all__ = ["Replay", "new_replay", "residency"]

_TIME_BINS, _ROWS = 120, 64


class Replay(Protocol):
    """A replay of accesses in one EPC; both implementations have these methods."""

    def run(self, pages: np.ndarray[Any, Any]) -> None:
        """Replay accesses, each a dense page number."""

    def counts(self) -> Counts:
        """Return the counts so far."""

    def resident(self) -> np.ndarray[Any, Any]:
        """Return whether each page is in the EPC now."""

    def close(self) -> None:
        """End the replay."""


def new_replay(scene: Scene, epc: Epc) -> Replay:
    """Return a replay of the enclaves of a scene."""
    return LinuxReplay(scene, epc) if covers(epc.policy) else CoreReplay(scene, epc)


def residency(scene: Scene, epc: Epc) -> Residency:
    """Replay a scene in bins of time; see :class:`Residency`."""
    edges, bin_seconds = _time_bins(scene)
    firsts = _page_bins(scene)
    sizes = np.diff([*firsts, scene.footprint_pages])
    loads, made, resident, accessed = [], [], [], []
    replay = new_replay(scene, epc)
    before = replay.counts()
    for start, end in pairwise(edges):
        part = scene.pages[start:end]
        replay.run(part)
        after = replay.counts()
        loads.append(after.loads - before.loads)
        made.append(after.made - before.made)
        before = after
        resident.append(np.add.reduceat(replay.resident().astype(np.int64), firsts) / sizes)
        used = np.zeros(scene.footprint_pages, np.int64)
        used[part] = 1
        accessed.append(np.add.reduceat(used, firsts) / sizes)
    replay.close()
    first_rows = {enclave.first: enclave.name for enclave in scene.enclaves}
    return Residency(
        epc_bytes=epc.pages << 12,
        bin_seconds=bin_seconds,
        loads=tuple(loads),
        made=tuple(made),
        page_bins=tuple(firsts),
        pages=scene.footprint_pages,
        enclave_rows=tuple(
            (row, first_rows[first]) for row, first in enumerate(firsts) if first in first_rows
        ),
        resident=_rows(resident),
        accessed=_rows(accessed),
    )


def _time_bins(scene: Scene) -> tuple[list[int], float]:
    """Return the index of the first access of each bin, and the length of a bin in seconds."""
    last_ns, accesses = int(scene.times_ns[-1]), len(scene.pages)
    bins = min(_TIME_BINS, accesses)
    if not last_ns or not scene.timed:
        return [accesses * at // bins for at in range(bins + 1)], 0.0
    limits = np.array([last_ns * at // bins for at in range(1, bins)], np.uint64)
    inner = np.searchsorted(scene.times_ns, limits).tolist()
    return [0, *inner, accesses], last_ns / bins / 1e9


def _page_bins(scene: Scene) -> list[int]:
    """Return the first page of each row; no row has pages of two enclaves."""
    rows: list[int] = []
    for enclave in scene.enclaves:
        share = max(1, round(_ROWS * enclave.pages / scene.footprint_pages))
        count = min(share, enclave.pages)
        rows += [enclave.first + enclave.pages * at // count for at in range(count)]
    return rows


def _rows(columns: Iterable[np.ndarray[Any, Any]]) -> tuple[tuple[float, ...], ...]:
    table = np.round(np.array(list(columns)).T, 3)
    return tuple(tuple(map(float, row)) for row in table)
