"""The choice between the two replays, replays side by side, and residency over time.

The compiled replay runs where it covers the policy, the readable one otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from softsgx.plan.core_replay import CoreReplay
from softsgx.plan.linux_replay import LinuxReplay, covers
from softsgx.plan.result import Residency
from softsgx.plan.scene import GOES, Counts, Epc, Scene

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Part", "Replay", "ResidencyReplay", "new_replay", "replay_all"]

_ROWS = 64


class Part(Protocol):
    """A consumer of the accesses of a scene, part by part.

    Attributes:
        any_thread: whether each part may be made by another thread.
    """

    @property
    def any_thread(self) -> bool:
        """See the class."""

    def run(self, pages: NDArray[np.uint32]) -> None:
        """Replay accesses, each a dense page number."""


class Replay(Part, Protocol):
    """A replay of accesses in one EPC; both implementations have these methods."""

    def counts(self) -> Counts:
        """Return the counts so far."""

    def resident(self) -> np.ndarray[Any, Any]:
        """Return whether each page is in the EPC now."""

    def close(self) -> None:
        """End the replay."""


def new_replay(scene: Scene, epc: Epc) -> Replay:
    """Return a replay of the enclaves of a scene."""
    return LinuxReplay(scene, epc) if covers(epc.policy) else CoreReplay(scene, epc)


def replay_all(
    scene: Scene, replays: Sequence[Part], progress: Callable[[int], None] = lambda _done: None
) -> None:
    """Make the accesses of a scene in several replays side by side, in one pass over them.

    Args:
        scene: the accesses.
        replays: each is used by one thread at a time.
        progress: called with the accesses that were made.
    """
    done = 0
    here = [replay for replay in replays if not replay.any_thread]
    elsewhere = [replay for replay in replays if replay.any_thread]
    with ThreadPoolExecutor(processors()) as threads:
        for part in scene.parts:
            running = [threads.submit(replay.run, part) for replay in elsewhere]
            for replay in here:
                replay.run(part)
            for future in running:
                future.result()
            done += len(part)
            progress(done)


def processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0))


class ResidencyReplay:
    """A replay in bins of time, of accesses that come in parts; see :class:`Residency`."""

    def __init__(self, scene: Scene, epc: Epc) -> None:
        self._scene, self._epc = scene, epc
        self._firsts = _page_bins(scene)
        self._sizes = np.diff([*self._firsts, scene.footprint_pages])
        self._replay = new_replay(scene, epc)
        self._before = self._replay.counts()
        self._used = np.zeros(scene.footprint_pages, np.int64)
        self._accesses = 0
        self._loads: list[int] = []
        self._made: list[int] = []
        self._resident: list[NDArray[np.float64]] = []
        self._accessed: list[NDArray[np.float64]] = []

    @property
    def any_thread(self) -> bool:
        """As :class:`Part`."""
        return self._replay.any_thread

    def run(self, pages: NDArray[np.uint32]) -> None:
        """Replay accesses, each a dense page number."""
        for edge in self._scene.edges[len(self._loads) + 1 :]:
            if edge > self._accesses + len(pages):
                break
            self._go_on(pages[: edge - self._accesses])
            pages = pages[edge - self._accesses :]
            self._accesses = edge
            self._end_bin()
        self._go_on(pages)
        self._accesses += len(pages)

    def _go_on(self, pages: NDArray[np.uint32]) -> None:
        if len(pages):
            self._replay.run(pages)
            self._used[pages[pages < GOES]] = 1

    def _end_bin(self) -> None:
        after = self._replay.counts()
        self._loads.append(after.loads - self._before.loads)
        self._made.append(after.made - self._before.made)
        self._before = after
        self._resident.append(self._shares(self._replay.resident().astype(np.int64)))
        self._accessed.append(self._shares(self._used))
        self._used[:] = 0

    def _shares(self, pages: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return which share of the pages of each row is 1."""
        return np.asarray(np.add.reduceat(pages, self._firsts) / self._sizes)

    def result(self) -> Residency:
        """Return what was seen; the replay ends."""
        self._replay.close()
        firsts, scene = self._firsts, self._scene
        first_rows = {enclave.first: enclave.name for enclave in scene.enclaves}
        return Residency(
            epc_bytes=self._epc.pages << 12,
            bin_seconds=scene.bin_seconds,
            loads=tuple(self._loads),
            made=tuple(self._made),
            page_bins=tuple(firsts),
            pages=scene.footprint_pages,
            enclave_rows=tuple(
                (row, first_rows[first]) for row, first in enumerate(firsts) if first in first_rows
            ),
            resident=_rows(self._resident),
            accessed=_rows(self._accessed),
        )


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
