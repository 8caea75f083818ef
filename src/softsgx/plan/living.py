"""Which pages are in their enclaves while traces are read: what goes, and what is gone already."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from softsgx.plan.compiled import compiled
from softsgx.plan.numbering import grown
from softsgx.plan.scene import ENDS, GOES

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Living"]

_GOES, _BOTH = np.uint32(GOES), np.uint32(GOES | ENDS)


class Living:
    """The pages of all traces that are in their enclaves.

    Numbers are those of pages in order of first use; an owner is the upper part of a page's key,
    which tells its trace and its enclave.
    """

    def __init__(self) -> None:
        self._there = np.empty(0, np.bool)
        self._owners = np.empty(0, np.uint32)

    def access(self, numbers: NDArray[np.uint32], owners: NDArray[np.uint32], pages: int) -> None:
        """Pages are accessed, so they are there.

        Args:
            numbers: of the pages.
            owners: of each of them.
            pages: all numbers are below.
        """
        self.own(numbers, owners, pages)
        self._there[numbers] = True

    def own(self, numbers: NDArray[np.uint32], owners: NDArray[np.uint32], pages: int) -> None:
        """Note the owners of pages; see :meth:`access`."""
        self._there = grown(self._there, pages, False)
        self._owners = grown(self._owners, pages, 0)
        self._owners[numbers] = owners

    def removals(self, numbers: NDArray[np.uint32]) -> NDArray[np.bool]:
        """Follow accesses and removals (with ``GOES``) in order.

        Returns:
            Which of them to keep: a page that is not there cannot go.
        """
        keep = np.ones(len(numbers), np.bool)
        _follow(numbers, self._there, keep)
        return keep

    def end(self, owner: int) -> NDArray[np.uint32]:
        """An enclave ends: return the removals of its pages, and its end."""
        own = np.flatnonzero(self._owners == owner).astype(np.uint32)
        gone = own[self._there[own]]
        self._there[gone] = False
        return np.concatenate((gone | _GOES, own[:1] | _BOTH))


@compiled
def _follow(numbers: NDArray[np.uint32], there: NDArray[np.bool], keep: NDArray[np.bool]) -> None:
    for index in range(len(numbers)):
        number = numbers[index]
        if number < GOES:
            there[number] = True
        else:
            page = number & np.uint32(GOES - 1)
            keep[index] = there[page]
            there[page] = False
