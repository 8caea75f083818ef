"""The state of a run, as another process reads it while the supervisor continues.

Goal: its numbers fit together, and totals never fall.  Method: a platform that pages; readings at
every line of the code that counts a released enclave.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from tests.support.report import DATA_PAGES, EPC_PAGES, Story

from softsgx import live
from softsgx.live.state import _READINGS
from softsgx.report import Totals, summary

ABOUT = live.About(17, "run", ["./app", "x"], "2026-01-01T00:00:00+00:00")


def state_of(story: Story) -> dict[str, Any]:
    return live.state(story.collector, ABOUT)


def test_the_state_is_what_the_summary_says() -> None:
    story = Story(groups={"jobs": {"max": "104KiB"}})
    made = story.enclave(group="jobs")
    story.touch(made, rounds=2)
    state, run = state_of(story), story.summary()
    (enclave,), (told,) = run.enclaves, state["enclaves"]
    for name in ("number", "state", "group", "mrenclave", "size_bytes", "resident_bytes"):
        assert told[name] == getattr(enclave, name)
    for name in ("evictions", "reloads", "eenter", "eexit", "aex", "eresume"):
        assert told[name] == state["totals"][name] == getattr(enclave, name)
    assert told["faults"] == sum(told["faults_by_kind"].values()) == enclave.fault_count
    assert told["evictions"] > 0
    assert (state["pid"], state["command"]) == (17, ["./app", "x"])
    limits = {group["path"]: group["max_bytes"] for group in state["groups"]}
    assert limits == {"/": None, "/jobs": 104 << 10}


def test_the_parts_of_the_epc_are_the_epc() -> None:
    story = Story()
    story.touch(story.enclave())
    epc = state_of(story)["epc"]
    assert epc["used_bytes"] + epc["free_bytes"] == epc["size_bytes"] == EPC_PAGES * 4096
    assert sum(epc["pages"].values()) * 4096 == epc["used_bytes"]
    assert epc["pages"]["va"] >= 1


def test_a_released_enclave_stays_in_the_totals() -> None:
    story = Story()
    made = story.enclave()
    story.touch(made)
    before = state_of(story)
    made.process.exit()
    after = state_of(story)
    assert after["enclaves"] == []
    assert after["totals"]["eenter"] == before["totals"]["eenter"] > 0
    assert after["totals"]["evictions"] >= before["totals"]["evictions"] > 0


def test_no_total_ever_falls_while_an_enclave_is_released() -> None:
    story = Story()
    made = story.enclave()
    story.touch(made)
    readings: list[Totals] = []

    def look(_frame: FrameType, _event: str, _argument: object) -> None:
        readings.append(story.collector.totals())

    def trace(frame: FrameType, _event: str, _argument: object) -> Any:
        listens = frame.f_code is summary.Collector._listen.__code__
        return look if listens else None

    before = story.collector.totals()
    sys.settrace(trace)
    try:
        made.process.exit()
    finally:
        sys.settrace(None)
    assert len(readings) > 5, "the release is several steps"
    assert set(readings) == {before}, "each enclave counts once, at each step"


def test_numbers_of_different_moments_are_read_again(monkeypatch: Any) -> None:
    story = Story()
    made = story.enclave()
    story.touch(made)
    held, readings = story.platform.core.counters.held, []
    # The supervisor changes a count while the first two readings are made.
    real = story.collector.totals

    def totals() -> Totals:
        readings.append(1)
        if len(readings) <= 2:
            held["va"] += 1
        return real()

    monkeypatch.setattr(summary.Collector, "totals", lambda _self: totals())
    pages = state_of(story)["epc"]["pages"]
    assert pages == held
    assert 2 < len(readings) < _READINGS


def test_a_supervisor_that_never_rests_is_answered_for_all_that(monkeypatch: Any) -> None:
    story = Story()
    real, readings = story.collector.totals, []

    def totals() -> Totals:
        readings.append(1)
        return Totals(faults=len(readings))

    assert real() == Totals()
    monkeypatch.setattr(summary.Collector, "totals", lambda _self: totals())
    assert state_of(story)["totals"]["faults"] == _READINGS


def test_an_enclave_has_the_name_of_its_process() -> None:
    story = Story()
    made = story.enclave(DATA_PAGES)
    (entry,) = story.platform.driver.enclaves[0].mms  # type: ignore[union-attr]
    assert state_of(story)["enclaves"][0]["name"] == "", "a simulated process has no name"
    entry.mm.pid = os.getpid()
    (told,) = state_of(story)["enclaves"]
    assert told["pids"] == [os.getpid()]
    assert told["name"] == Path("/proc/self/comm").read_text().strip()
    assert made.data_pages == DATA_PAGES
