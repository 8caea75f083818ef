"""Replacement policies replayed at given capacities: how many accesses each misses.

LRU needs no replay: stack distances give it for all capacities.  FIFO, CLOCK and S3-FIFO are
replayed part by part.  OPT needs later accesses, so all are read backwards first.
``plan.readable`` has the same policies with plain data structures, and their sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import numpy as np

from softsgx.errors import SoftSgxError
from softsgx.plan import kernels
from softsgx.plan.curves import stack_distances
from softsgx.plan.numbering import end_of, grown
from softsgx.plan.scene import GOES, MOST_PAGES
from softsgx.plan.spool import Parts, Spool

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MOST_OPT_ACCESSES", "POLICIES", "PolicyName", "lives", "misses"]

PolicyName = Literal["fifo", "lru", "clock", "s3fifo", "opt"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
MOST_OPT_ACCESSES = (1 << 32) - 1
"""The most accesses for OPT, which numbers them with 32 bits."""

_ABSENT = -1
_SMALL_SHARE = 10  # S3-FIFO's small queue has a tenth of the capacity


def lives(parts: Iterable[NDArray[np.uint32]]) -> tuple[Parts, int]:
    """Return accesses in which a page that was made anew has another number, and how many have one.

    Pages that go are left out: a policy keeps them until it evicts them.
    """
    spool, count, current = Spool(), 0, np.empty(0, np.uint32)
    for part in parts:
        flagged = part[part >= GOES]
        pages = end_of(part[part < GOES])
        if len(flagged):
            pages = max(pages, end_of(flagged & np.uint32(MOST_PAGES - 1)))
        current = grown(current, pages, int(kernels.NEVER))
        found, count = kernels.lives(part, current, count)
        spool.append(found)
    return spool, count


def misses(policy: PolicyName, parts: Parts, capacities: Sequence[int]) -> list[int]:
    """Return how many accesses miss at each capacity.

    Args:
        policy: its name.
        parts: the accesses.
        capacities: in pages, each at least 1.

    Raises:
        SoftSgxError: for OPT there are more than ``MOST_OPT_ACCESSES``.
    """
    assert all(capacity > 0 for capacity in capacities), "a capacity without a page"
    if policy == "lru":
        distances = stack_distances(parts)
        return [distances.misses_at(capacity) for capacity in capacities]
    if policy == "opt":
        return _opt(parts, capacities)
    replays = [_STREAMED[policy](capacity) for capacity in capacities]
    for part in parts:
        for replay in replays:
            replay.add(part)
    return [replay.misses for replay in replays]


def _opt(parts: Parts, capacities: Sequence[int]) -> list[int]:
    accesses = pages = 0
    for part in parts:
        accesses += len(part)
        pages = max(pages, end_of(part))
    if accesses > MOST_OPT_ACCESSES:
        raise SoftSgxError(
            f"plan: more than {MOST_OPT_ACCESSES} accesses, more than OPT can number; "
            "choose other policies, or plan with part of the trace"
        )
    upcoming = np.full(pages, kernels.NEVER)
    uses = Spool()
    for part in reversed(parts):
        accesses -= len(part)
        uses.append_part(kernels.next_uses(part, accesses, upcoming))
    replays = [_Opt(capacity, pages) for capacity in capacities]
    for part, part_uses in zip(parts, reversed(uses), strict=True):
        for replay in replays:
            replay.add(part, part_uses)
    return [replay.misses for replay in replays]


class _Opt:
    """OPT at one capacity, which is given accesses and next uses part by part."""

    def __init__(self, capacity: int, pages: int) -> None:
        self.misses = self._size = 0
        self._heap = kernels.Heap(
            pages=np.empty(min(capacity, pages), np.int32),
            places=np.full(pages, _ABSENT, np.int32),
            keys=np.empty(pages, np.uint32),
        )

    def add(self, numbers: NDArray[np.uint32], next_uses: NDArray[np.uint32]) -> None:
        self._size, missed = kernels.opt(numbers, next_uses, self._heap, self._size)
        self.misses += missed


class _Replay(Protocol):
    """A policy at one capacity; it receives accesses part by part.

    Attributes:
        misses: accesses that missed so far.
    """

    misses: int

    def add(self, numbers: NDArray[np.uint32]) -> None:
        """Replay more accesses, each the number of a page."""


class _Clock:
    """A ring of pages whose hand takes one use from each page that it passes.

    With no uses counted it is FIFO, with one it is CLOCK.
    """

    def __init__(self, capacity: int, most_uses: int) -> None:
        self.misses = 0
        self._most_uses = most_uses
        self._uses = np.empty(0, np.int8)
        self._ring = np.empty(capacity, np.int32)
        self._hand = self._size = 0

    def add(self, numbers: NDArray[np.uint32]) -> None:
        self._uses = grown(self._uses, end_of(numbers), _ABSENT)
        self._hand, self._size, missed = kernels.clock(
            numbers, self._uses, self._ring, self._hand, self._size, self._most_uses
        )
        self.misses += missed


class _S3Fifo:
    def __init__(self, capacity: int) -> None:
        self.misses = 0
        small_pages = max(1, capacity // _SMALL_SHARE)
        self._queues = kernels.S3Fifo(
            uses=np.empty(0, np.int8),
            newer=np.empty(0, np.int32),
            older=np.empty(0, np.int32),
            small=np.empty(capacity, np.int32),
            main=np.empty(capacity, np.int32),
            state=kernels.s3fifo_state(small_pages, capacity - small_pages),
        )

    def add(self, numbers: NDArray[np.uint32]) -> None:
        pages, queues = end_of(numbers), self._queues
        self._queues = queues._replace(
            uses=grown(queues.uses, pages, _ABSENT),
            newer=grown(queues.newer, pages, kernels.NO_GHOST),
            older=grown(queues.older, pages, kernels.NO_GHOST),
        )
        self.misses += kernels.s3fifo(numbers, self._queues)


def _fifo(capacity: int) -> _Replay:
    return _Clock(capacity, 0)


def _clock(capacity: int) -> _Replay:
    return _Clock(capacity, 1)


_STREAMED = {"fifo": _fifo, "clock": _clock, "s3fifo": _S3Fifo}
