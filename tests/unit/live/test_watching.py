"""What ``softsgx top`` computes and draws from states of runs.

Goal: rates of the right interval; drawings that fit.  Method: invented states; every drawing is
measured, on terminals of 40 to 200 columns.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from softsgx.live import NoAnswer, RunEnded, screen, watching
from softsgx.live.watching import Watched, Watching

EVENTS = ("faults", "evictions", "reloads", "eenter", "eexit", "aex", "eresume")


def counts(many: int) -> dict[str, Any]:
    return {**dict.fromkeys(EVENTS, many), "fault_seconds": 0.0}


def enclave(number: int, many: int, **changes: Any) -> dict[str, Any]:
    return {
        "number": number,
        "pids": [4_000_000 + number],
        "name": "a program with a long name",
        "group": "/jobs",
        "state": "initialized",
        "mrenclave": "ab" * 32,
        "base": 1 << 40,
        "size_bytes": 64 << 30,
        "resident_bytes": (93 << 20) + 4096 * number,
        "faults_by_kind": {"major": many},
        **counts(many),
        **changes,
    }


def state(many: int, seconds: float, *, enclaves: int = 1, began: str = "a") -> dict[str, Any]:
    group = {"usage_bytes": 4096, "max_bytes": 8192, "peak_bytes": 8192, "refused": many}
    return {
        "format": "softsgx-status/1",
        "pid": 4_111_111,
        "verb": "run",
        "command": ["./program", "with many", "x" * 100],
        "began": began,
        "elapsed_seconds": seconds,
        "epc": {
            "size_bytes": 98041856,
            "used_bytes": 98041856 // 2,
            "free_bytes": 98041856 // 2,
            "pages": {"va": 12_345, "secs": 1},
        },
        "totals": counts(many),
        "reclaim": {"batches": 1, "seconds": 0.1},
        "groups": [
            {"path": "/", **group, "max_bytes": None},
            {"path": "/jobs/of/a/user", **group},
        ],
        "enclaves": [enclave(number, many) for number in range(1, enclaves + 1)],
    }


def watched(*states: dict[str, Any]) -> Watched:
    run = Watched(4_111_111)
    for each in states:
        run.add(each)
    return run


def test_the_first_rate_is_the_average_since_the_start() -> None:
    assert watched(state(50, 10.0)).state["rates"]["faults_per_second"] == 5.0


def test_later_rates_are_those_since_the_last_look() -> None:
    run = watched(state(50, 10.0), state(250, 10.5))
    assert run.state["rates"]["evictions_per_second"] == 400.0
    assert run.state["enclaves"][0]["rates"]["faults_per_second"] == 400.0
    assert list(run.history) == [5.0, 400.0]


def test_a_new_run_with_an_old_number_starts_anew() -> None:
    run = watched(state(1000, 10.0), state(10, 2.0, began="b"))
    assert run.state["rates"]["faults_per_second"] == 5.0
    assert list(run.history) == [5.0]


def test_no_time_between_two_looks_is_no_rate() -> None:
    run = watched(state(50, 10.0), state(50, 10.0))
    assert run.state["rates"]["faults_per_second"] == 0.0


def lines_of(runs: list[Watched], width: int, height: int | None = None, **options: Any) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(screen.screen(runs, width=width, height=height, **options))
    return captured.get()


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("many", [0, 7, 123_456_789])
def test_a_drawing_fits_the_columns(width: int, many: int) -> None:
    drawn = lines_of([watched(state(many, 10.0)), Watched(7)], width)
    assert all(len(line.rstrip()) <= width for line in drawn.splitlines())
    if width >= 60:
        assert "93 MiB" in drawn
        assert "faults/s evicted/s" in drawn
        assert "4000001" in drawn


@given(height=st.integers(24, 60), runs=st.integers(1, 2), enclaves=st.integers(0, 100))
def test_a_drawing_fits_the_lines(height: int, runs: int, enclaves: int) -> None:
    drawn = lines_of([watched(state(9, 1.0, enclaves=enclaves))] * runs, 80, height)
    assert len(drawn.splitlines()) <= height
    hidden = sum(
        int(line.split()[1]) for line in drawn.splitlines() if line.strip().endswith("more")
    )
    assert drawn.count("a program") + hidden == runs * enclaves


def test_the_busiest_enclaves_are_those_that_are_shown() -> None:
    busy = state(9, 1.0, enclaves=50)
    busy["enclaves"][30] = enclave(31, 5000)
    drawn = lines_of([watched(busy)], 80, 14)
    assert "5,000" in drawn


def test_a_terminal_without_other_characters_gets_ascii() -> None:
    drawn = lines_of([watched(state(50, 10.0), state(90, 11.0))], 80, ascii_only=True)
    assert drawn.isascii()


@given(st.lists(st.floats(0, 1e9), max_size=50), st.integers(1, 40))
def test_a_sparkline_is_no_longer_than_its_values(values: list[float], width: int) -> None:
    assert len(screen.sparkline(values, width)) == min(len(values), width)


def test_runs_that_end_go_and_the_last_ones_stay_to_be_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: dict[int, Any] = {1: state(1, 1.0), 2: state(2, 1.0)}

    def ask(pid: int) -> dict[str, Any]:
        answer = answers[pid]
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)

    monkeypatch.setattr(watching, "ask", ask)
    monkeypatch.setattr(watching, "running_pids", lambda: list(answers))
    both = Watching()
    assert both.look()
    assert [run.pid for run in both.runs] == [1, 2]
    answers[1] = RunEnded()
    assert both.look()
    answers[2] = NoAnswer("2: timed out")
    assert both.look(), "it may answer again"
    document = json.loads(json.dumps(both.document()))
    assert (document["runs"], document["silent"]) == ([], {"2": "2: timed out"})
    answers[2] = RunEnded()
    assert not both.look()
    assert [run.state["totals"]["faults"] for run in both.runs] == [2]


def test_a_run_that_never_answered_is_shown_as_such() -> None:
    run = Watched(7)
    run.silent = "7: timed out"
    assert "7  does not answer: 7: timed out" in lines_of([run], 80)
