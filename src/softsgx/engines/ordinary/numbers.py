"""Numbers of pages in a trace: small numbers, which keep neighbouring pages adjacent.

An address space is large and sparse.  Blocks of 2 MiB are numbered in the order in which they are
accessed first.
"""

from __future__ import annotations

__all__ = ["PageNumbers"]

_SHIFT = 9
_MASK = (1 << _SHIFT) - 1


class PageNumbers:
    """The numbers of the pages of one address space; a page is an address divided by 4096."""

    def __init__(self) -> None:
        self._blocks: dict[int, int] = {}
        self._known: list[int] = []

    def number(self, page: int) -> int:
        """Return the number of a page."""
        block = self._blocks.get(page >> _SHIFT)
        if block is None:
            block = self._blocks[page >> _SHIFT] = len(self._known)
            self._known.append(page >> _SHIFT)
        return block << _SHIFT | page & _MASK

    def page(self, number: int) -> int:
        """Return the page of a number that :meth:`number` has returned."""
        return self._known[number >> _SHIFT] << _SHIFT | number & _MASK

    @property
    def end(self) -> int:
        """Return a number above those of all pages."""
        return len(self._known) << _SHIFT
