"""Accesses as ``valgrind --tool=lackey --trace-mem=yes`` prints them.

An instruction fetch (I) and a load (L) are reads, a store (S) and a modify (M) are writes.  An
access that crosses pages is an access to each of them.  Lines that begin with ``==`` are valgrind's
messages.

Source:
    valgrind, lackey/lk_main.c, "trace-mem": ``I  addr,size``, `` L addr,size``; hexadecimal
    addresses, decimal sizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from softsgx.accesses.arrow import np
from softsgx.accesses.source import PAGE_SHIFT, Block, Source
from softsgx.errors import SoftSgxError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["is_lackey", "open_lackey"]

_BLOCK_BYTES = 1 << 20
_MESSAGE = re.compile(rb"^==.*\n?", re.MULTILINE)
_BEGINNING = re.compile(rb"(==.*\n)*(I  | [LSM] )[0-9a-f]+,[0-9]+\n")
_ADDRESS_AT = 3  # in a line
_ADDRESS_DIGITS, _SIZE_DIGITS = 16, 4
_NO_DIGIT = 255
_DIGITS = np.full(256, _NO_DIGIT, np.uint8)
_DIGITS[list(b"0123456789abcdef")] = range(16)


def is_lackey(beginning: bytes) -> bool:
    """Return whether a file begins with valgrind's messages and an access."""
    return _BEGINNING.match(beginning) is not None


def open_lackey(file: BinaryIO, name: str) -> Source:
    """Open a log of lackey.

    Args:
        file: at the first line.
        name: its name in messages.
    """
    return Source(_blocks(file, name))


def _blocks(file: BinaryIO, name: str) -> Iterator[Block]:
    """Yield the accesses of each ``_BLOCK_BYTES``, cut at the end of a line."""
    rest, at = b"", 0
    while data := file.read(_BLOCK_BYTES):
        lines, newline, rest = (rest + data).rpartition(b"\n")
        if len(rest) >= _BLOCK_BYTES:
            raise _bad(name, at)
        yield from _block(_MESSAGE.sub(b"", lines + newline), name, at)
        at += len(lines) + len(newline)
    if rest and not rest.startswith(b"=="):
        raise _bad(name, at)  # the recorder was killed in the line, or this is another format


def _block(lines: bytes, name: str, at: int) -> Iterator[Block]:
    """Yield the accesses of whole lines, unless there are none.

    The lines are parsed column by column: the first digit of all addresses, the second, ….
    """
    data = np.frombuffer(lines, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    if not len(ends):
        return
    starts = np.concatenate((np.zeros(1, ends.dtype), ends[:-1] + 1))
    commas = np.flatnonzero(data == ord(","))
    if len(commas) != len(ends) or (ends - starts <= _ADDRESS_AT).any():
        raise _bad(name, at)
    first, second, third = (data[starts + offset] for offset in range(_ADDRESS_AT))
    fetch = (first == ord("I")) & (second == ord(" "))
    write = (second == ord("S")) | (second == ord("M"))
    data_access = (first == ord(" ")) & (write | (second == ord("L")))
    if not ((fetch | data_access) & (third == ord(" "))).all():
        raise _bad(name, at)
    addresses = _numbers(data, starts + _ADDRESS_AT, commas, 16, _ADDRESS_DIGITS)
    sizes = _numbers(data, commas + 1, ends, 10, _SIZE_DIGITS)
    if addresses is None or sizes is None or not sizes.all():
        raise _bad(name, at)
    pages = addresses >> PAGE_SHIFT
    touched = ((addresses + sizes - np.uint64(1) >> PAGE_SHIFT) - pages + np.uint64(1)).astype(int)
    if (touched > 1).any():
        nth = np.arange(touched.sum()) - np.repeat(np.cumsum(touched) - touched, touched)
        pages = np.repeat(pages, touched) + nth.astype(np.uint64)
        write = np.repeat(write, touched)
    yield Block(pages, write)


def _numbers(
    data: NDArray[np.uint8],
    starts: NDArray[np.intp],
    ends: NDArray[np.intp],
    base: int,
    most_digits: int,
) -> NDArray[np.uint64] | None:
    """Return the numbers at ``[start, end)`` of a text; ``None``: one of them is not a number."""
    widths = ends - starts
    if (widths < 1).any() or (widths > most_digits).any():
        return None
    values = np.zeros(len(starts), np.uint64)
    for place in range(int(widths.max())):
        has = place < widths
        digits = _DIGITS[data[np.where(has, starts + place, starts)]]
        if (digits >= base).any():
            return None
        values = np.where(has, values * np.uint64(base) + digits, values)
    return values


def _bad(name: str, at: int) -> SoftSgxError:
    return SoftSgxError(
        f"{name}: near byte {at}: not a line of lackey; record with "
        "valgrind --tool=lackey --trace-mem=yes --log-file=FILE"
    )
