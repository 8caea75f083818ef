"""Which parts of an address space have the content of files, until the program stores to them.

A library OS reads a privately mapped file into enclave memory.  So the recorder replaces a private
mapping of a file by anonymous memory, and fills each page from the file at its first access.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass, replace

from softsgx.engines.native import abi

__all__ = ["File", "FileRange", "FileRanges"]


class File:
    """A file that ranges have their content from; its descriptor is closed with the last range.

    Args:
        descriptor: the recorder's own, readable.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def page(self, offset: int) -> bytes | None:
        """Return the page at ``offset``, short at the end of the file; ``None`` behind it."""
        return os.pread(self._descriptor, abi.PAGE, offset) or None

    def __del__(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True, slots=True)
class FileRange:
    """``[start, end)`` has the content of ``file`` from ``offset``."""

    start: int
    end: int
    file: File
    offset: int

    def within(self, start: int, end: int) -> FileRange:
        """Return the part of it in a range that overlaps it."""
        low = max(start, self.start)
        return replace(
            self, start=low, end=min(end, self.end), offset=self.offset + low - self.start
        )

    def moved(self, distance: int) -> FileRange:
        """Return the range, moved by ``distance`` bytes."""
        return replace(self, start=self.start + distance, end=self.end + distance)


class FileRanges:
    """The ranges of one address space, in ascending order, without overlaps."""

    def __init__(self, ranges: list[FileRange] | None = None) -> None:
        self._ranges = ranges or []

    def copy(self) -> FileRanges:
        """Return the ranges of a copy of the address space."""
        return FileRanges(list(self._ranges))

    def find(self, address: int) -> FileRange | None:
        """Return the range that holds an address."""
        at = bisect_right(self._ranges, address, key=lambda each: each.start)
        if at and address < self._ranges[at - 1].end:
            return self._ranges[at - 1]
        return None

    def within(self, start: int, end: int) -> list[FileRange]:
        """Return the parts of ranges in ``[start, end)``."""
        first = max(bisect_right(self._ranges, start, key=lambda each: each.start) - 1, 0)
        found = []
        for each in self._ranges[first:]:
            if each.start >= end:
                break
            if each.end > start:
                found.append(each.within(start, end))
        return found

    def remove(self, start: int, end: int) -> None:
        """Remove ``[start, end)``: it has no content of a file any more."""
        if not self.within(start, end):
            return
        kept = []
        for each in self._ranges:
            if each.start < start:
                kept.append(each.within(each.start, start))
            if each.end > end:
                kept.append(each.within(end, each.end))
        self._ranges = sorted(
            (each for each in kept if each.start < each.end), key=lambda each: each.start
        )

    def add(self, new: FileRange) -> None:
        """Add a range; it replaces the parts of ranges that it overlaps."""
        self.remove(new.start, new.end)
        at = bisect_right(self._ranges, new.start, key=lambda each: each.start)
        self._ranges.insert(at, new)
