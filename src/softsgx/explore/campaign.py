"""A campaign: units of work for some scenarios until the budget is used up.

Units are numbered in the order in which they are made, round after round over the scenarios.  Of
equal findings the campaign keeps that of the lowest unit, so the result of a set of units depends
neither on the workers that run them nor on the order in which they end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count

from softsgx.explore.coverage import Coverage
from softsgx.explore.finding import Finding
from softsgx.explore.registry import find_scenario
from softsgx.explore.strategies import PARTS
from softsgx.explore.work import UNIT_RUNS, Unit, UnitResult, minimal, run_unit
from softsgx.workers import Workers

__all__ = ["Budget", "Campaign", "Summary", "run_campaign"]

_SYSTEMATIC = ("dfs", "bounded")
_PART_RUNS = 5_000  # of a systematic search under a budget of time


@dataclass(frozen=True)
class Budget:
    """The budget of a campaign.

    Attributes:
        runs: schedules of each scenario; ``None``: no bound.
        seconds: of real time, after which no unit is begun; ``None``: no bound.
    """

    runs: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Campaign:
    """The parameters of a campaign.

    Attributes:
        scenarios: their names.
        defects: identifiers of the defects that are on.
        strategy: its name.
        budget: how much.
        first_seed: the lowest seed.
        until_found: whether the first finding of a scenario ends it.
    """

    scenarios: tuple[str, ...]
    defects: tuple[str, ...]
    strategy: str
    budget: Budget
    first_seed: int = 0
    until_found: bool = False


@dataclass
class Summary:
    """The results of a campaign until now.

    Attributes:
        coverage: by scenario.
        findings: by scenario and signature, each with the number of its unit.
        units: numbers of the units that were run.
        complete_units: by scenario, the number of units that have tried all their schedules.
        cpu_seconds: processor time of all units.
        seconds: real time of this run.
    """

    coverage: dict[str, Coverage] = field(default_factory=dict)
    findings: dict[tuple[str, str], tuple[int, Finding]] = field(default_factory=dict)
    units: set[int] = field(default_factory=set)
    complete_units: dict[str, int] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    seconds: float = 0.0

    def add(self, result: UnitResult) -> None:
        """Add the result of a unit."""
        unit = result.unit
        self.units.add(unit.number)
        self.cpu_seconds += result.seconds
        coverage = self.coverage.setdefault(unit.scenario, Coverage())
        coverage.merge(result.coverage)
        complete = self.complete_units.get(unit.scenario, 0) + result.coverage.complete
        self.complete_units[unit.scenario] = complete
        coverage.complete = complete == (PARTS if find_scenario(unit.scenario).races else 1)
        for finding in result.findings:
            key = unit.scenario, finding.signature
            if key not in self.findings:
                self.findings[key] = unit.number, finding
                continue
            number, known = self.findings[key]
            low, high = (known, finding) if number < unit.number else (finding, known)
            self.findings[key] = min(number, unit.number), low.seen(high.times)

    def found(self) -> list[Finding]:
        """Return the findings, those of low units first."""
        return [finding for _unit, finding in sorted(self.findings.values(), key=lambda f: f[0])]

    def minimise(self) -> None:
        """Shorten the schedules of all findings."""
        for key, (unit, finding) in self.findings.items():
            if not finding.minimal:
                self.findings[key] = unit, minimal(finding)

    @property
    def runs(self) -> int:
        """Schedules of all scenarios."""
        return sum(coverage.runs for coverage in self.coverage.values())


def run_campaign(
    campaign: Campaign,
    workers: Workers,
    *,
    before: Iterable[UnitResult] = (),
    report: Callable[[Summary, UnitResult], None] | None = None,
) -> Iterator[Summary]:
    """Run a campaign; yield the summary after each unit and at the end, always the same object.

    Args:
        campaign: its parameters.
        workers: run the units.
        before: results of an earlier run of the same campaign; these units do not run again.
        report: called with each new result.
    """
    summary = Summary()
    known = {result.unit: result for result in before}
    began = time.monotonic()
    for result in workers.run(run_unit, _units(campaign, summary, known, began)):
        summary.add(result)
        summary.seconds = time.monotonic() - began
        if report is not None:
            report(summary, result)
        yield summary
    yield summary


def _units(
    campaign: Campaign, summary: Summary, known: dict[Unit, UnitResult], began: float
) -> Iterator[Unit]:
    """Yield units until the budget is used up; add the results that are known."""
    seconds = campaign.budget.seconds
    for unit in _all_units(campaign):
        if unit in known:
            summary.add(known[unit])
            continue
        if seconds is not None and time.monotonic() - began >= seconds:
            return
        found = any(scenario == unit.scenario for scenario, _signature in summary.findings)
        if not (campaign.until_found and found):
            yield unit


def _all_units(campaign: Campaign) -> Iterator[Unit]:
    numbers = count()
    live = {name: _plan(campaign, name) for name in campaign.scenarios}
    while live:
        for name, plan in list(live.items()):
            piece = next(plan, None)
            if piece is None:
                del live[name]
                continue
            yield Unit(
                next(numbers),
                name,
                campaign.defects,
                campaign.strategy,
                *piece,
                until_found=campaign.until_found,
            )


def _plan(campaign: Campaign, name: str) -> Iterator[tuple[int, int]]:
    """Yield the first seed, or the part, and the number of schedules of each unit."""
    runs = campaign.budget.runs
    if not find_scenario(name).races:
        yield campaign.first_seed, 1
    elif campaign.strategy in _SYSTEMATIC:
        each = _PART_RUNS if runs is None else -(-runs // PARTS)
        yield from ((part, each) for part in range(PARTS))
    else:
        first, left = campaign.first_seed, runs
        while left is None or left > 0:
            some = UNIT_RUNS if left is None else min(UNIT_RUNS, left)
            yield first, some
            first += some
            left = None if left is None else left - some
