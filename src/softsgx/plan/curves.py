"""Exact miss-ratio curves of LRU: one pass over a trace gives the misses at every capacity.

The stack distance of an access is the number of other pages accessed since the last access to its
page.  LRU of a capacity of C pages hits if the distance is less than C, for every C at once.

Method: a time axis has one bit for each page, at the page's last access.  The distance is the
number of later bits.  Counts of bits in blocks of the axis make long distances cheap.  When the
axis is full, the bits are moved together, in order.  ``plan.readable`` has the same with a list.

Source:
    R. L. Mattson et al., "Evaluation techniques for storage hierarchies", IBM Systems Journal 9
    (1970); B. T. Bennett and V. J. Kruskal, "LRU stack processing", IBM Journal of Research and
    Development 19 (1975), counts bits as this does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from softsgx.plan.compiled import compiled, popcount
from softsgx.plan.numbering import end_of, grown

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Distances", "StackDistances", "stack_distances"]

_BLOCK = 1 << 12  # positions whose bits are counted together: 64 words
_SUPERBLOCK = 1 << 18
_LEAST_POSITIONS = _SUPERBLOCK
_MOST_POSITIONS = 1 << 31
_POSITIONS_PER_PAGE = 4  # a quarter of the axis is in use after bits moved together
_NEVER = -1


@dataclass(frozen=True, slots=True, eq=False)
class Distances:
    """How many accesses have which stack distance.

    Attributes:
        counts: of accesses by distance, from 0; as many as pages.
        cold: first accesses to a page, which miss at every capacity.
    """

    counts: NDArray[np.int64]
    cold: int

    @property
    def accesses(self) -> int:
        """All accesses."""
        return self.cold + int(self.counts.sum())

    @property
    def pages(self) -> int:
        """Pages that are used: at this capacity LRU misses first accesses only."""
        return self.cold

    def misses_at(self, capacity: int) -> int:
        """Return the misses of LRU at one capacity in pages."""
        return self.accesses - int(self.counts[:capacity].sum())

    def misses(self) -> NDArray[np.int64]:
        """Return the misses of LRU at the capacities 0, 1, … up to ``pages``."""
        hits = np.concatenate((np.zeros(1, np.int64), np.cumsum(self.counts)))
        return self.accesses - hits


def stack_distances(parts: Iterable[NDArray[np.uint32]]) -> Distances:
    """Return the distances of all accesses of a trace; memory is proportional to its pages.

    Args:
        parts: the numbers of their pages; see :func:`~softsgx.plan.numbering.numbered`.
    """
    distances = StackDistances()
    for part in parts:
        distances.add(part)
    return distances.result()


class StackDistances:
    """Counts distances, part by part."""

    def __init__(self) -> None:
        self._pages = self._now = 0
        self._last = np.empty(0, np.int32)  # position of a page's last access
        self._counts = np.empty(0, np.int64)
        self._clear_axis(_LEAST_POSITIONS)

    def add(self, numbers: NDArray[np.uint32]) -> None:
        """Count more accesses, each the number of a page."""
        pages = end_of(numbers)
        self._last = grown(self._last, pages, _NEVER)
        self._counts = grown(self._counts, pages, 0)
        done = 0
        while True:
            done, self._now, self._pages = _count(
                numbers,
                done,
                self._last,
                self._counts,
                self._bits,
                self._blocks,
                self._superblocks,
                self._now,
                self._pages,
            )
            if done == len(numbers):
                return
            self._move_together()

    def result(self) -> Distances:
        """Return the counts."""
        return Distances(self._counts[: self._pages].copy(), self._pages)

    def _move_together(self) -> None:
        before = np.concatenate(
            (np.zeros(1, np.int64), np.cumsum(np.bitwise_count(self._bits), dtype=np.int64))
        )
        bits = self._bits
        wanted = max(_LEAST_POSITIONS, _POSITIONS_PER_PAGE * self._pages)
        assert wanted < _MOST_POSITIONS, f"{self._pages} pages: positions have 31 bits"
        self._clear_axis(-(-wanted // _SUPERBLOCK) * _SUPERBLOCK)
        _place(self._last, bits, before, self._bits, self._blocks, self._superblocks)
        self._now = self._pages

    def _clear_axis(self, positions: int) -> None:
        self._bits = np.zeros(positions // 64, np.uint64)
        self._blocks = np.zeros(positions // _BLOCK, np.int32)
        self._superblocks = np.zeros(positions // _SUPERBLOCK, np.int32)


@compiled
def _count(
    numbers: NDArray[np.uint32],
    done: int,
    last: NDArray[np.int32],
    counts: NDArray[np.int64],
    bits: NDArray[np.uint64],
    blocks: NDArray[np.int32],
    superblocks: NDArray[np.int32],
    now: int,
    cold: int,
) -> tuple[int, int, int]:
    """Count ``numbers[done:]`` until the axis is full; return (done, now, cold)."""
    positions = len(bits) * 64
    for index in range(done, len(numbers)):
        page = numbers[index]
        position = last[page]
        if position == now - 1 and now > 0:
            counts[0] += 1
            continue
        if now == positions:
            return index, now, cold
        if position == _NEVER:
            cold += 1
        else:
            word = position >> 6
            block, superblock = position >> 12, position >> 18
            distance = popcount(bits[word] >> np.uint64(position & 63)) - np.uint64(1)
            last_word = min((block << 6) + 63, now >> 6)
            for other in range(word + 1, last_word + 1):
                distance += popcount(bits[other])
            last_block = min((superblock << 6) + 63, now >> 12)
            far = 0
            for other in range(block + 1, last_block + 1):
                far += blocks[other]
            for other in range(superblock + 1, (now >> 18) + 1):
                far += superblocks[other]
            counts[np.int64(distance) + far] += 1
            bits[word] &= ~(np.uint64(1) << np.uint64(position & 63))
            blocks[block] -= 1
            superblocks[superblock] -= 1
        bits[now >> 6] |= np.uint64(1) << np.uint64(now & 63)
        blocks[now >> 12] += 1
        superblocks[now >> 18] += 1
        last[page] = now
        now += 1
    return len(numbers), now, cold


@compiled
def _place(
    last: NDArray[np.int32],
    bits: NDArray[np.uint64],
    before: NDArray[np.int64],
    new_bits: NDArray[np.uint64],
    new_blocks: NDArray[np.int32],
    new_superblocks: NDArray[np.int32],
) -> None:
    """Move each page's bit to the number of bits before it on the old axis."""
    for page in range(len(last)):
        position = last[page]
        if position == _NEVER:
            continue
        below = (np.uint64(1) << np.uint64(position & 63)) - np.uint64(1)
        word = position >> 6
        new = before[word] + np.int64(popcount(bits[word] & below))
        last[page] = new
        new_bits[new >> 6] |= np.uint64(1) << np.uint64(new & 63)
        new_blocks[new >> 12] += 1
        new_superblocks[new >> 18] += 1
