"""Numbers by page index: four bytes a page where an enclave is dense.

Hot callers read and write :attr:`SparseNumbers.chunks` themselves, to save calls.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

__all__ = ["MASK", "SHIFT", "SparseNumbers"]

SHIFT = 7
MASK = (1 << SHIFT) - 1
_ZEROS = bytes(4 << SHIFT)


class SparseNumbers:
    """A number of 32 bits for each page index; 0 where none was put.

    Attributes:
        chunks: by ``index >> 7``, the numbers of 128 pages; a chunk stays until :meth:`clear`.
        latest: of the compiled core: the chunk that it has used last.
    """

    __slots__ = ("chunks", "latest")

    def __init__(self) -> None:
        self.latest: object = None
        self.chunks: dict[int, array[int]] = {}

    def get(self, index: int) -> int:
        """Return the number of a page."""
        chunk = self.chunks.get(index >> SHIFT)
        return 0 if chunk is None else chunk[index & MASK]

    def put(self, index: int, number: int) -> None:
        """Replace the number of a page.

        Raises:
            OverflowError: it has more than 32 bits.
        """
        chunk = self.chunks.get(index >> SHIFT)
        if chunk is None:
            chunk = self.chunks[index >> SHIFT] = array("I", _ZEROS)
        chunk[index & MASK] = number

    def items(self) -> Iterator[tuple[int, int]]:
        """Yield index and number of each page whose number is not 0; the lowest index first."""
        for high in sorted(self.chunks):
            for low, number in enumerate(self.chunks[high]):
                if number:
                    yield high << SHIFT | low, number

    def clear(self) -> None:
        """Forget every number."""
        self.latest = None
        self.chunks.clear()
