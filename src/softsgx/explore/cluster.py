"""Units of work on a Dask cluster.

When a worker is lost, the scheduler gives its unit to another one.  A unit is a pure function, so
only time is lost, and the findings are those of one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from softsgx.errors import SoftSgxError
from softsgx.explore.work import Unit, UnitResult, run_unit

__all__ = ["DaskCluster"]

_AHEAD = 2  # units in progress for each thread of the cluster
_PATIENCE_SECONDS = 15
_RETRIES = 3  # of a unit that raises, which is a mistake of its scenario or ours


class DaskCluster:
    """Runs units on the workers of a running scheduler.

    Args:
        address: of the scheduler, ``tcp://host:8786``; or its object, as ``LocalCluster`` is.

    Raises:
        SoftSgxError: Dask is not installed, or the scheduler does not answer.
    """

    def __init__(self, address: Any) -> None:
        try:
            from distributed import Client
        except ImportError as error:
            raise SoftSgxError(
                "cluster: Dask is not installed; pip install 'softsgx[cluster]'"
            ) from error
        try:
            self._client = Client(address, timeout=_PATIENCE_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise SoftSgxError(f"cluster {address}: no scheduler answers ({error})") from error

    def run(self, units: Iterator[Unit]) -> Iterator[UnitResult]:
        """As :meth:`softsgx.explore.campaign.Workers.run`."""
        from distributed import as_completed

        with self._client as client:
            pending = as_completed(loop=client.loop, with_results=True)
            more = self._submit(client, pending, units, self._wanted(client))
            while not pending.is_empty():
                _future, result = next(pending)
                yield result
                if more:
                    more = self._submit(client, pending, units, self._wanted(client))

    @staticmethod
    def _wanted(client: Any) -> int:
        threads = sum(client.nthreads().values())
        return _AHEAD * max(1, int(threads))

    @staticmethod
    def _submit(client: Any, pending: Any, units: Iterator[Unit], wanted: int) -> bool:
        """Submit units until so many are in progress; ``False``: there are no more."""
        while pending.count() < wanted:
            unit = next(units, None)
            if unit is None:
                return False
            # Never answered from a cache: a unit is timed where it runs.
            pending.add(client.submit(run_unit, unit, pure=False, retries=_RETRIES))
        return True
