"""Runs one scenario under many schedules: sets the stage, races, checks, restores.

Setting a stage takes milliseconds, a race less than one.  So one stage serves many rounds if the
scenario can restore its state.  A round depends on the restored state, its seed and its policy.  A
schedule that fails in a round is repeated on a new stage before it is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from softsgx.defects import Defect
from softsgx.explore.stage import Scenario, Stage
from softsgx.paging import EpcCore
from softsgx.runtime import Policy, Run, SeededRuntime
from softsgx.trace import Tracer

__all__ = ["STEP_LIMIT", "Arena"]

STEP_LIMIT = 5_000
"""Places after which a race is taken to be in a livelock; a race of the built-in scenarios passes
some hundred."""

_MOST_ROUNDS = 1000  # on one stage


class Arena:
    """A scenario and its current stage.

    Args:
        scenario: sets the stage.
        defects: known defects to switch on in the platform.
        step_limit: places after which a race counts as a livelock.
        rounds: the maximal number of rounds on one stage; 1: each schedule has its own stage.
        watch: whether to recount a core at every place where its counts have changed.
        tracer: receives the events of the platform, also while the stage is set.
        reached: called at every place of a race.

    Attributes:
        stages: number of stages that were set.
    """

    def __init__(
        self,
        scenario: Scenario,
        defects: frozenset[Defect] = frozenset(),
        *,
        step_limit: int = STEP_LIMIT,
        rounds: int = _MOST_ROUNDS,
        watch: bool = True,
        tracer: Tracer | None = None,
        reached: Callable[[], None] | None = None,
    ) -> None:
        self._scenario, self._defects = scenario, defects
        self._step_limit, self._rounds, self._watching = step_limit, rounds, watch
        self._tracer, self._reached = tracer, reached
        self._stage: Stage | None = None
        self._left = 0
        self.stages = 0

    def run(self, seed: int, policy: Policy) -> Run:
        """Run the scenario once.

        Args:
            seed: of the tasks' own random numbers, and of the policy's.
            policy: chooses the task that runs next.
        """
        stage = self._stage
        runtime = SeededRuntime(0, step_limit=self._step_limit) if stage is None else stage.runtime
        error: Exception | None = None
        try:
            if stage is None:
                stage = self._set(runtime)
            runtime.restart(seed, policy)
            self._play(stage)
        except Exception as raised:
            error = raised
        run = Run(runtime.schedule, runtime.policy, error)
        self._left -= 1
        if error is not None:
            self._leave(error)
            runtime.__exit__(type(error), error, error.__traceback__)
        elif stage is not None:
            self._restore(stage)
        return run

    def close(self) -> None:
        """End the stage."""
        self._leave(None)

    def _set(self, runtime: SeededRuntime) -> Stage:
        """Set a new stage, unscheduled."""
        stage = Stage(runtime, defects=self._defects, tracer=self._tracer)
        with runtime.quiet():
            self._scenario(stage)
            for restore in stage.restores:  # so that the first round begins as every other
                restore()
        stage.watch = partial(self._watch, _cores(stage) if self._watching else {})
        self._stage, self._left = stage, self._rounds
        self.stages += 1
        return stage

    def _play(self, stage: Stage) -> None:
        """Race and check."""
        runtime = stage.runtime
        if stage.body is not None:
            with runtime.quiet():
                stage.body()
            return
        runtime.race(stage.tasks, watch=stage.watch)
        with runtime.quiet():
            runtime.run_pending()
            for check in stage.checks:
                check()
            stage.recount()

    def _restore(self, stage: Stage) -> None:
        """Make the stage ready for another round, or end it."""
        if not stage.restores or self._left <= 0:
            self._leave(None)
            return
        with stage.runtime.quiet():
            for restore in stage.restores:
                restore()

    def _leave(self, error: Exception | None) -> None:
        stage, self._stage = self._stage, None
        if stage is not None and error is None:
            with stage.runtime.quiet():
                stage.end()
            stage.runtime.close()

    def _watch(self, cores: dict[EpcCore, tuple[int, int]]) -> None:
        """Recount a core whose counts have changed since the last place."""
        if self._reached is not None:
            self._reached()
        for core, before in cores.items():
            counts = _counts(core)
            if counts != before:
                cores[core] = counts
                core.check_invariants()


def _cores(stage: Stage) -> dict[EpcCore, tuple[int, int]]:
    """Return the cores of a stage that is set, each with its counts; a story has none."""
    if not stage.booted:
        return {}
    guests = (guest.core for guest in stage.platform.guests)
    return {core: _counts(core) for core in (stage.platform.core, *guests)}


def _counts(core: EpcCore) -> tuple[int, int]:
    """Return how many pages are free, and how many can be reclaimed."""
    return core.free_pages, len(core.root.lru)
