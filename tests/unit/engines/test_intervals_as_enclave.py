"""Intervals of ordinary programs: what time a recorded access has."""

from __future__ import annotations

from typing import Any

from softsgx.engines.ordinary.intervals import Intervals


class _Sink:
    """Keeps the accesses."""

    def __init__(self) -> None:
        self.accesses: list[tuple[int, int, bool, int]] = []

    def add_enclave(self, name: str, pages: int, pid: int) -> int:
        del name, pages, pid
        return 7

    def append(self, enclave: int, page: int, write: bool, time_ns: int) -> None:
        self.accesses.append((enclave, page, write, time_ns))

    def grow_enclave(self, enclave: int, pages: int) -> None:
        del enclave, pages

    def flush(self) -> None: ...


class _Numbers:
    """Numbers each page as its address does."""

    end = 100

    def number(self, page: int) -> int:
        return page


class _Space:
    numbers = _Numbers()


def test_accesses_have_the_program_s_own_time_which_never_runs_backwards() -> None:
    now, sink = [1000], _Sink()
    intervals = Intervals(10_000, sink, lambda: now[0])
    space: Any = _Space()
    intervals.add(space, 7)
    now[0] += 500  # of the program
    intervals.accessed(space, 1, False)
    now[0] += 300  # of the recorder
    intervals.accessed(space, 2, True)  # in the same answer
    now[0] += 100
    intervals.spent(400)
    now[0] += 1000  # of the program
    intervals.accessed(space, 3, False)
    intervals.end_interval()
    assert [(page, time) for _, page, _, time in sink.accesses] == [(1, 500), (2, 800), (3, 1500)]
