"""Imports accesses that another tool has recorded into a trace file.

A source yields blocks of accesses to one address range.  Addresses and identifiers of objects have
more bits than page numbers, so their pages are numbered in order of first use.  Page numbers are
not changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from softsgx.accesses.arrow import np
from softsgx.accesses.description import MOST_PAGES
from softsgx.accesses.writer import TraceWriter
from softsgx.errors import SoftSgxError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BLOCK_RECORDS", "PAGE_SHIFT", "Block", "Source", "import_trace"]

BLOCK_RECORDS = 1 << 16
PAGE_SHIFT = np.uint64(12)


@dataclass(frozen=True, slots=True)
class Block:
    """Accesses in order.

    Attributes:
        keys: a number for each page.
        writes: which are writes.
        times_ns: ``None`` if the tool records no time.
    """

    keys: NDArray[np.uint64]
    writes: NDArray[np.bool]
    times_ns: NDArray[np.uint64] | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """The accesses of an open file.

    Attributes:
        blocks: of at least one access each.
        numbered: keys are page numbers.
        timed: blocks have times.
    """

    blocks: Iterator[Block]
    numbered: bool = False
    timed: bool = False


def import_trace(source: Source, name: str, output: BinaryIO) -> None:
    """Write the accesses of a source as a trace file.

    Args:
        source: the accesses.
        name: of the source, for messages, and of the enclave.
        output: an open file.

    Raises:
        SoftSgxError: the source is damaged, or the file cannot be written.
    """
    first_use = _FirstUse()
    accesses = range_pages = 0
    now_ns = np.uint64(0)
    with TraceWriter(output, precision="accesses", program=name, timed=source.timed) as writer:
        enclave = writer.add_enclave(name, 0, 0)
        for block in source.blocks:
            times = block.times_ns
            if times is None:
                times = np.arange(accesses, accesses + len(block.keys), dtype=np.uint64)
            elif times[0] < now_ns or (times[1:] < times[:-1]).any():
                raise SoftSgxError(f"{name}: times decrease; sort the accesses by time")
            pages = block.keys if source.numbered else first_use.numbers(block.keys)
            range_pages = max(range_pages, int(pages.max()) + 1)
            if range_pages > MOST_PAGES:
                raise SoftSgxError(
                    f"{name}: page {range_pages - 1}: numbers of pages have 32 bits; "
                    "call the column 'address' if it has addresses"
                )
            writer.grow_enclave(enclave, range_pages)
            writer.extend(enclave, pages, block.writes, times)
            accesses += len(block.keys)
            now_ns = times[-1]


class _FirstUse:
    """Numbers keys from 0, in the order in which they are first used."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}

    def numbers(self, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return the number of each key."""
        found, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        values = found.tolist()
        for index in np.argsort(first).tolist():
            self._known.setdefault(values[index], len(self._known))
        return np.array([self._known[value] for value in values], np.uint64)[inverse]
