"""Accesses as text: lines of ``12``, ``12 r`` or ``12,w``, or of columns that a header names.

Numbers are decimal, or hexadecimal after ``0x``.  Fields are separated by a comma, blanks or tabs;
empty lines and lines that begin with ``#`` are comments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import BinaryIO

from softsgx.accesses.arrow import np
from softsgx.accesses.source import BLOCK_RECORDS, PAGE_SHIFT, Block, Source
from softsgx.errors import SoftSgxError

__all__ = ["open_text"]

_LINE_BYTES = 1 << 12
_SEPARATOR = re.compile(r"\s*,\s*|\s+")
_NUMBER = re.compile(r"[0-9]{1,20}|0[xX][0-9a-fA-F]{1,16}", re.ASCII)
_WRITES = {"r": False, "w": True, "R": False, "W": True, "0": False, "1": True}
_COLUMNS = ("page", "address", "write", "time_ns")


def open_text(file: BinaryIO, name: str) -> Source:
    """Open lines of text.

    Args:
        file: at the first line.
        name: its name in messages.

    Raises:
        SoftSgxError: the first line is neither an access nor a header; while iterating: a line is
            not an access.
    """
    lines = _Lines(file, name)
    first = next(lines.fields(), None)
    if first is None or _NUMBER.fullmatch(first[0]):
        rows = lines.rows(first, ("page", "write"), least=1)
        return Source(_blocks(rows, address=False, timed=False), numbered=True)
    columns = tuple(first)
    known = len(set(columns)) == len(columns) and set(columns) <= set(_COLUMNS)
    if not known or ("page" in columns) == ("address" in columns):
        raise lines.bad(
            "neither an access nor a header",
            "a header has page or address, and may have write, time_ns",
        )
    rows = lines.rows(None, columns, least=len(columns))
    address, timed = "address" in columns, "time_ns" in columns
    return Source(_blocks(rows, address=address, timed=timed), numbered=not address, timed=timed)


_Row = tuple[int, bool, int]
"""A page or an address, whether it is written, a time."""


def _blocks(rows: Iterator[_Row], *, address: bool, timed: bool) -> Iterator[Block]:
    while part := list(islice(rows, BLOCK_RECORDS)):
        keys = np.array([key for key, _, _ in part], np.uint64)
        writes = np.array([write for _, write, _ in part], np.bool)
        times = np.array([time for _, _, time in part], np.uint64)
        yield Block(keys >> PAGE_SHIFT if address else keys, writes, times if timed else None)


class _Lines:
    """The lines of a file, counted for messages."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name, self._number = file, name, 0

    def bad(self, problem: str, remedy: str) -> SoftSgxError:
        """Return an error about the line that was read last."""
        return SoftSgxError(f"{self._name}: line {self._number}: {problem}; {remedy}")

    def fields(self) -> Iterator[list[str]]:
        """Yield the fields of each line that is not a comment."""
        while line := self._file.readline(_LINE_BYTES):
            self._number += 1
            if len(line) == _LINE_BYTES:
                raise self.bad(f"over {_LINE_BYTES} characters", "write one access a line")
            text = line.decode("ascii", "replace").strip()
            if text and not text.startswith("#"):
                yield _SEPARATOR.split(text)

    def rows(
        self, first: list[str] | None, columns: tuple[str, ...], *, least: int
    ) -> Iterator[_Row]:
        """Yield accesses.

        Args:
            first: fields of an access that was read already.
            columns: what the fields are.
            least: the smallest number of fields.
        """
        for fields in chain([first] if first else [], self.fields()):
            if not least <= len(fields) <= len(columns):
                raise self.bad(f"{len(fields)} fields", f"the fields are {', '.join(columns)}")
            values = dict(zip(columns, fields, strict=False))
            write = _WRITES.get(values.get("write", "r"))
            if write is None:
                raise self.bad("no r or w", "write 12 r or 12 w")
            key = self._integer(values["page" if "page" in columns else "address"])
            yield key, write, self._integer(values.get("time_ns", "0"))

    def _integer(self, text: str) -> int:
        value = int(text, 16 if text[:2] in ("0x", "0X") else 10) if _NUMBER.fullmatch(text) else -1
        if not 0 <= value < 1 << 64:
            raise self.bad("not a number of 64 bits", "write 12 or 0x0c")
        return value
