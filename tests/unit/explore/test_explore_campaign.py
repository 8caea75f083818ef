"""Campaigns: what is found depends neither on who runs the units nor on interruptions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from softsgx.errors import SoftSgxError
from softsgx.explore.campaign import Budget, Campaign, Summary, run_campaign
from softsgx.explore.coverage import Coverage
from softsgx.explore.finding import Token
from softsgx.explore.html import html_page
from softsgx.explore.replay import replay
from softsgx.explore.store import Store
from softsgx.explore.strategies import PARTS, STRATEGIES
from softsgx.explore.text import as_test, shown_lines
from softsgx.explore.work import Unit, UnitResult, minimal, run_unit
from softsgx.runtime import Schedule
from softsgx.workers import InProcess, Processes

BROKEN = Campaign(("fault-reclaim", "two-augments"), ("B11",), "random", Budget(runs=20))


def last(steps: Iterator[Summary]) -> Summary:
    for summary in steps:
        found = summary
    return found


def outcome(summary: Summary) -> object:
    """Everything but times."""
    return summary.units, summary.coverage, summary.found()


@pytest.fixture(scope="module")
def found() -> UnitResult:
    """Some schedules with B1."""
    return run_unit(Unit(0, "fault-reclaim", ("B1",), "random", 0, 20))


def test_a_unit_is_a_function_of_what_it_says(found: UnitResult) -> None:
    again = run_unit(found.unit)
    assert replace(again, seconds=found.seconds) == found
    assert found.findings[0].times > 1 and found.findings[0].repeats


def test_a_result_survives_its_file(found: UnitResult) -> None:
    assert UnitResult.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_schedule_is_cut_down_and_repeats(found: UnitResult) -> None:
    short = minimal(found.findings[0])
    assert short.minimal and short.switches <= found.findings[0].switches
    story = replay(short.token)
    assert story.violated == "lost page" and story.faithful
    assert [line.switch for line in story.lines].count("preempted") == 1
    assert any("sgx:ewb" in text for _at, text in story.history)


def test_a_token_is_read_back(found: UnitResult) -> None:
    token = found.findings[0].token
    assert Token.parse(token.text()) == token


@pytest.mark.parametrize("text", ["", "x1-", "x1-abc", "fault-reclaim", "x1-eJwDAAAAAAE"])
def test_a_text_that_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(SoftSgxError, match=r"^token "):
        Token.parse(text)


def test_a_printed_test_fails_as_long_as_the_defect_is_there(found: UnitResult) -> None:
    token = found.findings[0].token
    for defects, fails in ((token.defects, True), ((), False)):
        namespace: dict[str, object] = {}
        exec(as_test(replay(replace(token, defects=defects))), namespace)
        (test,) = [value for name, value in namespace.items() if name.startswith("test_")]
        assert callable(test)
        if fails:
            with pytest.raises(AssertionError, match="lost page"):
                test()
        else:
            test()


def test_a_replay_says_when_the_program_has_changed(found: UnitResult) -> None:
    token = found.findings[0].token
    assert not replay(replace(token, digest=token.digest ^ 1)).faithful


def test_a_page_of_html_has_every_line_and_no_script(found: UnitResult) -> None:
    story = replay(found.findings[0].token)
    page = html_page([story], {"fault-reclaim": found.coverage})
    assert "<script" not in page and "http" not in page
    assert page.count('class="n"') >= sum(1 for _ in shown_lines(story))
    assert story.token.text() in page and "◀" in page


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_finds_a_race_that_needs_one_switch(strategy: str) -> None:
    parts = range(PARTS) if strategy in ("dfs", "bounded") else range(1)
    units = (Unit(n, "fault-reclaim", ("B1",), strategy, n, 40, True) for n in parts)
    assert any(run_unit(unit).findings for unit in units)


@pytest.mark.slow
def test_a_bounded_search_is_complete_and_its_parts_are_disjoint() -> None:
    whole: set[int] = set()
    runs = 0
    for part in range(PARTS):
        result = run_unit(Unit(part, "alloc-free", (), "bounded", part, 1000))
        assert result.coverage.complete
        whole |= result.coverage.distinct
        runs += result.coverage.runs
    assert runs == len(whole) + PARTS - 1  # each part runs the first schedule


def test_two_places_meet_when_one_is_executed_before_the_other_is_left() -> None:
    coverage = Coverage()
    steps = (("main", "race"), ("a", "X"), ("b", "Y"), ("b", "Z"), ("a", "end"), ("b", "end"))
    coverage.add(Schedule(0, steps))
    # b executed Y while a stood before X; a executed X while b stood before Z.
    assert set(coverage.meetings) == {("X", "Y"), ("Z", "X")}
    assert coverage.missing() == [("X", "Z"), ("Y", "X")]


# --- campaigns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("runs", "complete"), [(1000, True), (PARTS, False)])
def test_a_campaign_is_complete_when_every_part_of_its_search_is(runs: int, complete: bool) -> None:
    campaign = Campaign(("alloc-free",), (), "bounded", Budget(runs=runs))
    summary = last(run_campaign(campaign, InProcess()))
    assert summary.coverage["alloc-free"].complete is complete


@pytest.mark.slow
def test_two_processes_find_what_one_finds() -> None:
    one = last(run_campaign(BROKEN, InProcess()))
    two = last(run_campaign(BROKEN, Processes(2)))
    assert outcome(one) == outcome(two)
    assert [finding.violated for finding in one.found()] == ["lost page"]


def test_a_campaign_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    whole = last(run_campaign(BROKEN, InProcess()))
    store = Store(str(tmp_path), BROKEN)
    steps = run_campaign(BROKEN, InProcess(), report=lambda _summary, result: store.append(result))
    next(steps)  # one unit; then the process is killed while it writes
    units = tmp_path / "units.jsonl"
    units.write_text(units.read_text() + '{"unit": {"numb')
    store = Store(str(tmp_path), BROKEN)
    before = store.results()
    assert len(before) == 1
    ran = []

    def report(_summary: Summary, result: UnitResult) -> None:
        ran.append(result.unit.number)
        store.append(result)

    resumed = last(run_campaign(BROKEN, InProcess(), before=before, report=report))
    assert ran == [1]
    assert outcome(resumed) == outcome(whole)
    assert len(Store(str(tmp_path), BROKEN).results()) == 2


def test_a_larger_budget_goes_on_and_another_campaign_is_refused(tmp_path: Path) -> None:
    Store(str(tmp_path), BROKEN)
    Store(str(tmp_path), replace(BROKEN, budget=Budget(seconds=5)))
    with pytest.raises(SoftSgxError, match="other strategy"):
        Store(str(tmp_path), replace(BROKEN, strategy="pct"))


def test_a_damaged_line_is_reported_with_its_number(tmp_path: Path) -> None:
    store = Store(str(tmp_path), BROKEN)
    (tmp_path / "units.jsonl").write_text("{}\n{}\n")
    with pytest.raises(SoftSgxError, match=r"units.jsonl:1: not a result"):
        store.results()


def test_the_first_finding_ends_a_scenario_if_that_is_wanted() -> None:
    campaign = replace(BROKEN, scenarios=("two-augments",), budget=Budget(runs=5000))
    summary = last(run_campaign(replace(campaign, until_found=True), InProcess()))
    assert len(summary.found()) == 1 and summary.runs < 200


def test_a_budget_of_time_ends_a_campaign_without_end() -> None:
    campaign = Campaign(("alloc-free",), (), "random", Budget(seconds=0.2))
    summary = last(run_campaign(campaign, InProcess()))
    assert summary.runs and summary.seconds < 30
