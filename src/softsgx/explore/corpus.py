"""The corpus of known defects: measures whether, and how soon, explore finds each of them.

If a defect needs a race, explore searches for it with a scenario that was not written for it, where
there is one: the checks of that scenario are independent of the defect.  If it needs no race,
explore runs its story, the program of :mod:`softsgx.sim.stories` that shows it.  With the defect
off, the same schedules must find nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from softsgx.defects import Defect
from softsgx.explore.finding import Finding
from softsgx.explore.registry import find_scenario
from softsgx.explore.work import Unit, run_unit

__all__ = ["HUNTED_IN", "Hunt", "hunt", "hunt_all"]

HUNTED_IN = {
    "B1": "fault-reclaim",
    "B2": "fault-reclaim",
    "B8": "augment-secs",
    "B10": "augment-remove",
    "B11": "two-augments",
    "B12": "poison-reclaim",
    "B13": "exit-close",
    "B14": "exit-close",
    "B15": "fault-reclaim",
    "B24": "fork-reclaim",
    "B27": "guest-ecreate",
    "L5": "poison-free",
    "L6": "poison-reclaim",
    "L12": "vepc-mappings",
}
"""The scenarios in which defects are hunted; the others have their stories."""

_STEP_RUNS = 100  # schedules of a unit
_MOST_RUNS = 20_000
_MOST_SECONDS = 60.0


@dataclass(frozen=True)
class Hunt:
    """The result of the search for one defect.

    Attributes:
        defect: its identifier.
        scenario: the scenario of the search.
        runs: schedules until the defect was found; all schedules if it was not.
        seconds: real time of these schedules.
        finding: the finding; ``None``: nothing within the budget.
        without: the finding in as many schedules, but at least one unit, with the defect off.
    """

    defect: str
    scenario: str
    runs: int
    seconds: float
    finding: Finding | None
    without: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything, for output."""
        return {
            "defect": self.defect,
            "scenario": self.scenario,
            "schedules": self.runs,
            "seconds": round(self.seconds, 3),
            "found": None if self.finding is None else self.finding.to_json(),
            "without": [finding.to_json() for finding in self.without],
        }


def hunt_all(defects: Iterable[str] = ()) -> Iterator[Hunt]:
    """Search for one defect after the other.

    Args:
        defects: identifiers; all that can be switched on when empty.
    """
    chosen = list(defects) or [defect.value for defect in Defect if defect.can_be_switched_on]
    for name in chosen:
        yield hunt(name)


def hunt(defect: str) -> Hunt:
    """Search for one defect until it is found, for 20 000 schedules or 60 s at most."""
    scenario = HUNTED_IN.get(defect, f"story:{defect}")
    began = time.monotonic()
    runs, finding = 0, None
    for unit in _units(scenario, (defect,)):
        result = run_unit(unit)
        runs += result.coverage.runs
        if result.findings:
            finding = result.findings[0]
            break
        if time.monotonic() - began > _MOST_SECONDS:
            break
    seconds = time.monotonic() - began
    without: list[Finding] = []
    for unit in _units(scenario, ()):
        if unit.first and unit.first >= runs:
            break
        without += run_unit(unit).findings
    return Hunt(defect, scenario, runs, seconds, finding, tuple(without))


def _units(scenario: str, defects: tuple[str, ...]) -> Iterator[Unit]:
    if not find_scenario(scenario).races:
        yield Unit(0, scenario, defects, "random", 0, 1, until_found=True)
        return
    for number, first in enumerate(range(0, _MOST_RUNS, _STEP_RUNS)):
        # Some bugs need one task far ahead of another, some need many switches.
        strategy = "random" if number % 2 else "pct"
        yield Unit(number, scenario, defects, strategy, first, _STEP_RUNS, until_found=True)
