"""Backing files of evicted pages.

A backing file behaves as shmem under memory pressure: it may drop a page that is not dirty, and
reads it again as it was last written out.  Bytes that are written without :meth:`mark_dirty` are
lost at some later time, so such a bug is hard to find.

Source:
    ``sgx_encl_alloc_backing()`` and ``sgx_encl_put_backing()``, encl.c; shmem's write-out.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO, Protocol

from softsgx.arch import PAGE_BYTES
from softsgx.paging.failures import BackingError
from softsgx.paging.interfaces import BackingFile, BackingPage

__all__ = [
    "Disk",
    "FailingBacking",
    "FileBacking",
    "MemoryBacking",
    "TemporaryFile",
    "memory_backing",
]


class _CachedPage:
    """A page in memory; calls ``unpinned`` at the last unpin."""

    __slots__ = ("_unpinned", "_view", "data", "dirty", "index", "pins")

    def __init__(
        self, index: int, data: bytearray, unpinned: Callable[[_CachedPage], None] | None
    ) -> None:
        self.index, self.data, self._unpinned = index, data, unpinned
        self.pins = 1
        self.dirty = False
        self._view: memoryview | None = None

    def part(self, start: int, size: int) -> memoryview:
        """As :meth:`BackingPage.part`."""
        view = self._view
        if view is None:
            view = self._view = memoryview(self.data)
        return view[start : start + size]

    def mark_dirty(self) -> None:
        """As :meth:`BackingPage.mark_dirty`."""
        self.dirty = True

    def unpin(self) -> None:
        """As :meth:`BackingPage.unpin`."""
        pins = self.pins = self.pins - 1
        assert pins >= 0, f"backing page {self.index} unpinned too often"
        if not pins and self._unpinned is not None:
            self._unpinned(self)


class _CachingFile:
    """Base of the backing files: a cache of pages in memory, and a limit on the pages.

    Args:
        limit_pages: the limit; ``None`` for none.
        unpinned: called at the last unpin of a page; ``None``: the page stays in memory.
    """

    def __init__(
        self, limit_pages: int | None, unpinned: Callable[[_CachedPage], None] | None = None
    ) -> None:
        self._limit_pages, self._unpinned = limit_pages, unpinned
        self._cached: dict[int, _CachedPage] = {}

    def pin(self, index: int, *, create: bool) -> BackingPage:
        """As :meth:`BackingFile.pin`."""
        page = self._cached.get(index)
        if page is not None:
            page.pins += 1
            return page
        stored = self._stored(index)
        if stored is None:
            if not create:
                raise BackingError(f"no backing page {index}")
            if self._limit_pages is not None and self.pages() >= self._limit_pages:
                raise BackingError(f"backing file is full: {self._limit_pages} pages")
            self._reserve(index)
            stored = bytearray(PAGE_BYTES)
        page = self._cached[index] = _CachedPage(index, stored, self._unpinned)
        return page

    def _stored(self, index: int) -> bytearray | None:
        """Return a copy of a page that is not in memory; ``None``: the file does not have it."""
        raise NotImplementedError

    def _reserve(self, index: int) -> None:
        """Reserve space for a new page; ``BackingError``: there is none."""

    def pages(self) -> int:
        """As :meth:`BackingFile.pages`."""
        raise NotImplementedError


class MemoryBacking(_CachingFile):
    """A backing file in this process' memory.

    Unpinned pages stay in memory until :meth:`drop_clean` simulates memory pressure.

    Args:
        limit_pages: how many pages it may hold; ``None`` for any number.
    """

    def __init__(self, limit_pages: int | None = None) -> None:
        super().__init__(limit_pages)
        self._written_out: dict[int, bytes] = {}

    def _stored(self, index: int) -> bytearray | None:
        data = self._written_out.get(index) if self._written_out else None
        return None if data is None else bytearray(data)

    def truncate(self, index: int) -> None:
        """As :meth:`BackingFile.truncate`."""
        self._cached.pop(index, None)
        if self._written_out:
            self._written_out.pop(index, None)

    def pages(self) -> int:
        """As :meth:`BackingFile.pages`."""
        if not self._written_out:
            return len(self._cached)
        return len(self._cached.keys() | self._written_out.keys())

    def close(self) -> None:
        """As :meth:`BackingFile.close`."""
        self._cached.clear()
        self._written_out.clear()

    def write_out(self) -> None:
        """Memory pressure, first half: store all dirty pages, which are clean then."""
        for index, page in self._cached.items():
            if page.dirty:
                self._written_out[index] = bytes(page.data)
                page.dirty = False

    def drop_clean(self) -> None:
        """Memory pressure, second half: drop clean pages that are not pinned."""
        for index, page in list(self._cached.items()):
            if not page.dirty and not page.pins:
                del self._cached[index]
                # A page that was never written reads as zeros, as a hole in a file does.
                self._written_out.setdefault(index, bytes(PAGE_BYTES))

    def squeeze(self) -> None:
        """Memory pressure: :meth:`write_out`, then :meth:`drop_clean`."""
        self.write_out()
        self.drop_clean()


def memory_backing(pages: int) -> BackingFile:
    """Return a :class:`MemoryBacking` for an owner of ``pages`` pages, without a limit."""
    return MemoryBacking()


class Disk(Protocol):
    """A file of numbered pages; every request may fail with ``OSError``."""

    def allocate(self, place: int) -> None:
        """Reserve space for page ``place``."""

    def read(self, place: int) -> bytes:
        """Return page ``place``; fewer bytes where the file ends."""

    def write(self, place: int, data: memoryview, done: int) -> int:
        """Write page ``place`` from byte ``done`` on; return how many bytes were written."""

    def close(self) -> None:
        """Free the space; never fails."""


class TemporaryFile:
    """A :class:`Disk` in an unnamed temporary file.

    Args:
        directory: its directory; the system's directory for temporary files when ``None``.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, directory: str | None) -> None:
        import tempfile  # with shutil and its compressors; most runs keep pages in memory

        self._file: BinaryIO = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
        self._fd = self._file.fileno()

    def allocate(self, place: int) -> None:
        """As :meth:`Disk.allocate`."""
        os.posix_fallocate(self._fd, place * PAGE_BYTES, PAGE_BYTES)

    def read(self, place: int) -> bytes:
        """As :meth:`Disk.read`."""
        return os.pread(self._fd, PAGE_BYTES, place * PAGE_BYTES)

    def write(self, place: int, data: memoryview, done: int) -> int:
        """As :meth:`Disk.write`."""
        return os.pwrite(self._fd, data[done:], place * PAGE_BYTES + done)

    def close(self) -> None:
        """As :meth:`Disk.close`."""
        with suppress(OSError):  # the last write-out failed; the bytes are not needed
            self._file.close()


class FileBacking(_CachingFile):
    """A backing file on disk: an unnamed temporary file that keeps nothing in memory.

    A page that cannot be written stays in memory, so no content is lost.  While there is such a
    page, :meth:`pin` first tries to write it, and creates no other page if that fails.

    Args:
        limit_pages: how many pages it may hold; ``None`` for any number.
        directory: its directory; the system's directory for temporary files when ``None``.
        open_disk: makes the file, given the directory.

    Raises:
        BackingError: the file cannot be made.
    """

    def __init__(
        self,
        limit_pages: int | None = None,
        *,
        directory: str | None = None,
        open_disk: Callable[[str | None], Disk] = TemporaryFile,
    ) -> None:
        super().__init__(limit_pages, self._write_back)
        try:
            self._disk = open_disk(directory)
        except OSError as error:
            raise _failed("be made", error) from error
        self._places: dict[int, int] = {}  # page index to place in the file
        self._blank: set[int] = set()  # indices that were never written: they read as zeros
        self._holes: list[int] = []
        self._unwritten: dict[int, _CachedPage] = {}

    def _stored(self, index: int) -> bytearray | None:
        place = self._places.get(index)
        if place is None:
            return None
        if index in self._blank:
            return bytearray(PAGE_BYTES)
        try:
            data = self._disk.read(place)
        except OSError as error:
            raise _failed("be read", error) from error
        if len(data) != PAGE_BYTES:
            raise BackingError(f"the backing file has only {len(data)} bytes of page {index}")
        return bytearray(data)

    def _reserve(self, index: int) -> None:
        for page in list(self._unwritten.values()):
            error = self._write(page)
            if error is not None:
                raise _failed("be written", error) from error
        # Allocate the blocks now, so that the later write rarely fails.
        place = self._holes[-1] if self._holes else len(self._places)
        try:
            self._disk.allocate(place)
        except OSError as error:
            raise _failed("grow", error) from error
        if self._holes:
            self._holes.pop()
        self._places[index] = place
        self._blank.add(index)

    def _write_back(self, page: _CachedPage) -> None:
        if self._cached.get(page.index) is not page:
            return  # truncated while it was pinned
        if page.dirty:
            self._write(page)
        else:
            del self._cached[page.index]

    def _write(self, page: _CachedPage) -> OSError | None:
        """Write a dirty page, and drop it if it is not pinned; on an error it stays."""
        place, done = self._places[page.index], 0
        try:
            while done < PAGE_BYTES:
                written = self._disk.write(place, memoryview(page.data), done)
                if written <= 0:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                done += written
        except OSError as error:
            self._unwritten[page.index] = page
            return error
        self._unwritten.pop(page.index, None)
        self._blank.discard(page.index)
        page.dirty = False
        if not page.pins:
            del self._cached[page.index]
        return None

    def truncate(self, index: int) -> None:
        """As :meth:`BackingFile.truncate`; the place in the file is used again."""
        self._cached.pop(index, None)
        self._unwritten.pop(index, None)
        self._blank.discard(index)
        place = self._places.pop(index, None)
        if place is not None:
            self._holes.append(place)

    def pages(self) -> int:
        """As :meth:`BackingFile.pages`."""
        return len(self._places) + sum(index not in self._places for index in self._cached)

    def close(self) -> None:
        """As :meth:`BackingFile.close`."""
        self._cached.clear()
        self._unwritten.clear()
        self._places.clear()
        self._disk.close()


def _failed(what: str, error: OSError) -> BackingError:
    return BackingError(f"the backing file cannot {what}: {error.strerror}")


class FailingBacking:
    """A backing file that fails on request, for tests.

    Args:
        inner: the backing file that holds the pages.
        fail: called with the number of each :meth:`pin`, counting from 1; ``True`` fails it.

    Attributes:
        requests: calls of :meth:`pin` so far.
        failures: how many of them failed.
    """

    def __init__(self, inner: BackingFile, fail: Callable[[int], bool]) -> None:
        self._inner, self._fail = inner, fail
        self.requests = self.failures = 0

    @classmethod
    def at(cls, inner: BackingFile, nth: int) -> FailingBacking:
        """Return one whose ``nth`` request fails, and no other."""
        return cls(inner, lambda request: request == nth)

    def pin(self, index: int, *, create: bool) -> BackingPage:
        """As :meth:`BackingFile.pin`."""
        self.requests += 1
        if self._fail(self.requests):
            self.failures += 1
            raise BackingError(f"request {self.requests} for backing page {index} fails on command")
        return self._inner.pin(index, create=create)

    def truncate(self, index: int) -> None:
        """As :meth:`BackingFile.truncate`."""
        self._inner.truncate(index)

    def pages(self) -> int:
        """As :meth:`BackingFile.pages`."""
        return self._inner.pages()

    def close(self) -> None:
        """As :meth:`BackingFile.close`."""
        self._inner.close()
