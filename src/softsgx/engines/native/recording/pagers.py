"""Pagers that report the first use of each page: after it was shown, and after it was watched.

The plain pagers watch a page to clear its accessed bit: with userfaultfd they drop the page table
entry, with ``mprotect`` they take its rights; the memory file keeps the bytes.  These pagers watch
a page from the time when it is shown, and :meth:`watch_all` watches all pages again.  The next use
faults, and :meth:`touched` lets the thread continue.  With userfaultfd that is a *minor* fault: the
page is in the file and has no entry.

Where stores are recorded, a page that was used by a load stays write-protected until the first
store.

The answers to :meth:`test_and_clear_accessed` are those of the plain pagers: a page was used since
the last ``True`` if it was shown, or has stopped being watched, since then.

Source:
    ioctl_userfaultfd(2), UFFDIO_CONTINUE; madvise(2); mprotect(2).
"""

from __future__ import annotations

import ctypes
from bisect import bisect_left
from collections.abc import Callable, Iterable
from errno import EAGAIN, EEXIST, EFAULT
from typing import Any, Protocol

from softsgx.arch import PAGE_BYTES
from softsgx.engines.native import abi, libc
from softsgx.engines.native.memory.memory_file import WRITE
from softsgx.engines.native.memory.mprotect import MprotectPager
from softsgx.engines.native.memory.page_table import Pager
from softsgx.engines.native.memory.uffd import UNMAPPED, UffdPager

__all__ = ["RecordedMprotectPager", "RecordedUffdPager", "WatchingPager"]


class WatchingPager(Pager, Protocol):
    """A pager that can watch all pages at once."""

    def watch_all(self, mappings: list[tuple[int, int]]) -> None:
        """Watch every shown page; the calls for it are made before this returns.

        Args:
            mappings: (start, end) of the mappings of enclaves in this address space, ascending.
        """


class RecordedUffdPager(UffdPager):
    """See the module.

    Args:
        arguments: of :class:`UffdPager`.
        stores: whether a page that was used by loads is watched for the first store.
    """

    _mode = UffdPager._mode | abi.UFFDIO_REGISTER_MODE_MINOR

    def __init__(self, *arguments: Any, stores: bool) -> None:
        super().__init__(*arguments)
        self._stores = stores
        self._present_pages: set[int] = set()  # those with an entry
        self._accessed: set[int] = set()  # used since their bit was cleared, and watched since then
        self._request = (ctypes.c_uint64 * 4)()
        self._request[1] = PAGE_BYTES
        self._request_at = ctypes.addressof(self._request)

    def mapped(self, start: int, end: int, prot: int, shown: dict[int, int]) -> None:
        """As :meth:`UffdPager.mapped`; fork may have copied entries of pages that are new here."""
        new = [page for page in shown if page not in self._fetches.rights]
        super().mapped(start, end, prot, shown)
        self._watched.update(new)

    def show(self, linaddr: int, data: bytes | bytearray, rights: int) -> bool:
        """Leave it to the caller to fill the file: the page then has no entry."""
        return False

    def shown(self, linaddr: int, rights: int) -> None:
        """The page has no entry until its first use."""
        self._fetches.shown(linaddr, rights)
        self._accessed.add(linaddr)

    def set_rights(self, linaddr: int, rights: int) -> None:
        """Write-protect the page; a store to a page that allows it again faults once."""
        if not rights & WRITE:
            self._allow_stores(linaddr, rights)
        self._fetches.changed(linaddr, rights)

    def after_hide(self, start: int, end: int) -> None:
        """Forget the pages."""
        super().after_hide(start, end)
        pages = range(start, end, PAGE_BYTES)
        self._present_pages.difference_update(pages)
        self._accessed.difference_update(pages)

    def test_and_clear_accessed(self, linaddr: int) -> bool:
        """As :meth:`UffdPager.test_and_clear_accessed`, without reading page tables."""
        used = linaddr in self._accessed
        self._accessed.discard(linaddr)
        if linaddr not in self._present_pages:
            return used
        self._present_pages.discard(linaddr)
        self._watched.add(linaddr)
        return True

    def touched(self, linaddr: int, access: int) -> bool:
        """Make the page's entry, or allow stores; ``False``: the EPCM entry forbids the access."""
        rights = self._fetches.rights.get(linaddr, 0)
        if access & ~rights:
            return False
        stores = bool(rights & WRITE) and (access == WRITE or not self._stores)
        code = self._continue(linaddr, 0 if stores else abi.UFFDIO_CONTINUE_MODE_WP)
        if code == EEXIST and access == WRITE:
            self._allow_stores(linaddr, rights)
        elif code:
            return False
        self._present_pages.add(linaddr)
        return True

    def watch_all(self, mappings: list[tuple[int, int]]) -> None:
        """Drop all entries."""
        pages = {*self._present_pages, *self._watched}
        self._accessed |= self._present_pages
        self._present_pages.clear()
        self._watched.clear()
        calls: list[tuple[int, ...]] = [
            (abi.SYS_MADVISE, start, end - start, abi.MADV_DONTNEED_LOCKED)
            for start, end in _spans(pages, mappings)
        ]
        if calls:
            self._inject(calls)

    def _continue(self, linaddr: int, mode: int) -> int:
        """UFFDIO_CONTINUE; return the error's number, 0 for none."""
        request = self._request
        while True:
            request[0], request[2], request[3] = linaddr, mode, 0
            if libc.raw_ioctl(self._uffd, abi.UFFDIO_CONTINUE, self._request_at) != -1:
                return 0
            code = ctypes.get_errno()
            if code == EAGAIN:  # the program's mappings are being changed
                continue
            if code not in (EEXIST, EFAULT) and code not in UNMAPPED:
                self._failed(OSError(code, "UFFDIO_CONTINUE"))
            return code


class RecordedMprotectPager(MprotectPager):
    """See the module.

    Args:
        inject: of :class:`MprotectPager`.
        prot_at: of :class:`MprotectPager`.
        stores: whether a page that was used by loads is watched for the first store.
    """

    def __init__(
        self,
        inject: Callable[[list[tuple[int, ...]]], None],
        prot_at: Callable[[int], int | None],
        *,
        stores: bool,
    ) -> None:
        super().__init__(inject, prot_at)
        self._stores = stores
        self._clean: set[int] = set()  # used by loads, and no store is allowed yet
        self._accessed: set[int] = set()  # used since their bit was cleared, and watched since then

    def shown(self, linaddr: int, rights: int) -> None:
        """The page has no rights until its first use."""
        self._shown[linaddr] = rights
        self._watched.add(linaddr)
        self._accessed.add(linaddr)

    def set_rights(self, linaddr: int, rights: int) -> None:
        """Change the rights of a shown page; a page that is not shown yet is watched."""
        if linaddr in self._shown:
            self._shown[linaddr] = rights
            self._apply(linaddr)
        else:
            self.shown(linaddr, rights)

    def before_hide(self, start: int, end: int) -> None:
        """Take every right away, and forget the pages."""
        super().before_hide(start, end)
        pages = range(start, end, PAGE_BYTES)
        self._clean.difference_update(pages)
        self._accessed.difference_update(pages)

    def test_and_clear_accessed(self, linaddr: int) -> bool:
        """As :meth:`MprotectPager.test_and_clear_accessed`."""
        used = linaddr in self._accessed
        self._accessed.discard(linaddr)
        return super().test_and_clear_accessed(linaddr) or used

    def touched(self, linaddr: int, access: int) -> bool:
        """Give a watched page its rights, or allow stores."""
        if linaddr not in self._watched and not (access == WRITE and linaddr in self._clean):
            return False
        if self._stores and access != WRITE:
            self._clean.add(linaddr)
        else:
            self._clean.discard(linaddr)
        self._watched.discard(linaddr)
        self._apply(linaddr)
        return True

    def watch_all(self, mappings: list[tuple[int, int]]) -> None:
        """Take the rights of all pages."""
        pages = self._shown.keys() - self._watched
        self._accessed |= pages
        self._watched |= pages
        self._clean.clear()
        calls: list[tuple[int, ...]] = [
            (abi.SYS_MPROTECT, start, end - start, abi.PROT_NONE)
            for start, end in _spans(pages, mappings)
        ]
        if calls:
            self._inject(calls)

    def _rights(self, linaddr: int) -> int:
        rights = super()._rights(linaddr)
        return rights & ~WRITE if linaddr in self._clean else rights


def _spans(pages: Iterable[int], mappings: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the range from the first to the last of ``pages`` in each mapping that has any.

    Pages between them that are not among ``pages`` have no entry, or no rights.
    """
    rising = sorted(pages)
    spans = []
    for start, end in mappings:
        first, behind = bisect_left(rising, start), bisect_left(rising, end)
        if first < behind:
            spans.append((rising[first], rising[behind - 1] + PAGE_BYTES))
    return spans
