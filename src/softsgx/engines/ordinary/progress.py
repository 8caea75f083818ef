"""What a recording of an ordinary program has done so far, for a reader in another thread.

The recorder's thread only adds to the counts, and to the table of address spaces, so the reader
takes no lock.
"""

from __future__ import annotations

from dataclasses import dataclass

from softsgx.engines.ordinary.epc import Epc
from softsgx.engines.ordinary.intervals import Intervals
from softsgx.host import Platform

__all__ = ["Progress", "SpaceProgress"]


@dataclass(frozen=True, slots=True)
class SpaceProgress:
    """An address space that exists.

    Attributes:
        number: its number in the trace, from 0.
        pid: the process that has made it.
        pages: size of its range in the trace.
        resident_pages: pages in the EPC; without one, those accessed in this interval.
        faults: page faults that the recorder has answered.
        evictions, reloads: pages that have left the EPC, and come back.
    """

    number: int
    pid: int
    pages: int
    resident_pages: int
    faults: int
    evictions: int = 0
    reloads: int = 0


class Progress:
    """See the module.

    Args:
        intervals: counts accesses.
        interval_ns: length of an interval, 0 with an EPC.
        platform: of the EPC, if there is one.
        epc: what its pages are in.

    Attributes:
        interval_ns, platform: as given.
        counts: what was recorded.
    """

    def __init__(
        self,
        intervals: Intervals,
        interval_ns: int,
        platform: Platform | None = None,
        epc: Epc | None = None,
    ) -> None:
        self._intervals, self._epc = intervals, epc
        self.interval_ns, self.platform = interval_ns, platform
        self.counts = intervals.counts

    def spaces(self) -> list[SpaceProgress]:
        """Return the address spaces that exist."""
        found = []
        for space, traced in self._intervals.spaces():
            resident, evictions, reloads = len(space.present), 0, 0
            if self._epc is not None:
                enclave = self._epc.enclave_of(space)
                if enclave is None:  # it ends this moment
                    continue
                resident = enclave.swap.children
                evictions, reloads = enclave.counts.evictions, enclave.counts.reloads
            found.append(
                SpaceProgress(
                    number=traced.number,
                    pid=traced.pid,
                    pages=traced.numbers.end,
                    resident_pages=resident,
                    faults=traced.faults,
                    evictions=evictions,
                    reloads=reloads,
                )
            )
        return found
