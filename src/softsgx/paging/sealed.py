"""Ciphertexts and MACs of evicted pages, side by side in blocks of memory."""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from softsgx.arch import PAGE_BYTES
from softsgx.compiled import speedups
from softsgx.paging.sparse import MASK, SHIFT, SparseNumbers

__all__ = ["BLOCK_PAGES", "SEALED_BYTES", "SealedPages"]

SEALED_BYTES = PAGE_BYTES + 16
"""Of a page: ciphertext and MAC."""
BLOCK_PAGES = 255
"""Pages of a block, which is a mapping of nearly 1 MiB.  Only what was written takes memory."""

if TYPE_CHECKING or speedups is None:

    def free_places(places: Iterable[int]) -> array[int]:
        """Return an array of places; the last is taken next."""
        return array("I", places)
else:
    free_places = speedups.Places


class SealedPages:
    """By page index, the ciphertext ‖ MAC of an evicted page: 4112 bytes, and 8 for its place.

    An object of ``bytes`` for each page would take 48 bytes more, and a dictionary about 40.  The
    place of a page that was dropped is used again.  All blocks but one are freed when the last page
    is dropped.

    Attributes:
        free: places that no page has.
    """

    __slots__ = ("_blocks", "_places", "free")

    def __init__(self) -> None:
        self._blocks: list[memoryview] = []
        self.free = free_places(())
        self._places = SparseNumbers()  # plus one

    def __len__(self) -> int:
        return len(self._blocks) * BLOCK_PAGES - len(self.free)

    def __contains__(self, index: int) -> bool:
        return self._places.get(index) > 0

    def get(self, index: int) -> memoryview | None:
        """Return a page, which may change once it is dropped; ``None``: none is at ``index``."""
        chunk = self._places.chunks.get(index >> SHIFT)
        place = 0 if chunk is None else chunk[index & MASK]
        if not place:
            return None
        place -= 1
        at = place % BLOCK_PAGES * SEALED_BYTES
        return self._blocks[place // BLOCK_PAGES][at : at + SEALED_BYTES]

    def put(self, index: int, sealed: bytes) -> None:
        """Keep a page; an older one at ``index`` is replaced."""
        chunk = self._places.chunks.get(index >> SHIFT)
        place = 0 if chunk is None else chunk[index & MASK]
        if not place:
            if not self.free:
                self.make_room(1)
            place = self.free.pop() + 1
            if chunk is None:
                self._places.put(index, place)
            else:
                chunk[index & MASK] = place
        place -= 1
        at = place % BLOCK_PAGES * SEALED_BYTES
        self._blocks[place // BLOCK_PAGES][at : at + SEALED_BYTES] = sealed

    def make_room(self, pages: int) -> None:
        """Allocate blocks until ``pages`` more pages can be put.

        Raises:
            OSError: there is no memory.
        """
        while len(self.free) < pages:
            first = len(self._blocks) * BLOCK_PAGES
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._blocks.append(memoryview(mmap.mmap(-1, BLOCK_PAGES * SEALED_BYTES, flags=flags)))
            self.free.extend(range(first + BLOCK_PAGES - 1, first - 1, -1))

    def drop(self, index: int) -> None:
        """Forget the page at ``index``.

        Raises:
            KeyError: there is none.
        """
        chunk = self._places.chunks.get(index >> SHIFT)
        place = 0 if chunk is None else chunk[index & MASK]
        if chunk is None or not place:
            raise KeyError(index)
        chunk[index & MASK] = 0
        free = self.free
        free.append(place - 1)
        if len(free) == len(self._blocks) * BLOCK_PAGES and len(self._blocks) > 1:
            self._shrink(1)

    def items(self) -> Iterator[tuple[int, bytes]]:
        """Yield index and bytes of each page, the lowest index first."""
        for index, place in self._places.items():
            block, at = divmod(place - 1, BLOCK_PAGES)
            yield index, bytes(self._blocks[block][at * SEALED_BYTES : (at + 1) * SEALED_BYTES])

    def clear(self) -> None:
        """Forget every page, and free the memory."""
        self._places.clear()
        self._shrink(0)

    def _shrink(self, blocks: int) -> None:
        """Free all blocks but the first ``blocks``; there is no page."""
        del self._blocks[blocks:]
        # A new one: the compiled core's holds blocks that it has used.
        self.free = free_places(range(blocks * BLOCK_PAGES - 1, -1, -1))
