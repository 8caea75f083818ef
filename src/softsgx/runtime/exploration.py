"""Running a program under many schedules, and cutting a failing schedule down.

A *program* is a function that gets a fresh :class:`SeededRuntime` and returns what its main task
does; it must build all its state anew each time and depend on nothing but the runtime.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

from softsgx.runtime.failures import ExplorationFailed
from softsgx.runtime.policies import END, YIELD, Policy, Replay, Uniform, Uninterrupted
from softsgx.runtime.schedule import Schedule
from softsgx.runtime.seeded import SeededRuntime

__all__ = ["Exploration", "Program", "explore", "explore_all", "minimise"]

Program: TypeAlias = Callable[[SeededRuntime], Callable[[], object]]
"""Builds a program on a runtime; returns its main task."""

_STEP_LIMIT = 1_000_000
_SHOWN_SWITCHES = 20


@dataclass(frozen=True, slots=True)
class Exploration:
    """What an exploration without failures covered.

    Attributes:
        runs: how often the program ran.
        distinct: how many schedules among them differed.
        longest: the most steps a run took.
        complete: whether no schedule within the bounds was left out.
    """

    runs: int
    distinct: int
    longest: int
    complete: bool = False


def explore(
    make_program: Program,
    seeds: Iterable[int],
    *,
    policy: Policy | Callable[[int], Policy] | None = None,
    step_limit: int = _STEP_LIMIT,
    point_ns: int = 0,
    repeat: str = "explore({program}, [{seed}], policy={policy})",
    attempts: int = 200,
) -> Exploration:
    """Run a program once under each seed.

    Args:
        make_program: the program.
        seeds: of the schedules and of the program's own random choices.
        policy: who runs next; or a function that makes a policy from the number of steps the
            program takes, which a first run without interruptions measures:
            ``policy=partial(Pct, 3)``.  :class:`Uniform` if not given.
        step_limit: see :class:`SeededRuntime`.
        point_ns: see :class:`SeededRuntime`.
        repeat: the command that repeats one seed, with ``{program}``, ``{seed}`` and ``{policy}``.
        attempts: how many runs may be spent on cutting a failing schedule down.

    Raises:
        ExplorationFailed: a run failed; says the seed, the few switches that matter, and the
            command that repeats it.  Its cause is what the run raised.
    """
    conditions = _Conditions(make_program, step_limit, point_ns)
    seen: set[int] = set()
    runs = longest = 0
    chosen: Policy | None = Uniform() if policy is None else None
    for seed in seeds:
        if chosen is None:
            chosen = policy(_measure(conditions, seed)) if callable(policy) else policy
            assert chosen is not None, "there is a policy"
        run = conditions.run(seed, chosen)
        runs += 1
        longest = max(longest, len(run.schedule))
        seen.add(hash(run.schedule.steps))
        if run.error is not None:
            names = {"program": _name(make_program), "seed": seed, "policy": repr(chosen)}
            raise _report(conditions, run, repr(chosen), repeat.format(**names), attempts)
    return Exploration(runs, len(seen), longest)


def explore_all(
    make_program: Program,
    *,
    preemptions: int = 2,
    seed: int = 0,
    max_runs: int = 10_000,
    step_limit: int = _STEP_LIMIT,
    point_ns: int = 0,
    attempts: int = 200,
) -> Exploration:
    """Run a program under every schedule with at most ``preemptions`` preemptions.

    A preemption is a switch away from a task that could have continued.  Switches where a task
    waits, yields or ends are free, and all ways to make them are tried.

    Args:
        make_program: the program.
        preemptions: the bound; 2 finds most races of small programs.
        seed: of the program's own random choices.
        max_runs: stop after so many; :attr:`Exploration.complete` is then ``False``.
        step_limit: see :class:`SeededRuntime`.
        point_ns: see :class:`SeededRuntime`.
        attempts: how many runs may be spent on cutting a failing schedule down.

    Raises:
        ExplorationFailed: a run failed.

    Source:
        Musuvathi, Qadeer: "Iterative Context Bounding for Systematic Testing of Multithreaded
        Programs", PLDI 2007.
    """
    conditions = _Conditions(make_program, step_limit, point_ns)
    longest = runs = 0
    # What is left to try, by the preemptions it has: schedules with few come first.
    left: list[list[tuple[str, ...]]] = [[] for _ in range(preemptions + 1)]
    left[0].append(())
    while runs < max_runs:
        used = next((used for used, prefixes in enumerate(left) if prefixes), None)
        if used is None:
            return Exploration(runs, runs, longest, complete=True)
        prefix = left[used].pop()
        run = conditions.run(seed, _Prefix(prefix))
        runs += 1
        longest = max(longest, len(run.schedule))
        if run.error is not None:
            again = f"explore_all({_name(make_program)}, preemptions={preemptions}, seed={seed})"
            raise _report(conditions, run, f"schedule {runs} of explore_all", again, attempts)
        assert isinstance(run.policy, _Prefix), "a run keeps its kind of policy"
        for other, cost in run.policy.alternatives:
            if used + cost <= preemptions:
                left[used + cost].append(other)
    return Exploration(runs, runs, longest)


def minimise(
    make_program: Program,
    schedule: Schedule,
    *,
    attempts: int = 200,
    step_limit: int = _STEP_LIMIT,
    point_ns: int = 0,
) -> Schedule:
    """Cut switches from a failing schedule as long as the program fails in the same way.

    Args:
        make_program: the program.
        schedule: of a failed run.
        attempts: how many runs may be spent.
        step_limit: as in the failed run.
        point_ns: as in the failed run.

    Returns:
        A schedule with as many switches or fewer under which the program raises an exception of
        the same type, to be replayed.
    """
    conditions = _Conditions(make_program, step_limit, point_ns)
    first = conditions.run(schedule.seed, Replay(schedule))
    assert first.error is not None, "the schedule does not make the program fail"
    return _minimise(conditions, first, attempts)


@dataclass(frozen=True, slots=True)
class _Run:
    schedule: Schedule
    policy: Policy
    error: Exception | None

    def cost(self) -> tuple[int, int]:
        return len(self.schedule.switches()), len(self.schedule)


@dataclass(frozen=True, slots=True)
class _Conditions:
    """What all runs of an exploration have in common."""

    make_program: Program
    step_limit: int
    point_ns: int

    def run(self, seed: int, policy: Policy) -> _Run:
        runtime = SeededRuntime(
            seed, policy=policy, step_limit=self.step_limit, point_ns=self.point_ns
        )
        error: Exception | None = None
        try:
            runtime.run(self.make_program(runtime))
        except Exception as raised:
            error = raised
        return _Run(runtime.schedule, runtime.policy, error)


def _measure(conditions: _Conditions, seed: int) -> int:
    return len(conditions.run(seed, Uninterrupted()).schedule)


def _report(
    conditions: _Conditions, run: _Run, policy: str, repeat: str, attempts: int
) -> ExplorationFailed:
    """Return the exception that reports a failed run."""
    error = run.error
    assert error is not None, "the run has failed"
    schedule = _minimise(conditions, run, attempts)
    switches = [f"{task} at {where!r}" for task, where in schedule.switches()]
    if len(switches) > _SHOWN_SWITCHES:
        switches[_SHOWN_SWITCHES:] = [f"… {len(switches) - _SHOWN_SWITCHES} more"]
    text = (
        f"{_name(conditions.make_program)} failed under seed {run.schedule.seed}, {policy}: "
        f"{type(error).__name__}: {error}\n"
        f"switches: {', '.join(switches) or 'none'}\n"
        f"repeat: {repeat}"
    )
    failed = ExplorationFailed(text, seed=run.schedule.seed, schedule=schedule, error=error)
    failed.__cause__ = error
    return failed


def _minimise(conditions: _Conditions, best: _Run, attempts: int) -> Schedule:
    """Delta debugging over the stretches in which one task ran."""
    kind = type(best.error)
    stretches = _stretches(best.schedule)
    size = max(1, len(stretches) // 2)
    while attempts > 0:
        start, shrunk = 0, False
        while start < len(stretches) and attempts > 0:
            attempts -= 1
            candidate = stretches[:start] + stretches[start + size :]
            run = conditions.run(best.schedule.seed, _Stretches(candidate))
            if type(run.error) is kind and run.cost() < best.cost():
                best, shrunk = run, True
                stretches = _stretches(best.schedule)
            else:
                start += size
        if size == 1 and not shrunk:
            break
        size = max(1, min(size // 2, len(stretches) // 2))
    return best.schedule


_Stretch: TypeAlias = tuple[str, int]
"""A task, and how many places it has reached, counted from its start, when another one ran."""


def _stretches(schedule: Schedule) -> list[_Stretch]:
    reached: dict[str, int] = {}
    stretches = []
    for task, group in groupby(schedule, key=lambda step: step[0]):
        reached[task] = reached.get(task, 0) + sum(1 for _ in group)
        stretches.append((task, reached[task]))
    return stretches


class _Stretches(Uninterrupted):
    """Follows stretches as far as they can be followed; where they cannot, a task runs on."""

    def __init__(self, stretches: Sequence[_Stretch]) -> None:
        self._stretches = stretches

    def begin(self, rng: random.Random) -> None:
        self._at = 0
        self._reached: dict[str, int] = {}
        self._ended: set[str] = set()

    def choose(self, current: str, where: str, ready: Sequence[str]) -> str:
        self._reached[current] = self._reached.get(current, 0) + 1
        if where == END:
            self._ended.add(current)
        while self._at < len(self._stretches):
            task, until = self._stretches[self._at]
            if task not in self._ended and self._reached.get(task, 0) < until:
                if task in ready:
                    return task
                break
            self._at += 1
        return super().choose(current, where, ready)


class _Prefix(Uninterrupted):
    """Makes the choices it is given, then none; notes what else could have been chosen there."""

    def __init__(self, prefix: tuple[str, ...]) -> None:
        self._prefix = prefix

    def begin(self, rng: random.Random) -> None:
        self._chosen: list[str] = []
        self.alternatives: list[tuple[tuple[str, ...], int]] = []

    def choose(self, current: str, where: str, ready: Sequence[str]) -> str:
        at = len(self._chosen)
        if at < len(self._prefix):
            choice = self._prefix[at]
        else:
            choice = super().choose(current, where, ready)
            cost = int(current in ready and where != YIELD)
            if len(ready) > 1:
                before = tuple(self._chosen)
                self.alternatives += [((*before, n), cost) for n in ready if n != choice]
        self._chosen.append(choice)
        return choice


def _name(make_program: Program) -> str:
    name: str = getattr(make_program, "__qualname__", repr(make_program))
    return name
