"""Page traces: which page was used, and whether it was written.

A file is a gzip stream of little-endian u32 words, ``page << 1 | write``, pages numbered from 0.
"""

from __future__ import annotations

import gzip
import struct
import sys
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from softsgx.errors import SoftSgxError

__all__ = ["MOST_ACCESSES", "PageTrace", "parse_trace", "read_trace", "write_trace"]

_WORD = struct.calcsize("<I")
MOST_ACCESSES = 1 << 26
"""How many accesses a file may have: a small file can unpack to a thousand times its size."""


class PageTrace(Sequence[tuple[int, bool]]):
    """Accesses in order, each ``(page, write)``.

    Attributes:
        pages: one more than the largest page number.
    """

    def __init__(self, words: array[int]) -> None:
        self._words = words
        self.pages = (max(words) >> 1) + 1 if words else 0

    @classmethod
    def of(cls, accesses: Sequence[tuple[int, bool]]) -> PageTrace:
        """Return a trace of given accesses."""
        return cls(array("I", (page << 1 | write for page, write in accesses)))

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        if isinstance(index, slice):
            return PageTrace(self._words[index])
        return self._words[index] >> 1, bool(self._words[index] & 1)

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        return ((word >> 1, bool(word & 1)) for word in self._words)

    @property
    def words(self) -> array[int]:
        """The accesses as ``page << 1 | write``."""
        return self._words


def read_trace(path: str | Path) -> PageTrace:
    """Read a trace.

    Raises:
        SoftSgxError: the file cannot be read, or is no trace.
    """
    try:
        with open(path, "rb") as file:
            return parse_trace(file, str(path))
    except OSError as error:
        raise SoftSgxError(f"{path}: {error.strerror}") from error


def parse_trace(file: BinaryIO, name: str) -> PageTrace:
    """Read a trace from an open file; ``name`` is what messages call it.

    Raises:
        SoftSgxError: it is no trace, or has more than ``MOST_ACCESSES``.
        OSError: it cannot be read.
    """
    try:
        data = gzip.GzipFile(fileobj=file).read(MOST_ACCESSES * _WORD + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SoftSgxError(f"{name}: {error}; a trace is a gzip stream of u32 words") from error
    if len(data) > MOST_ACCESSES * _WORD:
        raise SoftSgxError(f"{name}: more than {MOST_ACCESSES} accesses; cut the trace in parts")
    if len(data) % _WORD:
        raise SoftSgxError(f"{name}: {len(data)} bytes; a trace is whole u32 words")
    words = array("I")
    words.frombytes(data)
    if sys.byteorder == "big":
        words.byteswap()
    return PageTrace(words)


def write_trace(path: str | Path, trace: PageTrace) -> None:
    """Write a trace; the same trace gives the same bytes."""
    words = array("I", trace.words)
    if sys.byteorder == "big":
        words.byteswap()
    Path(path).write_bytes(gzip.compress(words.tobytes(), 9, mtime=0))
