"""The interface of workers, and the two implementations that use this machine only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import Protocol, TypeVar

__all__ = ["InProcess", "Processes", "Workers"]

_AHEAD = 2  # units in progress for each worker

UnitT = TypeVar("UnitT")
ResultT = TypeVar("ResultT")


class Workers(Protocol):
    """Runs units."""

    def run(
        self, function: Callable[[UnitT], ResultT], units: Iterator[UnitT]
    ) -> Iterator[ResultT]:
        """Yield the function's result for each unit, in any order.

        The next unit is taken when a worker can start it.  Function, units and results can be
        pickled.
        """


class InProcess:
    """Runs one unit after the other in this process."""

    def run(
        self, function: Callable[[UnitT], ResultT], units: Iterator[UnitT]
    ) -> Iterator[ResultT]:
        """As :meth:`Workers.run`."""
        return map(function, units)


class Processes:
    """Runs units in processes of this machine.

    Args:
        jobs: number of processes.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs

    def run(
        self, function: Callable[[UnitT], ResultT], units: Iterator[UnitT]
    ) -> Iterator[ResultT]:
        """As :meth:`Workers.run`."""
        # Not forked: a child would inherit greenlets, and descriptors of this process.
        pool = ProcessPoolExecutor(self._jobs, mp_context=get_context("spawn"))
        pending: set[Future[ResultT]] = set()
        try:
            more = True
            while more or pending:
                while more and len(pending) < _AHEAD * self._jobs:
                    unit = next(units, None)
                    more = unit is not None
                    if unit is not None:
                        pending.add(pool.submit(function, unit))
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
