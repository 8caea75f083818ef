"""The state of an ordinary program that is recorded, while address spaces come and go.

Method: the real counting of intervals, with address spaces that have pages and numbers only.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from softsgx.engines.ordinary import Progress
from softsgx.engines.ordinary.intervals import Intervals
from softsgx.engines.ordinary.numbers import PageNumbers
from softsgx.live import About, OrdinaryState

ABOUT = About(17, "record", ["./app"], "2026-01-01T00:00:00+00:00")
MS = 1_000_000


class Space(SimpleNamespace):
    """As an address space is to intervals and their progress."""

    def __init__(self) -> None:
        super().__init__(holds=0, present={}, numbers=PageNumbers())

    __hash__ = object.__hash__  # type: ignore[assignment]

    def hide_all(self) -> None:
        self.present.clear()


class Nowhere:
    def __getattr__(self, _name: str) -> Any:
        return lambda *_arguments: None


def test_totals_stay_when_an_address_space_ends() -> None:
    now = [5 * MS]
    intervals = Intervals(10 * MS, cast(Any, Nowhere()), clock=lambda: now[0])
    state = OrdinaryState(clock=lambda: now[0] / 1e9)
    spaces: list[Any] = [Space(), Space()]
    for number, space in enumerate(spaces):
        intervals.add(space, number, 1 << 30)
        for page in range(3 + number):
            space.present[page] = False
            intervals.accessed(space, page, False)
    intervals.written(spaces[0], 1)
    state.started(Progress(intervals, 10 * MS))
    now[0] += 4 * MS
    first = state(ABOUT)
    assert [one["faults"] for one in first["enclaves"]] == [4, 4]
    assert [one["resident_bytes"] for one in first["enclaves"]] == [3 << 12, 4 << 12]
    assert [one["name"] for one in first["enclaves"]] == ["", ""], "there is no such process"
    assert first["totals"]["faults"] == 8
    assert first["elapsed_seconds"] == 0.004
    assert (first["epc"], first["groups"], first["profile"]) == (None, [], "")
    now[0] += 10 * MS
    intervals.between()
    intervals.remove(spaces[0])
    second = state(ABOUT)
    assert [one["number"] for one in second["enclaves"]] == [1]
    assert second["enclaves"][0]["resident_bytes"] == 0
    assert second["totals"]["faults"] == 8
    assert second["recording"] == {
        "interval_seconds": 0.01,
        "intervals": 1,
        "late_intervals": 0,
        "accesses": 7,
        "used_bytes": 7 << 12,
        "most_bytes": 7 << 12,
    }
