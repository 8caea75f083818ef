"""Accesses by loads: each page when it is brought into a finite EPC, as the pager sees it."""

from __future__ import annotations

from softsgx.engines.ordinary.epc import Epc
from softsgx.engines.ordinary.intervals import Intervals, TraceSink
from softsgx.engines.ordinary.space import AddressSpace

__all__ = ["Loads"]

_HAND_OVER_NS = 100_000_000


class Loads(Intervals):
    """See the module.  What is loaded is handed over from time to time; nothing is hidden.

    Args:
        epc: loads the pages.
        sink: receives them.
    """

    def __init__(self, epc: Epc, sink: TraceSink) -> None:
        super().__init__(_HAND_OVER_NS, sink)
        self._epc, self._seen = epc, 0

    def accessed(self, space: AddressSpace, page: int, write: bool) -> None:
        """A hidden page was accessed: it was loaded for that, or the core had asked for its age."""
        self.counts.shown += 1
        if self._epc.loads != self._seen:
            self._seen = self._epc.loads
            super().accessed(space, page, write)

    def written(self, space: AddressSpace, page: int) -> None:
        """A page that was read has been written."""
        self.counts.stores += 1
        self.note_written(space, page)

    def between(self) -> float | None:
        """Hand over what was loaded, if it is time; return in how many seconds it is."""
        return self.hand_over_if_due()
