"""Several traces in one order of time, each read in chunks; memory is a chunk of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Timed", "merged"]


@dataclass(frozen=True, slots=True, eq=False)
class Timed:
    """Accesses in order of time.

    Attributes:
        numbers: of their pages.
        times_ns: from 0.
    """

    numbers: NDArray[np.uint32]
    times_ns: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, part: slice) -> Timed:
        return Timed(self.numbers[part], self.times_ns[part])


def merged(sources: Sequence[Iterator[Timed]]) -> Iterator[Timed]:
    """Yield the accesses of all sources in order of time; of one time, in order of sources.

    Args:
        sources: chunks, none of them empty.
    """
    if len(sources) == 1:
        yield from sources[0]
        return
    read: dict[int, Timed] = {}
    for at, source in enumerate(sources):
        _read_on(read, at, source)
    while read:
        # What comes later of any source is not before the end of what was read of it, so all until
        # the earliest of these ends can be put in order.
        last_ns, limit = min((int(chunk.times_ns[-1]), at) for at, chunk in read.items())
        pieces = []
        for at, chunk in sorted(read.items()):
            count = int(
                np.searchsorted(
                    chunk.times_ns, np.uint64(last_ns), side="right" if at <= limit else "left"
                )
            )
            pieces.append(chunk[:count])
            read[at] = chunk[count:]
            if not len(read[at]):
                _read_on(read, at, sources[at])
        yield _in_order(pieces)


def _read_on(read: dict[int, Timed], at: int, source: Iterator[Timed]) -> None:
    """Read the next chunk of a source in place of one that was used up."""
    chunk = next(source, None)
    if chunk is not None:
        read[at] = chunk
    else:
        read.pop(at, None)


def _in_order(pieces: Sequence[Timed]) -> Timed:
    times = np.concatenate([piece.times_ns for piece in pieces])
    order = np.argsort(times, kind="stable")
    return Timed(np.concatenate([piece.numbers for piece in pieces])[order], times[order])
