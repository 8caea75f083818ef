"""Units of work on a Dask cluster.

When a worker is lost, the scheduler gives its units to another one.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from softsgx.errors import SoftSgxError

__all__ = ["DaskCluster", "local_cluster"]

_AHEAD = 2  # units in progress for each thread of the cluster
_PATIENCE_SECONDS = 15
_RETRIES = 3  # of a unit that raises, which is a bug of its function

UnitT = TypeVar("UnitT")
ResultT = TypeVar("ResultT")


class DaskCluster:
    """Runs units on the workers of a running scheduler.

    Args:
        address: of the scheduler, ``tcp://host:8786``; or an object such as ``LocalCluster``.

    Raises:
        SoftSgxError: Dask is not installed, or the scheduler does not answer.
    """

    def __init__(self, address: Any) -> None:
        client_of = _distributed().Client
        try:
            self._client = client_of(address, timeout=_PATIENCE_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise SoftSgxError(
                f"cluster {address}: no scheduler answers ({error}); check the address, "
                "or start one (dask scheduler)"
            ) from error

    def run(
        self, function: Callable[[UnitT], ResultT], units: Iterator[UnitT]
    ) -> Iterator[ResultT]:
        """As :meth:`softsgx.workers.Workers.run`."""
        client = self._client
        pending = _distributed().as_completed(loop=client.loop, with_results=True)
        more = self._submit(function, pending, units)
        while not pending.is_empty():
            _future, result = next(pending)
            yield result
            if more:
                more = self._submit(function, pending, units)

    def close(self) -> None:
        """Disconnect from the cluster, which keeps running."""
        self._client.close()

    def _submit(self, function: Callable[..., Any], pending: Any, units: Iterator[Any]) -> bool:
        """Submit units until enough are in progress; ``False``: there are no more."""
        wanted = _AHEAD * max(1, sum(self._client.nthreads().values()))
        while pending.count() < wanted:
            unit = next(units, None)
            if unit is None:
                return False
            # pure=False: no result comes from a cache, since a unit may measure time.
            pending.add(self._client.submit(function, unit, pure=False, retries=_RETRIES))
        return True


@contextmanager
def local_cluster(jobs: int) -> Iterator[DaskCluster]:
    """Yield a cluster of ``jobs`` processes of this machine, each with one thread.

    Raises:
        SoftSgxError: Dask is not installed.
    """
    with _start_local(jobs) as processes:
        cluster = DaskCluster(processes)
        try:
            yield cluster
        finally:
            cluster.close()


def _start_local(jobs: int) -> Any:
    """Return a local cluster; its processes block the SIGINT of Ctrl-C.

    The cluster ends them itself after this process has received the signal.  They, and those that
    replace lost ones, inherit the signal mask of the thread that starts them.
    """
    local_of = _distributed().LocalCluster
    resource_tracker.ensure_running()  # started later, it would unblock the signal in this thread
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return local_of(
            n_workers=jobs,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            silence_logs=logging.ERROR,  # no warnings about workers that end slowly
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _distributed() -> Any:
    try:
        import distributed
    except ImportError as error:
        raise SoftSgxError(
            "cluster: Dask is not installed; pip install 'softsgx[cluster]'"
        ) from error
    return distributed
