"""Pages of all enclaves of a trace, numbered from 0 in order of first use.

A page's key is ``enclave << 32 | page`` (:attr:`softsgx.accesses.Chunk.keys`).  Memory is
proportional to the number of pages that are used, not to the ranges of enclaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from softsgx.plan.compiled import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from softsgx.accesses import Chunk

__all__ = ["PageNumbers", "end_of", "grown", "numbered"]

Scalar = TypeVar("Scalar", bound=np.generic)

_LEAST_SLOTS = 1 << 12
_EMPTY = np.uint32(0xFFFFFFFF)
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio


class PageNumbers:
    """Numbers keys: a hash table with open addressing, at most half full.

    Attributes:
        pages: how many keys have a number.
    """

    def __init__(self) -> None:
        self.pages = 0
        self._clear(_LEAST_SLOTS)

    def _clear(self, slots: int) -> None:
        self._keys = np.empty(slots, np.uint64)
        self._numbers = np.full(slots, _EMPTY)

    def of(self, keys: NDArray[np.uint64]) -> NDArray[np.uint32]:
        """Return the number of each key."""
        found = np.empty(len(keys), np.uint32)
        done = 0
        while True:
            done, self.pages = _number(keys, done, found, self._keys, self._numbers, self.pages)
            if done == len(keys):
                return found
            self._grow()

    def known(self, keys: NDArray[np.uint64]) -> NDArray[np.bool]:
        """Return which keys have a number."""
        found = np.empty(len(keys), np.bool)
        _known(keys, found, self._keys, self._numbers)
        return found

    def keys(self) -> NDArray[np.uint64]:
        """Return the key of each number."""
        used = self._numbers != _EMPTY
        keys: NDArray[np.uint64] = self._keys[used][np.argsort(self._numbers[used])]
        return keys

    def _grow(self) -> None:
        keys = self.keys()
        self._clear(2 * len(self._keys))
        _number(keys, 0, np.empty(len(keys), np.uint32), self._keys, self._numbers, 0)


def numbered(chunks: Iterable[Chunk]) -> Iterator[NDArray[np.uint32]]:
    """Yield the numbers of the pages that each chunk accesses."""
    numbers = PageNumbers()
    for chunk in chunks:
        yield numbers.of(chunk.accesses.keys)


def end_of(numbers: NDArray[np.uint32]) -> int:
    """Return one more than the largest number."""
    return int(numbers.max()) + 1 if len(numbers) else 0


def grown(array: NDArray[Scalar], size: int, fill: int) -> NDArray[Scalar]:
    """Return ``array``, copied into a larger one if it has fewer than ``size`` elements."""
    if size <= len(array):
        return array
    larger = np.full(max(size, 2 * len(array)), fill, array.dtype)
    larger[: len(array)] = array
    return larger


@compiled
def _number(
    keys: NDArray[np.uint64],
    done: int,
    found: NDArray[np.uint32],
    table_keys: NDArray[np.uint64],
    table_numbers: NDArray[np.uint32],
    pages: int,
) -> tuple[int, int]:
    """Number ``keys[done:]`` until the table is half full; return (done, pages)."""
    mask = np.uint64(len(table_keys) - 1)
    most = len(table_keys) // 2
    for index in range(done, len(keys)):
        key = keys[index]
        mixed = key * _MIX
        slot = (mixed ^ (mixed >> np.uint64(32))) & mask
        while table_numbers[slot] != _EMPTY and table_keys[slot] != key:
            slot = (slot + np.uint64(1)) & mask
        if table_numbers[slot] == _EMPTY:
            if pages == most:
                return index, pages
            table_keys[slot] = key
            table_numbers[slot] = pages
            pages += 1
        found[index] = table_numbers[slot]
    return len(keys), pages


@compiled
def _known(
    keys: NDArray[np.uint64],
    found: NDArray[np.bool],
    table_keys: NDArray[np.uint64],
    table_numbers: NDArray[np.uint32],
) -> None:
    mask = np.uint64(len(table_keys) - 1)
    for index in range(len(keys)):
        key = keys[index]
        mixed = key * _MIX
        slot = (mixed ^ (mixed >> np.uint64(32))) & mask
        while table_numbers[slot] != _EMPTY and table_keys[slot] != key:
            slot = (slot + np.uint64(1)) & mask
        found[index] = table_numbers[slot] != _EMPTY
