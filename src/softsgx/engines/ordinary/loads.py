"""Accesses by loads: each page when it is added to, or loaded into, a finite EPC."""

from __future__ import annotations

from softsgx.engines.ordinary.epc import Epc
from softsgx.engines.ordinary.intervals import Intervals, TraceSink
from softsgx.engines.ordinary.space import AddressSpace

__all__ = ["Loads"]

_HAND_OVER_NS = 100_000_000


class Loads(Intervals):
    """See the module.  Loads go to the sink ten times a second; no page is hidden for that.

    Args:
        epc: loads the pages.
        sink: receives the accesses.
    """

    def __init__(self, epc: Epc, sink: TraceSink) -> None:
        super().__init__(_HAND_OVER_NS, sink)
        self._epc, self._seen = epc, 0

    def accessed(self, space: AddressSpace, page: int, write: bool) -> None:
        """A hidden page was accessed: it was loaded, or the core had cleared its accessed bit."""
        self.counts.shown += 1
        if self._epc.loads != self._seen:
            self._seen = self._epc.loads
            super().accessed(space, page, write)
        else:
            self._traced[space].faults += 1
            self.counts.faults += 1

    def written(self, space: AddressSpace, page: int) -> None:
        """A page that was read has been written."""
        self.counts.stores += 1
        self._traced[space].faults += 1
        self.counts.faults += 1
        self.note_written(space, page)

    def unmapped(self, space: AddressSpace, start: int, end: int) -> None:
        """The pages stay in the enclave, and in the EPC: see :mod:`.epc`."""

    def between(self) -> float | None:
        """Pass the loads to the sink, if it is time; return as :meth:`Intervals.between`."""
        return self.hand_over_if_due()
