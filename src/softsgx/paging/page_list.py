"""Lists of EPC pages, oldest first: those that can be reclaimed, and those that are free.

A page is on one list at most.  So the compiled core links the pages themselves: a list takes no
memory for a page beyond its links, and appends and removes without a search.  ``ReadablePageList``
is the same in Python.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING

from softsgx.compiled import speedups
from softsgx.paging.page import SgxEpcPage

__all__ = ["PageList", "PageQueue", "ReadablePageList"]


class ReadablePageList(OrderedDict[SgxEpcPage, None]):
    """Pages in the order in which they were added; each can be removed."""

    __slots__ = ()

    def append(self, page: SgxEpcPage) -> None:
        """Add a page that is on no list, as the youngest."""
        self[page] = None

    def popleft(self) -> SgxEpcPage:
        """Remove and return the oldest page."""
        return self.popitem(last=False)[0]

    def remove(self, page: SgxEpcPage) -> None:
        """Take a page off the list.

        Raises:
            KeyError: it is not on the list.
        """
        del self[page]

    def remove_all(self, pages: list[SgxEpcPage]) -> None:
        """As :meth:`remove`, for each of several pages."""
        for page in pages:
            del self[page]


if TYPE_CHECKING or speedups is None:
    PageList = ReadablePageList
    #: A list of which only the oldest page is removed.
    PageQueue = deque[SgxEpcPage]
else:
    PageList = PageQueue = speedups.PageList
