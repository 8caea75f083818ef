"""Every defect that is switched on violates its property; without it the property holds.

Method: the stories of the package, each run with its defect and without it.
"""

from __future__ import annotations

import pytest

from softsgx.arch import PAGE_BYTES
from softsgx.defects import Defect
from softsgx.driver import PROT_READ, FaultResult
from softsgx.runtime import Replay, Script, SeededRuntime, explore, explore_all
from softsgx.runtime.failures import ExplorationFailed
from softsgx.sim.stories import STORIES, PropertyViolated
from softsgx.sim.stories.system import System, launch

SLOW = {Defect.RELEASE_WITHOUT_RESCHED, Defect.PCMD_PAGE_TRUNCATED_WHILE_SHARED}


@pytest.mark.parametrize(
    "defect",
    [
        pytest.param(defect, marks=pytest.mark.slow) if defect in SLOW else defect
        for defect in Defect
        if defect in STORIES
    ],
)
def test_a_defect_shows_with_its_name_and_not_without(defect: Defect) -> None:
    broken = STORIES[defect].tell({defect})
    assert broken.violation, f"{defect!r} is on and nothing shows"
    fixed = STORIES[defect].tell()
    assert fixed.violation is None, f"{defect!r} is off and shows: {fixed.violation}"


def test_every_defect_that_can_be_switched_on_has_a_story() -> None:
    assert STORIES.keys() == {defect for defect in Defect if defect.can_be_switched_on}


def test_the_schedule_of_an_outcome_violates_the_property_again() -> None:
    defect = Defect.CONCURRENT_EAUG_REFUSED
    outcome = STORIES[defect].tell({defect})
    runtime = SeededRuntime(outcome.schedule.seed, policy=Replay(outcome.schedule))
    program = STORIES[defect].program({defect})
    with pytest.raises(PropertyViolated, match="SIGBUS"):
        runtime.run(program(runtime))


def test_the_schedule_of_an_outcome_has_few_switches() -> None:
    """Two faults, both past the unlocked look: main, first, second, first, second, main."""
    defect = Defect.CONCURRENT_EAUG_REFUSED
    outcome = STORIES[defect].tell({defect})
    assert len(outcome.schedule.switches()) <= 5


def test_a_search_of_schedules_finds_the_race_of_a_story() -> None:
    defect = Defect.FREE_COUNT_WITHOUT_LOCK
    story = STORIES[defect]
    with pytest.raises(ExplorationFailed, match="counted free"):
        explore(story.program({defect}), range(100))
    assert explore_all(story.program(), preemptions=1).complete


def test_the_table_has_every_defect_and_the_place_of_its_code() -> None:
    numbers = [*(f"B{n}" for n in range(1, 37)), *(f"L{n}" for n in range(1, 14))]
    assert list(Defect) == numbers
    for defect in Defect:
        assert defect.symptom and defect.explanation.endswith(".") and defect.fix.endswith(".")


def test_a_scripted_interleaving_of_b11_has_one_winner() -> None:
    """The race of B11 step by step: both past the unlocked look, then one after the other."""
    script = Script(("first", "acquire encl1"), ("second", "acquire encl1"), strict=False)
    runtime = SeededRuntime(0, policy=script)
    results: list[FaultResult] = []

    def main() -> None:
        made = launch(System(runtime=runtime).process(), 1, size=16 * PAGE_BYTES)
        mm = made.process.mm
        tasks = [
            runtime.spawn(lambda: results.append(mm.fault(made.data(3), PROT_READ)), name)
            for name in ("first", "second")
        ]
        for task in tasks:
            task.join()

    runtime.run(main)
    assert results == [FaultResult.NOPAGE, FaultResult.NOPAGE]
