"""Intervals of the program's time: order, writes, and what delays their end.

Method: address spaces that only count how often they are hidden, and a clock that is set.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from softsgx.engines.ordinary.intervals import Intervals
from softsgx.engines.ordinary.numbers import PageNumbers

MS = 1_000_000


class Sink:
    def __init__(self) -> None:
        self.accesses: list[tuple[int, int, bool, int]] = []
        self.events: list[tuple[int, int, str, int]] = []
        self.pages = {0: 0, 1: 0}
        self.flushes = 0

    def add_enclave(self, name: str, pages: int, pid: int) -> int:
        raise AssertionError("intervals add no enclaves")

    def grow_enclave(self, number: int, pages: int) -> None:
        self.pages[number] = pages

    def append(self, enclave: int, page: int, write: bool, time_ns: int) -> None:
        self.accesses.append((enclave, page, write, time_ns))
        self.events.append((enclave, page, "W" if write else "R", time_ns))

    def remove_page(self, enclave: int, page: int, time_ns: int) -> None:
        self.events.append((enclave, page, "removed", time_ns))

    def end_enclave(self, enclave: int, time_ns: int) -> None:
        self.events.append((enclave, 0, "ended", time_ns))

    def flush(self) -> None:
        self.flushes += 1


class Space(SimpleNamespace):
    """As an address space is to intervals."""

    def __init__(self) -> None:
        super().__init__(holds=0, hidden=0, numbers=PageNumbers())

    __hash__ = object.__hash__  # type: ignore[assignment]

    def hide_all(self) -> None:
        assert not self.holds
        self.hidden += 1


class Bench:
    def __init__(self) -> None:
        self.now_ns = 5 * MS
        self.sink = Sink()
        self.intervals = Intervals(10 * MS, self.sink, clock=lambda: self.now_ns)
        self.spaces = [cast(Any, Space()), cast(Any, Space())]
        for number, space in enumerate(self.spaces):
            self.intervals.add(space, number, 100 + number)

    def passes(self, ms: float) -> float | None:
        self.now_ns += int(ms * MS)
        return self.intervals.between()


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_accesses_of_all_spaces_are_handed_over_in_their_order_when_the_interval_ends(
    bench: Bench,
) -> None:
    first, second = bench.spaces
    bench.intervals.accessed(first, 1000, False)
    bench.intervals.accessed(second, 7, True)
    bench.now_ns += MS
    bench.intervals.accessed(first, 1001, True)
    bench.intervals.written(first, 1000)
    assert not bench.sink.accesses
    bench.passes(9)
    assert bench.sink.accesses == [(0, 488, True, 0), (1, 7, True, 0), (0, 489, True, MS)]
    assert bench.sink.pages == {0: 512, 1: 512}
    assert (first.hidden, second.hidden) == (1, 1)


def test_pages_that_are_unmapped_go_in_order_and_a_later_access_is_to_a_new_page(
    bench: Bench,
) -> None:
    first, second = bench.spaces
    for page in (7, 8, 9):
        bench.intervals.accessed(first, page, False)
    bench.intervals.unmapped(first, 8 << 12, 600 << 12)
    bench.intervals.accessed(first, 8, False)
    bench.intervals.written(first, 8)
    bench.passes(10)
    assert bench.sink.events == [
        *((0, page, "R", 0) for page in (7, 8, 9)),
        *((0, page, "removed", 0) for page in (8, 9)),
        (0, 8, "W", 0),
    ]
    assert bench.intervals.counts.accesses == 4
    assert bench.intervals.counts.writes == 1
    bench.sink.events.clear()
    bench.now_ns += MS
    bench.intervals.unmapped(first, 7 << 12, (7 << 12) + 5)
    bench.intervals.unmapped(first, 7 << 12, 8 << 12)
    bench.intervals.unmapped(second, 0, 1 << 40)
    bench.intervals.remove(second)
    assert bench.sink.events == [(0, 7, "removed", 11 * MS), (1, 0, "ended", 11 * MS)]
    assert bench.intervals.counts.intervals == 1


def test_an_address_space_that_ends_in_an_interval_ends_after_its_accesses(bench: Bench) -> None:
    bench.intervals.accessed(bench.spaces[1], 3, True)
    bench.intervals.remove(bench.spaces[1])
    bench.intervals.end_interval()
    assert bench.sink.events == [(1, 3, "W", 0), (1, 0, "ended", 0)]


def test_time_for_answering_does_not_count(bench: Bench) -> None:
    bench.intervals.accessed(bench.spaces[0], 1, False)
    bench.intervals.spent(30 * MS)
    assert bench.passes(35) == pytest.approx(0.005)
    assert bench.spaces[0].hidden == 0
    bench.passes(5)
    assert bench.spaces[0].hidden == 1


def test_what_was_recorded_is_flushed_each_second(bench: Bench) -> None:
    for _second in range(3):
        bench.intervals.accessed(bench.spaces[0], 1, False)
        bench.passes(1001)
    assert bench.sink.flushes == 3


def test_without_accesses_there_is_nothing_to_wait_for(bench: Bench) -> None:
    assert bench.passes(1000) is None
    bench.intervals.accessed(bench.spaces[0], 1, False)
    assert bench.passes(0) == pytest.approx(0.010)
    bench.passes(10)
    assert bench.passes(1000) is None
    assert bench.intervals.counts.intervals == 1


def test_a_space_that_is_changing_is_hidden_as_soon_as_it_is_not(bench: Bench) -> None:
    held, free = bench.spaces
    held.holds = 1
    bench.intervals.accessed(free, 1, False)
    assert bench.passes(10) is not None
    assert (held.hidden, free.hidden) == (0, 1)
    held.holds = 0
    bench.passes(0)
    assert (held.hidden, free.hidden) == (1, 1)
    assert bench.intervals.counts.late == 1


def test_a_store_to_a_page_that_stayed_present_is_an_access_of_its_interval(bench: Bench) -> None:
    space = bench.spaces[0]
    bench.intervals.accessed(space, 1, False)
    bench.passes(10)
    bench.intervals.written(space, 1)
    bench.passes(10)
    assert [(page, write) for _enclave, page, write, _time in bench.sink.accesses] == [
        (1, False),
        (1, True),
    ]


def test_a_space_that_has_ended_keeps_its_accesses(bench: Bench) -> None:
    space = bench.spaces[1]
    bench.intervals.accessed(space, 3, True)
    bench.intervals.remove(space)
    bench.passes(10)
    assert bench.sink.accesses == [(1, 3, True, 0)]
    assert space.hidden == 0


def test_accesses_have_the_program_s_own_time_which_never_runs_backwards(bench: Bench) -> None:
    space, intervals = bench.spaces[0], bench.intervals
    bench.now_ns += 2 * MS  # of the program
    intervals.accessed(space, 1, False)
    bench.now_ns += 3 * MS  # of the recorder
    intervals.accessed(space, 2, True)  # in the same answer
    bench.now_ns += MS
    intervals.spent(4 * MS)
    bench.now_ns += MS  # of the program
    intervals.accessed(space, 3, False)
    bench.now_ns += 3 * MS
    intervals.accessed(space, 4, False)
    intervals.end_interval()
    assert [time for *_, time in bench.sink.accesses] == [2 * MS, 5 * MS, 5 * MS, 6 * MS]
