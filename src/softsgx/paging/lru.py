"""LRU lists of reclaimable pages, oldest first: one list a group.

A page on a list has ``tracked`` set and is in ``_pages``.  A page that a batch has isolated keeps
``tracked`` and its ``lru``, but is not in ``_pages``; this distinguishes it without another flag.

Lock order: the latch of a list is the innermost lock; ``Reclaimable.get`` is called under it.

Source:
    ``sgx_active_page_list`` and ``sgx_{mark,unmark}_page_reclaimable()``, main.c; one list a
    cgroup as in the EPC cgroup series, v17.
"""

from __future__ import annotations

from collections.abc import Iterator

from softsgx.paging.page import SgxEpcPage
from softsgx.paging.page_list import PageList
from softsgx.runtime import Runtime

__all__ = ["Lru"]


class Lru:
    """The reclaimable pages of one group, in the order in which they were added.

    Attributes:
        pages: the pages, oldest first.
    """

    __slots__ = (
        "_latch",
        "pages",
    )

    def __init__(self, runtime: Runtime) -> None:
        self._latch = runtime.latch()
        self.pages = PageList()

    def __len__(self) -> int:
        return len(self.pages)

    def __iter__(self) -> Iterator[SgxEpcPage]:
        """Yield the pages, oldest first; for checkers."""
        return iter(list(self.pages))

    def __contains__(self, page: SgxEpcPage) -> bool:
        return page in self.pages

    def add(self, page: SgxEpcPage) -> None:
        """Track ``page`` as the youngest; it must not be tracked yet."""
        self._latch.acquire()
        try:
            assert not page.tracked, f"{page!r} is tracked already"
            page.tracked, page.lru = True, self
            self.pages.append(page)
        finally:
            self._latch.release()

    def mark_accessed(self, page: SgxEpcPage) -> None:
        """Make ``page`` the youngest, if it is on the list."""
        with self._latch:
            if page in self.pages:
                self.pages.move_to_end(page)

    def remove(self, page: SgxEpcPage) -> bool:
        """Stop tracking ``page``.

        Returns:
            ``False``: a batch has isolated it and may evict it; nothing has changed.
        """
        with self._latch:
            if not page.tracked:
                return True
            if page not in self.pages:
                return False
            self.pages.remove(page)
            page.tracked, page.lru = False, None
            return True

    def isolate(self, count: int) -> tuple[list[SgxEpcPage], int]:
        """Take up to ``count`` of the oldest pages off the list and pin their owners.

        Returns:
            The pages; and how many more were removed from the list because their owner is being
            destroyed.
        """
        isolated: list[SgxEpcPage] = []
        dying = 0
        pages = self.pages
        with self._latch:
            for _ in range(min(count, len(pages))):
                page = pages.popleft()
                assert page.owner is not None, f"{page!r} on a list has no owner"
                if page.owner.get():
                    isolated.append(page)
                else:
                    # The owner's destructor frees the page; a tracked page would seem isolated.
                    page.tracked, page.lru = False, None
                    dying += 1
        return isolated, dying

    def isolate_page(self, page: SgxEpcPage) -> bool:
        """Take one page off the list and pin its owner.

        Returns:
            ``False``: it is not on the list, or its owner is being destroyed; nothing has changed.
        """
        with self._latch:
            if page not in self.pages or page.owner is None or not page.owner.get():
                return False
            self.pages.remove(page)
            return True

    def put_back(self, page: SgxEpcPage) -> bool:
        """Put an isolated page back as the youngest; a poisoned one is no longer tracked.

        Returns:
            Whether it is on the list.
        """
        with self._latch:
            assert page.tracked and page.lru is self, f"{page!r} was not isolated from here"
            if page.poisoned:
                page.tracked, page.lru = False, None
                return False
            self.pages.append(page)
            return True

    def forget(self, page: SgxEpcPage) -> None:
        """Stop tracking an isolated page: it was evicted."""
        self._latch.acquire()
        try:
            assert page.tracked and page not in self.pages, f"{page!r} was not isolated"
            page.tracked, page.lru = False, None
        finally:
            self._latch.release()
