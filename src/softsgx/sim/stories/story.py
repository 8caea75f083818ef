"""What a story is, how it runs, and the scene that its scenario receives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from softsgx.defects import Defect
from softsgx.runtime import (
    Policy,
    Program,
    Replay,
    ReplayDiverged,
    Schedule,
    ScriptNotFollowed,
    SeededRuntime,
    Uninterrupted,
    minimise,
)
from softsgx.sim.stories.system import System
from softsgx.trace import Event

__all__ = ["STORIES", "Outcome", "PropertyViolated", "Scene", "Story", "story"]

_STEP_LIMIT = 1_000_000
_ATTEMPTS = 80
"""The most runs that minimising one schedule may take."""


class PropertyViolated(AssertionError):
    """The property of a story does not hold; the text says what was seen instead."""


@dataclass(frozen=True)
class Scene:
    """What a scenario receives.

    Attributes:
        runtime: of the machine and of all tasks.
        defects: the defects that are switched on.
        tracer: receives the events of all components; ``None``: events are dropped.
    """

    runtime: SeededRuntime
    defects: frozenset[Defect]
    tracer: Callable[[Event], None] | None = None

    def system(self, **options: Any) -> System:
        """Return a new machine with an operating system; options as :class:`System` has."""
        return System(runtime=self.runtime, defects=self.defects, tracer=self.tracer, **options)

    def together(self, **runs: Callable[[], object]) -> None:
        """Run tasks at the same time, under these names, until all have ended.

        Raises:
            AssertionError: of the first task that failed.
        """
        tasks = [self.runtime.spawn(partial(_run, run), name) for name, run in runs.items()]
        failure: AssertionError | None = None
        for task in tasks:
            try:
                task.join()
            except AssertionError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def claim(self, holds: bool, otherwise: str) -> None:
        """Check the story's property.

        Args:
            holds: whether it holds.
            otherwise: what is seen instead, for the error.

        Raises:
            PropertyViolated: it does not hold.
        """
        if not holds:
            raise PropertyViolated(otherwise)


def _run(call: Callable[[], object]) -> None:
    call()


Scenario = Callable[[Scene], None]


@dataclass(frozen=True)
class Outcome:
    """How a story ended.

    Attributes:
        defects: the defects that were switched on.
        violation: what was seen instead of the property; ``None``: it held in every run.
        runs: how many schedules were tried.
        schedule: the one that violates the property, reduced to the switches that it needs; the
            last one that was tried where the property held.
        events: what the components reported during that run, in order.
    """

    defects: frozenset[Defect]
    violation: str | None
    runs: int
    schedule: Schedule
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Story:
    """A scenario and the property that it checks.

    Attributes:
        name: of the scenario.
        defects: the defects that violate the property, each on its own.
        holds: the property, as one sentence.
        told: what the scenario does.
        scenario: runs it; raises :class:`PropertyViolated`, or an ``AssertionError`` of the
            component that finds its own state broken.
        seeds: of the schedules to try; one seed where the scenario has one task.
        policy: chooses the next task, where a seed alone is not enough; ``None``: any task, by
            the seed.
        step_limit: scheduling points after which the run counts as a livelock, which violates the
            property.
    """

    name: str
    defects: tuple[Defect, ...]
    holds: str
    told: str
    scenario: Scenario
    seeds: range
    policy: Policy | None
    step_limit: int

    @property
    def races(self) -> bool:
        """Whether the outcome depends on the schedule."""
        return len(self.seeds) > 1

    def program(
        self, defects: Iterable[Defect] = (), *, tracer: Callable[[Event], None] | None = None
    ) -> Program:
        """Return the story as a program for :func:`softsgx.runtime.explore` and similar searches.

        Args:
            defects: the defects to switch on.
            tracer: receives the events of all components; ``None``: events are dropped.
        """
        chosen = frozenset(defects)

        def program(runtime: SeededRuntime) -> Callable[[], object]:
            return lambda: self.scenario(Scene(runtime, chosen, tracer))

        program.__qualname__ = self.name
        return program

    def tell(self, defects: Collection[Defect] = ()) -> Outcome:
        """Run the story under its seeds until the property is violated."""
        runs, schedule = 0, Schedule(0, ())
        violation: str | None = None
        events: tuple[Event, ...] = ()
        for seed in self.seeds:
            runs += 1
            schedule, violation, events = self._run(seed, self.policy, defects)
            if violation is not None:
                break
        if violation is not None and self.races:
            shorter = minimise(
                self.program(defects), schedule, attempts=_ATTEMPTS, step_limit=self.step_limit
            )
            schedule, violation, events = self._run(shorter.seed, Replay(shorter), defects)
        return Outcome(frozenset(defects), violation, runs, schedule, events)

    def _run(
        self, seed: int, policy: Policy | None, defects: Iterable[Defect]
    ) -> tuple[Schedule, str | None, tuple[Event, ...]]:
        """Run the scenario once; return the schedule, what violates the property, and events."""
        events: list[Event] = []
        runtime = SeededRuntime(seed, policy=policy, step_limit=self.step_limit)
        violation = None
        try:
            runtime.run(self.program(defects, tracer=events.append)(runtime))
        except (ReplayDiverged, ScriptNotFollowed):
            raise  # the story itself is wrong, not the code that it checks
        except AssertionError as error:
            violation = str(error)
        return runtime.schedule, violation, tuple(events)


STORIES: dict[Defect, Story] = {}
"""The story of each defect that can be switched on."""


def story(
    *defects: Defect,
    holds: str,
    seeds: int = 1,
    policy: Policy | None = None,
    step_limit: int = _STEP_LIMIT,
) -> Callable[[Scenario], Scenario]:
    """Register the story of some defects; the scenario's docstring becomes :attr:`Story.told`.

    Args:
        defects: those that violate the property, each on its own.
        holds: the property, as one sentence.
        seeds: how many schedules are tried; more than one where tasks race.
        policy: see :class:`Story`; without one a story of one seed runs uninterrupted.
        step_limit: see :class:`Story`.
    """

    def register(scenario: Scenario) -> Scenario:
        told = " ".join((scenario.__doc__ or "").split())
        name = scenario.__name__
        assert told and holds.endswith("."), f"story {name} has no text"
        default = Uninterrupted() if seeds == 1 else None
        chosen = default if policy is None else policy
        made = Story(name, defects, holds, told, scenario, range(seeds), chosen, step_limit)
        assert not STORIES.keys() & set(defects), f"story {name}: a defect has two stories"
        STORIES.update(dict.fromkeys(defects, made))
        return scenario

    return register
