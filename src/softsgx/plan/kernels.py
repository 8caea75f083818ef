"""Kernels of the replacement policies: loops over arrays, which numba compiles.

An access is the number of a page.  ``uses[page]`` is -1 while the page is not resident.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from softsgx.plan.compiled import compiled
from softsgx.plan.scene import GOES, MOST_PAGES

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "NEVER",
    "NO_GHOST",
    "Heap",
    "S3Fifo",
    "clock",
    "lives",
    "next_uses",
    "opt",
    "s3fifo",
    "s3fifo_state",
]

NEVER = np.uint32(0xFFFFFFFF)
"""The next use of a page that is not accessed again."""
NO_GHOST = -2
"""The neighbour of a page that is not among the ghosts."""
_END = -1  # the neighbour of the first or the last ghost
_inlined = partial(compiled, inlined=True)
_MOST_USES = 3  # S3-FIFO counts two bits


@compiled
def clock(
    numbers: NDArray[np.uint32],
    uses: NDArray[np.int8],
    ring: NDArray[np.int32],
    hand: int,
    size: int,
    most_uses: int,
) -> tuple[int, int, int]:
    """Replay CLOCK; return (hand, size, misses)."""
    missed = 0
    for page in numbers:
        if uses[page] >= 0:
            if uses[page] < most_uses:
                uses[page] += 1
            continue
        missed += 1
        if size < len(ring):
            ring[size] = page
            size += 1
        else:
            while uses[ring[hand]] > 0:
                uses[ring[hand]] -= 1
                hand += 1
                if hand == len(ring):
                    hand = 0
            uses[ring[hand]] = -1
            ring[hand] = page
            hand += 1
            if hand == len(ring):
                hand = 0
        uses[page] = 0
    return hand, size, missed


@compiled
def lives(
    numbers: NDArray[np.uint32], current: NDArray[np.uint32], count: int
) -> tuple[NDArray[np.uint32], int]:
    """Number the lifetimes of pages; return the number of each access, and how many there are.

    Args:
        numbers: accesses and removed pages.
        current: the lifetime of each page; ``NEVER``: it is not in the enclave.
        count: lifetimes so far.
    """
    found = np.empty(len(numbers), np.uint32)
    size = 0
    for number in numbers:
        page = number & np.uint32(MOST_PAGES - 1)
        if number >= GOES:
            current[page] = NEVER
            continue
        if current[page] == NEVER:
            current[page] = count
            count += 1
        found[size] = current[page]
        size += 1
    return found[:size].copy(), count


# --- S3-FIFO -------------------------------------------------------------------------------------

# Indices of its state: sizes of the two queues when they are full; first and length of each; the
# oldest and the newest ghost, and how many there are.
_SMALL_PAGES, _MAIN_PAGES = 0, 1
_SMALL_FIRST, _SMALL_LENGTH, _MAIN_FIRST, _MAIN_LENGTH = 2, 3, 4, 5
_OLDEST, _NEWEST, _GHOSTS = 6, 7, 8


class S3Fifo(NamedTuple):
    """The queues of S3-FIFO.

    Attributes:
        uses: of each page; -1: not resident.
        newer: the ghost after each ghost; ``NO_GHOST``: the page is none.
        older: the ghost before each ghost.
        small: ring of new pages, with room for all resident pages.
        main: ring of the other resident pages, of the same size.
        state: a number for each of the names above.
    """

    uses: NDArray[np.int8]
    newer: NDArray[np.int32]
    older: NDArray[np.int32]
    small: NDArray[np.int32]
    main: NDArray[np.int32]
    state: NDArray[np.int64]


def s3fifo_state(small_pages: int, main_pages: int) -> NDArray[np.int64]:
    """Return the state of empty queues."""
    return np.array([small_pages, main_pages, 0, 0, 0, 0, _END, _END, 0], np.int64)


@compiled
def s3fifo(numbers: NDArray[np.uint32], q: S3Fifo) -> int:
    """Replay S3-FIFO; return the misses."""
    uses, state = q.uses, q.state
    missed = 0
    for page in numbers:
        if uses[page] >= 0:
            if uses[page] < _MOST_USES:
                uses[page] += 1
            continue
        missed += 1
        while state[_SMALL_LENGTH] + state[_MAIN_LENGTH] >= len(q.small):
            if state[_SMALL_LENGTH] >= state[_SMALL_PAGES]:
                _evict_from_small(q)
            else:
                _evict_from_main(q)
        if q.newer[page] != NO_GHOST:
            _remove_ghost(q, page)
            _push(q.main, page, state, _MAIN_FIRST)
        else:
            _push(q.small, page, state, _SMALL_FIRST)
        uses[page] = 0
    return missed


@_inlined
def _evict_from_small(q: S3Fifo) -> None:
    uses, state = q.uses, q.state
    while state[_SMALL_LENGTH] > 0:
        page = _pop(q.small, state, _SMALL_FIRST)
        if uses[page] <= 1:
            uses[page] = -1
            if state[_MAIN_PAGES] > 0:
                if state[_GHOSTS] == state[_MAIN_PAGES]:
                    _remove_ghost(q, state[_OLDEST])
                _add_ghost(q, page)
            return
        full = state[_MAIN_LENGTH] >= state[_MAIN_PAGES]
        if full:
            _evict_from_main(q)
        _push(q.main, page, state, _MAIN_FIRST)
        if full:
            return


@_inlined
def _evict_from_main(q: S3Fifo) -> None:
    uses, state = q.uses, q.state
    while state[_MAIN_LENGTH] > 0:
        page = _pop(q.main, state, _MAIN_FIRST)
        uses[page] -= 1
        if uses[page] < 0:
            return
        _push(q.main, page, state, _MAIN_FIRST)


@_inlined
def _push(ring: NDArray[np.int32], page: int, state: NDArray[np.int64], first: int) -> None:
    """Append a page to the queue whose first and length are at ``first`` of the state."""
    place = state[first] + state[first + 1]
    ring[place if place < len(ring) else place - len(ring)] = page
    state[first + 1] += 1


@_inlined
def _pop(ring: NDArray[np.int32], state: NDArray[np.int64], first: int) -> int:
    page: int = ring[state[first]]
    state[first] = state[first] + 1 if state[first] + 1 < len(ring) else 0
    state[first + 1] -= 1
    return page


@_inlined
def _add_ghost(q: S3Fifo, page: int) -> None:
    newer, older, state = q.newer, q.older, q.state
    older[page], newer[page] = state[_NEWEST], _END
    if state[_NEWEST] == _END:
        state[_OLDEST] = page
    else:
        newer[state[_NEWEST]] = page
    state[_NEWEST] = page
    state[_GHOSTS] += 1


@_inlined
def _remove_ghost(q: S3Fifo, page: int) -> None:
    newer, older, state = q.newer, q.older, q.state
    if older[page] == _END:
        state[_OLDEST] = newer[page]
    else:
        newer[older[page]] = newer[page]
    if newer[page] == _END:
        state[_NEWEST] = older[page]
    else:
        older[newer[page]] = older[page]
    newer[page] = older[page] = NO_GHOST
    state[_GHOSTS] -= 1


# --- OPT -----------------------------------------------------------------------------------------


@compiled
def next_uses(
    numbers: NDArray[np.uint32], first: int, upcoming: NDArray[np.uint32]
) -> NDArray[np.uint32]:
    """Return for each access the number of the next access to its page.

    Args:
        numbers: the accesses.
        first: number of the first of them in the trace.
        upcoming: for each page, its next access after ``numbers``; changed to its next access from
            the start of ``numbers``.
    """
    found = np.empty(len(numbers), np.uint32)
    for index in range(len(numbers) - 1, -1, -1):
        page = numbers[index]
        found[index] = upcoming[page]
        upcoming[page] = first + index
    return found


class Heap(NamedTuple):
    """Resident pages; the first is the one whose next access is the latest.

    Attributes:
        pages: the heap.
        places: of each page in the heap; -1: not resident.
        keys: for each resident page, the number of its next access.
    """

    pages: NDArray[np.int32]
    places: NDArray[np.int32]
    keys: NDArray[np.uint32]


@compiled
def opt(
    numbers: NDArray[np.uint32], next_uses: NDArray[np.uint32], heap: Heap, size: int
) -> tuple[int, int]:
    """Replay OPT; return (size, misses).

    Args:
        numbers: the accesses.
        next_uses: the number of the next access to the page of each.
        heap: resident pages.
        size: how many they are.
    """
    missed = 0
    for index in range(len(numbers)):
        page = numbers[index]
        heap.keys[page] = next_uses[index]
        if heap.places[page] >= 0:
            _rise(heap, page, heap.places[page])
            continue
        missed += 1
        if size < len(heap.pages):
            size += 1
            _rise(heap, page, size - 1)
        else:
            heap.places[heap.pages[0]] = -1
            _sink(heap, page)
    return size, missed


@_inlined
def _rise(heap: Heap, page: int, place: int) -> None:
    """Put a page at ``place`` of the heap, or above pages that are accessed earlier."""
    pages, places, keys = heap.pages, heap.places, heap.keys
    while place > 0:
        parent = (place - 1) // 2
        other = pages[parent]
        if keys[other] >= keys[page]:
            break
        pages[place] = other
        places[other] = place
        place = parent
    pages[place] = page
    places[page] = place


@_inlined
def _sink(heap: Heap, page: int) -> None:
    """Put a page in place of the first of the heap, or below pages that are accessed later."""
    pages, places, keys = heap.pages, heap.places, heap.keys
    place = 0
    while True:
        child = 2 * place + 1
        if child >= len(pages):
            break
        if child + 1 < len(pages) and keys[pages[child + 1]] > keys[pages[child]]:
            child += 1
        other = pages[child]
        if keys[other] <= keys[page]:
            break
        pages[place] = other
        places[other] = place
        place = child
    pages[place] = page
    places[page] = place
