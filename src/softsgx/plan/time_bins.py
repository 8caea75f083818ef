"""Where the bins of a picture over time begin in a sequence of accesses that is read once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TimeBins"]

_BINS = 120


class TimeBins:
    """Bins of equal time; without times, of equally many accesses.

    Args:
        span_ns: time of the last access, from 0; 0: without times.
        most_accesses: there are no more.
    """

    def __init__(self, span_ns: int, most_accesses: int) -> None:
        self._bins = max(1, min(_BINS, most_accesses))
        self._limits = np.array([], np.uint64)
        if span_ns > 0:
            limits = [span_ns * at // self._bins for at in range(1, self._bins)]
            self._limits = np.array(limits, np.uint64)
        self.seconds = max(span_ns, 0) / self._bins / 1e9
        self._edges: list[int] = []
        self._accesses = 0

    def add(self, times_ns: NDArray[np.uint64]) -> None:
        """Add accesses, which are not earlier than those before."""
        found = np.searchsorted(times_ns, self._limits[len(self._edges) :])
        # Accesses that follow may be before the limit, too, where it is at the end of these.
        self._edges += (self._accesses + found[found < len(times_ns)]).tolist()
        self._accesses += len(times_ns)

    def edges(self) -> tuple[int, ...]:
        """Return the access with which each bin begins, and how many accesses there are."""
        if not self.seconds:
            return tuple(self._accesses * at // self._bins for at in range(self._bins + 1))
        missing = self._bins - 1 - len(self._edges)
        return (0, *self._edges, *[self._accesses] * missing, self._accesses)
