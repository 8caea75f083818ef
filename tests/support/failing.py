"""Backing stores of which a chosen request fails, counted over all files of a platform."""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import dataclass, field

from softsgx.arch import PAGE_BYTES
from softsgx.paging import (
    BackingError,
    BackingFile,
    BackingPage,
    FileBacking,
    MemoryBacking,
    TemporaryFile,
)

__all__ = ["DISK_FAILURES", "MEMORY_FAILURES", "Fate"]

MEMORY_FAILURES = ("reserve", "open")
DISK_FAILURES = ("allocate", "read", "short read", "write", "short write")


@dataclass
class Fate:
    """Which request fails.

    Attributes:
        kind: of request: one of the names above.
        nth: which one of them, from 1; 0 for none.
        lasting: whether all later ones of the kind fail as well.
        requests: how many of each kind there were.
        failed: how many failed.
    """

    kind: str = ""
    nth: int = 0
    lasting: bool = False
    requests: Counter[str] = field(default_factory=Counter)
    failed: int = 0

    def hits(self, kind: str) -> bool:
        """Count a request; return whether it is to fail."""
        self.requests[kind] += 1
        at = self.requests[kind]
        fails = kind == self.kind and (at == self.nth or (self.lasting and 0 < self.nth < at))
        self.failed += fails
        return fails

    def backing(self, _pages: int) -> BackingFile:
        """Return a new backing file of the kind that the failure needs."""
        if self.kind in DISK_FAILURES:
            return FileBacking(open_disk=lambda directory: _Disk(directory, self))
        return _Memory(self)


class _Memory(MemoryBacking):
    def __init__(self, fate: Fate) -> None:
        super().__init__()
        self._fate = fate

    def pin(self, index: int, *, create: bool) -> BackingPage:
        if self._fate.hits("reserve" if create else "open"):
            raise BackingError("fails on command")
        return super().pin(index, create=create)


class _Disk(TemporaryFile):
    def __init__(self, directory: str | None, fate: Fate) -> None:
        super().__init__(directory)
        self._fate = fate

    def allocate(self, place: int) -> None:
        if self._fate.hits("allocate"):
            raise _error(errno.ENOSPC)
        super().allocate(place)

    def read(self, place: int) -> bytes:
        if self._fate.hits("read"):
            raise _error(errno.EIO)
        data = super().read(place)
        return data[:100] if self._fate.hits("short read") else data

    def write(self, place: int, data: memoryview, done: int) -> int:
        if self._fate.hits("write"):
            raise _error(errno.ENOSPC if self._fate.nth % 2 else errno.EIO)
        if self._fate.hits("short write"):
            assert not done or len(data) == PAGE_BYTES
            return super().write(place, data[: done + (PAGE_BYTES - done) // 2], done)
        return super().write(place, data, done)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
