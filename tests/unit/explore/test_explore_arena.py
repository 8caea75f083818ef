"""Scenarios and rounds: a schedule depends on its seed alone, and clean code violates nothing."""

from __future__ import annotations

import pytest

from softsgx.defects import Defect
from softsgx.explore import BUILT_IN, Stage
from softsgx.explore.arena import Arena
from softsgx.explore.registry import find_scenario
from softsgx.explore.violation import property_of
from softsgx.explore.work import Unit, arena_of, run_unit
from softsgx.runtime import Pct, Replay, Uniform

ROUNDS = 12


RESTORED = (
    "fault-reclaim",
    "thread-reclaim",
    "two-faults",
    "two-augments",
    "augment-remove",
    "fork-reclaim",
    "alloc-free",
)
"""Scenarios that play many rounds on one stage."""


@pytest.mark.parametrize("name", RESTORED)
def test_a_seed_gives_the_same_schedule_in_every_round_and_on_a_new_stage(name: str) -> None:
    used = arena_of(BUILT_IN[name], frozenset())
    for seed in range(ROUNDS):
        used.run(1000 + seed, Uniform())  # another history before each
        new = arena_of(BUILT_IN[name], frozenset(), rounds=1)
        assert used.run(seed, Uniform()).schedule == new.run(seed, Uniform()).schedule
    assert used.stages == 1
    used.close()


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_scenario_finds_anything_in_clean_code(name: str) -> None:
    for strategy in ("random", "pct"):
        result = run_unit(Unit(0, name, (), strategy, 0, ROUNDS))
        assert not result.findings, result.findings[0].text
        assert result.coverage.runs == ROUNDS


def _staged(stage: Stage) -> None:
    """A fault against an eviction."""
    enclave = stage.enclave(2)
    enclave.evict(0)
    stage.task("fault", lambda: enclave.touch(0))
    stage.task("reclaim", lambda: enclave.evict(1))


def test_a_failed_schedule_fails_again_on_a_new_stage() -> None:
    defects = frozenset({Defect.PCMD_PAGE_TRUNCATED_WHILE_SHARED})
    arena = Arena(_staged, defects)
    failed = next(run for seed in range(50) if (run := arena.run(seed, Uniform())).error)
    again = Arena(_staged, defects).run(failed.schedule.seed, Replay(failed.schedule))
    assert again.error is not None and failed.error is not None
    assert property_of(again.error) == property_of(failed.error) == "lost page"


def test_a_wrong_count_is_seen_at_the_place_where_it_becomes_wrong() -> None:
    arena = Arena(_staged, frozenset({Defect.FREE_COUNT_WITHOUT_LOCK}))
    failed = next(run for seed in range(50) if (run := arena.run(seed, Uniform())).error)
    assert "free count is" in str(failed.error)
    assert failed.schedule[-1][1] != "end"


def test_tasks_that_never_end_are_a_livelock() -> None:
    def endless(stage: Stage) -> None:
        def run() -> None:
            while True:
                stage.runtime.point("again")

        stage.task("endless", run)

    run = Arena(endless, step_limit=500).run(0, Uniform())
    assert run.error is not None and property_of(run.error) == "livelock"


def test_tasks_that_wait_for_each_other_are_a_deadlock() -> None:
    def nested(stage: Stage) -> None:
        one, two = stage.runtime.lock("one"), stage.runtime.lock("two")

        def first() -> None:
            with one, two:
                pass

        def second() -> None:
            with two, one:
                pass

        stage.task("first", first)
        stage.task("second", second)

    arena = Arena(nested)
    errors = [arena.run(seed, Uniform()).error for seed in range(20)]
    assert "deadlock" in {property_of(error) for error in errors if error is not None}


def test_a_setup_that_fails_is_a_finding_without_a_schedule() -> None:
    def broken(stage: Stage) -> None:
        raise AssertionError("the stage falls down")

    run = Arena(broken).run(0, Pct(2, 10))
    assert str(run.error) == "the stage falls down" and not len(run.schedule)


def test_a_story_is_a_scenario_and_its_own_policy_is_kept() -> None:
    named = find_scenario("story:B21")
    assert not named.races
    assert arena_of(named, frozenset()).run(0, Uniform()).error is None
