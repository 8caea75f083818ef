"""Takes samples of a run from time to time, for pages and status lines; a fault costs nothing.

When there are too many samples, the sampler drops every second one and doubles the interval.  So
they always cover the whole run evenly.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from softsgx.ondemand import dataclass
from softsgx.report.summary import Collector

__all__ = ["Sample", "Sampler", "Ticker"]

_FIRST_INTERVAL_S = 0.005
_LIMIT = 1024
_MOST_ENCLAVES = 64
#: A sample may take this share of the time between two samples.
_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class Sample:
    """The state of a run at one moment.

    Attributes:
        time_s: since the program's start.
        used_pages: EPC pages in use for any purpose.
        faults, evictions, reloads: so far, of all enclaves.
        fault_s: time spent in page faults so far.
        resident: resident pages by enclave, of the first enclaves that live.
    """

    time_s: float
    used_pages: int
    faults: int
    evictions: int
    reloads: int
    fault_s: float
    resident: dict[int, int]


class Sampler:
    """Takes samples of what a collector follows.

    Args:
        collector: attached before the first sample is taken.
        work_ns: processor time of the thread that takes samples.
        limit: samples that are kept, at least 2.

    Attributes:
        samples: in order of time.
        interval_s: seconds until the next one should be taken.
    """

    def __init__(
        self,
        collector: Collector,
        *,
        work_ns: Callable[[], int] = time.thread_time_ns,
        limit: int = _LIMIT,
    ) -> None:
        assert limit > 1, "samples of a run are at least its start and its end"
        self._collector, self._work_ns, self._limit = collector, work_ns, limit
        self.samples: list[Sample] = []
        self.interval_s = _FIRST_INTERVAL_S

    def take(self) -> None:
        """Take a sample."""
        began_ns = self._work_ns()
        self.samples.append(self._look(self._collector.elapsed_s))
        if len(self.samples) > self._limit:
            del self.samples[1::2]
            self.interval_s *= 2
        cost_s = (self._work_ns() - began_ns) / 1e9
        self.interval_s = max(self.interval_s, cost_s / _SHARE)

    def tick(self) -> float:
        """Take a sample; return the seconds until the next: for a :class:`Ticker`."""
        self.take()
        return self.interval_s

    def _look(self, now_s: float) -> Sample:
        platform = self._collector.platform
        assert platform is not None, "a sampler before its collector was attached"
        totals = self._collector.totals()
        living = self._collector.living()[:_MOST_ENCLAVES]
        return Sample(
            time_s=now_s,
            used_pages=platform.core.epc_pages - platform.core.free_pages,
            faults=totals.faults,
            evictions=totals.evictions,
            reloads=totals.reloads,
            fault_s=totals.fault_s,
            resident={enclave.number: enclave.swap.children for enclave in living},
        )


class Ticker:
    """Calls a function again and again in a thread of its own, until it is stopped.

    Args:
        tick: what to call; returns the seconds until the next call.
        first_s: seconds until the first call.
    """

    def __init__(self, tick: Callable[[], float], first_s: float) -> None:
        self._tick, self._delay_s = tick, first_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; nothing is called afterwards."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._delay_s):
            self._delay_s = self._tick()
