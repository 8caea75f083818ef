"""Units of work: some schedules of one scenario, a pure function of the unit's fields.

A unit has the same result on every machine and at any time.  So a campaign on many machines has the
same findings as one on a single processor, and a lost unit is run again.
"""

from __future__ import annotations

import time
import zlib
from dataclasses import asdict, dataclass
from typing import Any, Self

from softsgx.defects import Defect
from softsgx.explore.arena import STEP_LIMIT, Arena
from softsgx.explore.coverage import Coverage
from softsgx.explore.finding import Finding, Token
from softsgx.explore.registry import NamedScenario, find_scenario
from softsgx.explore.strategies import search_of
from softsgx.explore.violation import Violation, property_of, signature
from softsgx.runtime import Replay, Run, Schedule, Stretches, Uninterrupted, shrink

__all__ = ["UNIT_RUNS", "Unit", "UnitResult", "arena_of", "minimal", "run_unit", "token_of"]

UNIT_RUNS = 200
"""Schedules of a unit, unless the campaign has fewer."""

_ATTEMPTS = 150


@dataclass(frozen=True)
class Unit:
    """Some schedules of one scenario.

    Attributes:
        number: of the unit in its campaign; findings of lower units come first.
        scenario: its name.
        defects: identifiers of the defects that are on.
        strategy: its name.
        first: the first seed; of a systematic strategy, the number of the part.
        count: the most schedules.
        until_found: whether the first finding ends the unit.
    """

    number: int
    scenario: str
    defects: tuple[str, ...]
    strategy: str
    first: int
    count: int
    until_found: bool = False

    @property
    def defect_set(self) -> frozenset[Defect]:
        """The defects that are on."""
        return frozenset(defect for defect in Defect if defect in self.defects)


@dataclass(frozen=True)
class UnitResult:
    """The result of a unit.

    Attributes:
        unit: the unit.
        coverage: of its schedules.
        findings: one of each kind, the first that was seen.
        seconds: processor time that it took; the only part that differs from run to run.
    """

    unit: Unit
    coverage: Coverage
    findings: tuple[Finding, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return everything, for a file."""
        return {
            "unit": asdict(self.unit),
            "coverage": self.coverage.to_json(),
            "findings": [finding.to_json() for finding in self.findings],
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """Return what :meth:`to_json` wrote."""
        unit = document["unit"]
        return cls(
            Unit(**{**unit, "defects": tuple(unit["defects"])}),
            Coverage.from_json(document["coverage"]),
            tuple(map(Finding.from_json, document["findings"])),
            document["seconds"],
        )


def run_unit(unit: Unit) -> UnitResult:
    """Run a unit."""
    began = time.process_time()
    named = find_scenario(unit.scenario)
    arena = arena_of(named, unit.defect_set)
    coverage = Coverage()
    found: dict[str, Finding] = {}
    first = arena.run(unit.first, Uninterrupted())
    if first.error is not None or not named.races:
        # One schedule says it all, or even the plainest schedule fails.
        coverage.add(first.schedule)
        coverage.complete = not named.races
        _note(found, unit, named, first, 0)
    if named.races and not (found and unit.until_found):
        search = search_of(unit.strategy, unit.first, unit.count, steps=len(first.schedule))
        while (chosen := search.next()) is not None:
            run = arena.run(*chosen)
            search.ran(run.policy)
            coverage.add(run.schedule)
            if run.error is not None:
                _note(found, unit, named, run, coverage.runs)
                if unit.until_found:
                    break
        else:
            coverage.complete = coverage.runs < unit.count
    arena.close()
    return UnitResult(unit, coverage, tuple(found.values()), time.process_time() - began)


def arena_of(named: NamedScenario, defects: frozenset[Defect], **options: Any) -> Arena:
    """Return the arena of a scenario; options as :class:`Arena` has."""
    return Arena(named.scenario, defects, step_limit=named.step_limit or STEP_LIMIT, **options)


def _note(
    found: dict[str, Finding], unit: Unit, named: NamedScenario, run: Run, number: int
) -> None:
    """Record a violation; repeat the first one of its kind on a stage of its own."""
    error = run.error
    if error is None:
        return
    kind = signature(error)
    if kind in found:
        found[kind] = found[kind].seen(1)
        return
    arena = arena_of(named, unit.defect_set, rounds=1)
    again = arena.run(run.schedule.seed, Replay(run.schedule))
    repeats = again.error is not None and signature(again.error) == kind
    found[kind] = Finding(
        property_of(error),
        str(error),
        kind,
        error.page if isinstance(error, Violation) else 0,
        token_of(unit.scenario, unit.defects, run.schedule),
        unit.strategy,
        number,
        len(run.schedule),
        len(run.schedule.switches()),
        repeats=repeats,
    )


def token_of(scenario: str, defects: tuple[str, ...], schedule: Schedule) -> Token:
    """Return the token of a schedule."""
    digest = zlib.crc32(repr(schedule.steps).encode())
    return Token(scenario, defects, schedule.seed, tuple(schedule.stretches()), digest)


def minimal(finding: Finding) -> Finding:
    """Return a finding with its schedule shortened; unchanged if it does not repeat."""
    token = finding.token
    arena = arena_of(find_scenario(token.scenario), token.defect_set, rounds=1)
    run = arena.run(token.seed, Stretches(token.stretches))
    if run.error is None or signature(run.error) != finding.signature:
        return finding
    best = shrink(arena.run, run, attempts=_ATTEMPTS, kind=signature)
    error = best.error
    assert error is not None, "a shorter run fails as well"
    return Finding(
        finding.violated,
        str(error),
        finding.signature,
        error.page if isinstance(error, Violation) else 0,
        token_of(token.scenario, token.defects, best.schedule),
        finding.strategy,
        finding.run,
        len(best.schedule),
        len(best.schedule.switches()),
        finding.times,
        finding.repeats,
        minimal=True,
    )
