"""Exact miss-ratio curves of LRU: one pass over a trace gives the misses at every capacity.

The stack distance of an access is the number of other pages accessed since the last access to its
page.  LRU of a capacity of C pages hits if the distance is less than C, for every C at once.

Method: a time axis has one bit for each page, at the page's last access.  The distance is the
number of later bits.  Counts of bits in blocks of the axis make long distances cheap.  When the
axis is full, the bits are moved together, in order.  ``plan.readable`` has the same with a list.

A page that leaves its enclave frees a frame in each cache that has it.  Its bit stays, as a *hole*.
An access to a page that is below the latest hole, or nowhere, fills that hole in the caches that
miss: its bit is cleared.  Where the page was, it leaves another hole, for the caches that hit.

Source:
    R. L. Mattson et al., "Evaluation techniques for storage hierarchies", IBM Systems Journal 9
    (1970); B. T. Bennett and V. J. Kruskal, "LRU stack processing", IBM Journal of Research and
    Development 19 (1975), counts bits as this does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from softsgx.plan.compiled import compiled, popcount
from softsgx.plan.numbering import end_of, grown
from softsgx.plan.scene import GOES, MOST_PAGES

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Distances", "StackDistances", "stack_distances"]

_WORD = 64
_FAN = 64  # words of a block, blocks of a superblock
_BLOCK = _WORD * _FAN
_SUPERBLOCK = _BLOCK * _FAN
_LEAST_POSITIONS = _SUPERBLOCK
_MOST_POSITIONS = 1 << 31
_POSITIONS_PER_PAGE = 4  # a quarter of the axis is in use after bits moved together
_NEVER = -1
_inlined = partial(compiled, inlined=True)


@dataclass(frozen=True, slots=True, eq=False)
class Distances:
    """How many accesses have which stack distance.

    Attributes:
        counts: of accesses by distance, from 0; as many as pages.
        cold: first accesses to a page, and to one made anew, which miss at every capacity.
    """

    counts: NDArray[np.int64]
    cold: int

    @property
    def accesses(self) -> int:
        """All accesses."""
        return self.cold + int(self.counts.sum())

    @property
    def pages(self) -> int:
        """The most pages at once: at this capacity LRU misses first accesses only."""
        return len(self.counts)

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


class _Axis(NamedTuple):
    """A time axis; its length is a multiple of a superblock's.

    Attributes:
        bits: one for each position, 64 in a word.
        in_block: for each word, the bits before it in its block.
        in_superblock: for each block, the bits before it in its superblock.
        before: for each superblock, the bits before it.
    """

    bits: NDArray[np.uint64]
    in_block: NDArray[np.uint16]
    in_superblock: NDArray[np.int32]
    before: NDArray[np.int64]

    @classmethod
    def of(cls, pages: int, positions: int) -> _Axis:
        """Return an axis whose first bits are set, one for each page."""
        full, rest = divmod(pages, _WORD)
        bits = np.zeros(positions // _WORD, np.uint64)
        bits[:full] = ~np.uint64(0)
        bits[full] = (1 << rest) - 1
        words = np.arange(positions // _WORD)
        return cls(
            bits,
            (words % _FAN * _WORD).astype(np.uint16),
            (words[: positions // _BLOCK] % _FAN * _BLOCK).astype(np.int32),
            words[: positions // _SUPERBLOCK] * _SUPERBLOCK,
        )


class StackDistances:
    """Counts distances, part by part."""

    def __init__(self) -> None:
        self._depth = self._cold = self._now = 0  # bits of the axis; first accesses; its end
        self._last = np.empty(0, np.int32)  # position of a page's last access
        self._counts = np.empty(0, np.int64)
        self._holes = np.zeros(1, np.int32)  # how many; then a heap of positions, the latest first
        self._axis = _Axis.of(0, _LEAST_POSITIONS)

    def add(self, numbers: NDArray[np.uint32]) -> None:
        """Count more accesses, each the number of a page, and pages that go (``GOES``)."""
        pages = end_of(numbers)
        if pages > GOES or self._holes[0]:
            self._add_with_holes(numbers)
            return
        self._last = grown(self._last, pages, _NEVER)
        self._counts = grown(self._counts, pages, 0)
        done = 0
        while True:
            before = self._depth
            done, self._now, self._depth = _count(
                numbers, done, self._last, self._counts, self._axis, self._now, self._depth
            )
            self._cold += self._depth - before
            if done == len(numbers):
                return
            self._move_together()

    def _add_with_holes(self, numbers: NDArray[np.uint32]) -> None:
        pages = end_of(numbers & np.uint32(MOST_PAGES - 1))
        self._last = grown(self._last, pages, _NEVER)
        self._counts = grown(self._counts, pages, 0)
        self._holes = grown(self._holes, len(self._last) + 1, 0)
        done = 0
        while True:
            done, self._now, self._depth, self._cold = _count_with_holes(
                numbers,
                done,
                self._last,
                self._counts,
                self._axis,
                self._holes,
                self._now,
                self._depth,
                self._cold,
            )
            if done == len(numbers):
                return
            self._move_together()

    def result(self) -> Distances:
        """Return the distances so far."""
        return Distances(self._counts[: self._depth].copy(), self._cold)

    def _move_together(self) -> None:
        wanted = max(_LEAST_POSITIONS, _POSITIONS_PER_PAGE * self._depth)
        assert wanted < _MOST_POSITIONS, f"{self._depth} pages: positions have 31 bits"
        _place(self._last, self._axis)
        _place(self._holes[1 : self._holes[0] + 1], self._axis)
        self._axis = _Axis.of(self._depth, -(-wanted // _SUPERBLOCK) * _SUPERBLOCK)
        self._now = self._depth


@compiled
def _count(
    numbers: NDArray[np.uint32],
    done: int,
    last: NDArray[np.int32],
    counts: NDArray[np.int64],
    axis: _Axis,
    now: int,
    pages: int,
) -> tuple[int, int, int]:
    """Count ``numbers[done:]`` until the axis is full; return (done, now, pages)."""
    positions = len(axis.bits) * _WORD
    for index in range(done, len(numbers)):
        page = numbers[index]
        position = last[page]
        if position == now - 1 and now > 0:
            counts[0] += 1
            continue
        if now == positions:
            return index, now, pages
        if position == _NEVER:
            pages += 1
        else:
            counts[pages - _rank(axis, position)] += 1
            _clear(axis, position)
        if now & (_WORD - 1) == 0:
            _begin_word(axis, now)
        axis.bits[now >> 6] |= np.uint64(1) << np.uint64(now & 63)
        last[page] = now
        now += 1
    return len(numbers), now, pages


@_inlined
def _rank(axis: _Axis, position: int) -> int:
    """Return the number of bits up to a position, itself included."""
    word, block, superblock = position >> 6, position >> 12, position >> 18
    own = popcount(axis.bits[word] << np.uint64(63 - (position & 63)))
    rank: int = (
        axis.before[superblock] + axis.in_superblock[block] + axis.in_block[word] + np.int64(own)
    )
    return rank


@_inlined
def _clear(axis: _Axis, position: int) -> None:
    """Clear a bit, and count one less behind it; loops of one length need no branches."""
    word, block = np.uint64(position >> 6), np.uint64(position >> 12)
    axis.bits[word] &= ~(np.uint64(1) << np.uint64(position & 63))
    first, inside = word & ~np.uint64(_FAN - 1), word & np.uint64(_FAN - 1)
    for at in range(np.uint64(_FAN)):
        axis.in_block[first + at] -= np.uint16(at > inside)
    first, inside = block & ~np.uint64(_FAN - 1), block & np.uint64(_FAN - 1)
    for at in range(np.uint64(_FAN)):
        axis.in_superblock[first + at] -= np.int32(at > inside)
    for other in range((position >> 18) + 1, len(axis.before)):
        axis.before[other] -= 1


@_inlined
def _begin_word(axis: _Axis, now: int) -> None:
    """Count the bits before a word, of which none was set yet.

    No bits are before the first word of a block in it, nor before the first block of a superblock.
    """
    word, block, superblock = now >> 6, now >> 12, now >> 18
    if word == 0:
        return
    bits = axis.in_block[word - 1] + np.int64(popcount(axis.bits[word - 1]))
    if now & (_BLOCK - 1):
        axis.in_block[word] = bits
        return
    bits += axis.in_superblock[block - 1]
    if now & (_SUPERBLOCK - 1):
        axis.in_superblock[block] = bits
        return
    axis.before[superblock] = axis.before[superblock - 1] + bits


@compiled
def _place(last: NDArray[np.int32], axis: _Axis) -> None:
    """Move each page to the number of bits before its own."""
    for page in range(len(last)):
        if last[page] != _NEVER:
            last[page] = _rank(axis, last[page]) - 1


# --- with pages that go ---------------------------------------------------------------------------


@compiled
def _count_with_holes(
    numbers: NDArray[np.uint32],
    done: int,
    last: NDArray[np.int32],
    counts: NDArray[np.int64],
    axis: _Axis,
    holes: NDArray[np.int32],
    now: int,
    depth: int,
    cold: int,
) -> tuple[int, int, int, int]:
    """As :func:`_count`, also where pages go; return (done, now, depth, cold)."""
    positions = len(axis.bits) * _WORD
    for index in range(done, len(numbers)):
        page = numbers[index] & np.uint32(MOST_PAGES - 1)
        position = last[page]
        if numbers[index] >= GOES:
            if position != _NEVER:
                last[page] = _NEVER
                _push(holes, position)
            continue
        if position == now - 1 and now > 0:
            counts[0] += 1
            continue
        if now == positions:
            return index, now, depth, cold
        if position == _NEVER:
            cold += 1
            if holes[0]:
                _clear(axis, _pop(holes))
            else:
                depth += 1
        else:
            counts[depth - _rank(axis, position)] += 1
            if holes[0] and holes[1] > position:
                _clear(axis, _pop(holes))
                _push(holes, position)
            else:
                _clear(axis, position)
        if now & (_WORD - 1) == 0:
            _begin_word(axis, now)
        axis.bits[now >> 6] |= np.uint64(1) << np.uint64(now & 63)
        last[page] = now
        now += 1
    return len(numbers), now, depth, cold


@compiled
def _push(heap: NDArray[np.int32], value: int) -> None:
    """Add a value to a heap whose largest value is ``heap[1]``; ``heap[0]`` counts them."""
    heap[0] += 1
    place = np.int64(heap[0])
    while place > 1 and heap[place >> 1] < value:
        heap[place] = heap[place >> 1]
        place >>= 1
    heap[place] = value


@compiled
def _pop(heap: NDArray[np.int32]) -> int:
    """Remove the largest value of a heap, and return it."""
    largest, moved = heap[1], heap[heap[0]]
    heap[0] -= 1
    size, place = np.int64(heap[0]), 1
    while True:
        child = 2 * place
        if child > size:
            break
        if child < size and heap[child + 1] > heap[child]:
            child += 1
        if heap[child] <= moved:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = moved
    return np.int64(largest)  # type: ignore[return-value]
