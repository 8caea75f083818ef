"""Kernels of the replacement policies: loops over arrays, which numba compiles.

An access is the number of a page.  ``uses[page]`` is -1 while the page is not resident.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from softsgx.plan.compiled import compiled
from softsgx.plan.scene import GOES, MOST_PAGES

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["NEVER", "NO_GHOST", "clock", "lives", "next_uses", "opt", "s3fifo", "s3fifo_state"]

NEVER = np.uint32(0xFFFFFFFF)
"""The next use of a page that is not accessed again."""
NO_GHOST = -2
"""The neighbour of a page that is not among the ghosts."""
_END = -1  # the neighbour of the first or the last ghost
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


def s3fifo_state(small_pages: int, main_pages: int) -> NDArray[np.int64]:
    """Return the state of empty queues."""
    return np.array([small_pages, main_pages, 0, 0, 0, 0, _END, _END, 0], np.int64)


@compiled
def s3fifo(
    numbers: NDArray[np.uint32],
    uses: NDArray[np.int8],
    small: NDArray[np.int32],
    main: NDArray[np.int32],
    newer: NDArray[np.int32],
    older: NDArray[np.int32],
    state: NDArray[np.int64],
) -> int:
    """Replay S3-FIFO; return the misses.

    Args:
        numbers: the accesses.
        uses: of resident pages.
        small: ring of new pages, with room for all resident pages.
        main: ring of the other resident pages, of the same size.
        newer: the ghost after each ghost.
        older: the ghost before each ghost.
        state: see :func:`s3fifo_state`.
    """
    missed = 0
    for page in numbers:
        if uses[page] >= 0:
            if uses[page] < _MOST_USES:
                uses[page] += 1
            continue
        missed += 1
        while state[_SMALL_LENGTH] + state[_MAIN_LENGTH] >= len(small):
            if state[_SMALL_LENGTH] >= state[_SMALL_PAGES]:
                _evict_from_small(uses, small, main, newer, older, state)
            else:
                _evict_from_main(uses, main, state)
        if newer[page] != NO_GHOST:
            _remove_ghost(page, newer, older, state)
            _push(main, page, state, _MAIN_FIRST)
        else:
            _push(small, page, state, _SMALL_FIRST)
        uses[page] = 0
    return missed


@compiled
def _evict_from_small(
    uses: NDArray[np.int8],
    small: NDArray[np.int32],
    main: NDArray[np.int32],
    newer: NDArray[np.int32],
    older: NDArray[np.int32],
    state: NDArray[np.int64],
) -> None:
    while state[_SMALL_LENGTH] > 0:
        page = _pop(small, state, _SMALL_FIRST)
        if uses[page] <= 1:
            uses[page] = -1
            if state[_MAIN_PAGES] > 0:
                if state[_GHOSTS] == state[_MAIN_PAGES]:
                    _remove_ghost(state[_OLDEST], newer, older, state)
                _add_ghost(page, newer, older, state)
            return
        full = state[_MAIN_LENGTH] >= state[_MAIN_PAGES]
        if full:
            _evict_from_main(uses, main, state)
        _push(main, page, state, _MAIN_FIRST)
        if full:
            return


@compiled
def _evict_from_main(
    uses: NDArray[np.int8], main: NDArray[np.int32], state: NDArray[np.int64]
) -> None:
    while state[_MAIN_LENGTH] > 0:
        page = _pop(main, state, _MAIN_FIRST)
        uses[page] -= 1
        if uses[page] < 0:
            return
        _push(main, page, state, _MAIN_FIRST)


@compiled
def _push(ring: NDArray[np.int32], page: int, state: NDArray[np.int64], first: int) -> None:
    """Append a page to the queue whose first and length are at ``first`` of the state."""
    place = state[first] + state[first + 1]
    ring[place if place < len(ring) else place - len(ring)] = page
    state[first + 1] += 1


@compiled
def _pop(ring: NDArray[np.int32], state: NDArray[np.int64], first: int) -> int:
    page: int = ring[state[first]]
    state[first] = state[first] + 1 if state[first] + 1 < len(ring) else 0
    state[first + 1] -= 1
    return page


@compiled
def _add_ghost(
    page: int, newer: NDArray[np.int32], older: NDArray[np.int32], state: NDArray[np.int64]
) -> None:
    older[page], newer[page] = state[_NEWEST], _END
    if state[_NEWEST] == _END:
        state[_OLDEST] = page
    else:
        newer[state[_NEWEST]] = page
    state[_NEWEST] = page
    state[_GHOSTS] += 1


@compiled
def _remove_ghost(
    page: int, newer: NDArray[np.int32], older: NDArray[np.int32], state: NDArray[np.int64]
) -> None:
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


@compiled
def opt(
    numbers: NDArray[np.uint32],
    next_uses: NDArray[np.uint32],
    heap: NDArray[np.int32],
    places: NDArray[np.int32],
    keys: NDArray[np.uint32],
    size: int,
) -> tuple[int, int]:
    """Replay OPT; return (size, misses).

    Args:
        numbers: the accesses.
        next_uses: the number of the next access to the page of each.
        heap: resident pages; the first is the one whose next access is the latest.
        places: of pages in the heap; -1: not resident.
        keys: number of the next access to a resident page.
        size: of the heap.
    """
    missed = 0
    for index in range(len(numbers)):
        page = numbers[index]
        keys[page] = next_uses[index]
        if places[page] >= 0:
            _rise(page, places[page], heap, places, keys)
            continue
        missed += 1
        if size < len(heap):
            size += 1
            _rise(page, size - 1, heap, places, keys)
        else:
            places[heap[0]] = -1
            _sink(page, heap, places, keys)
    return size, missed


@compiled
def _rise(
    page: int,
    place: int,
    heap: NDArray[np.int32],
    places: NDArray[np.int32],
    keys: NDArray[np.uint32],
) -> None:
    """Put a page at ``place`` of the heap, or above pages that are accessed earlier."""
    while place > 0:
        parent = (place - 1) // 2
        other = heap[parent]
        if keys[other] >= keys[page]:
            break
        heap[place] = other
        places[other] = place
        place = parent
    heap[place] = page
    places[page] = place


@compiled
def _sink(
    page: int,
    heap: NDArray[np.int32],
    places: NDArray[np.int32],
    keys: NDArray[np.uint32],
) -> None:
    """Put a page in place of the first of the heap, or below pages that are accessed later."""
    place = 0
    while True:
        child = 2 * place + 1
        if child >= len(heap):
            break
        if child + 1 < len(heap) and keys[heap[child + 1]] > keys[heap[child]]:
            child += 1
        other = heap[child]
        if keys[other] <= keys[page]:
            break
        heap[place] = other
        places[other] = place
        place = child
    heap[place] = page
    places[page] = place
