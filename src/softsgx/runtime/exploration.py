"""Running a program under many schedules, and cutting a failing schedule down.

A *program* is a function that gets a fresh :class:`SeededRuntime` and returns what its main task
does; it must build all its state anew each time and depend on nothing but the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from softsgx.runtime.failures import ExplorationFailed
from softsgx.runtime.policies import Policy, Replay, Stretches, Uniform, Uninterrupted
from softsgx.runtime.schedule import Schedule
from softsgx.runtime.seeded import SeededRuntime
from softsgx.runtime.systematic import Systematic

__all__ = ["Exploration", "Program", "Run", "explore", "explore_all", "minimise", "shrink"]

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
    search = Systematic(preemptions)
    while runs < max_runs:
        policy = search.next()
        if policy is None:
            return Exploration(runs, runs, longest, complete=True)
        run = conditions.run(seed, policy)
        runs += 1
        longest = max(longest, len(run.schedule))
        if run.error is not None:
            again = f"explore_all({_name(make_program)}, preemptions={preemptions}, seed={seed})"
            raise _report(conditions, run, f"schedule {runs} of explore_all", again, attempts)
        search.ran(run.policy)
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
    return shrink(conditions.run, first, attempts=attempts).schedule


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a program.

    Attributes:
        schedule: what happened.
        policy: which has chosen it, with the state that it has now.
        error: what the program raised.
    """

    schedule: Schedule
    policy: Policy
    error: Exception | None

    def cost(self) -> tuple[int, int]:
        """Return what :func:`shrink` makes small: switches, then steps."""
        return len(self.schedule.switches()), len(self.schedule)


@dataclass(frozen=True, slots=True)
class _Conditions:
    """What all runs of an exploration have in common."""

    make_program: Program
    step_limit: int
    point_ns: int

    def run(self, seed: int, policy: Policy) -> Run:
        runtime = SeededRuntime(
            seed, policy=policy, step_limit=self.step_limit, point_ns=self.point_ns
        )
        error: Exception | None = None
        try:
            runtime.run(self.make_program(runtime))
        except Exception as raised:
            error = raised
        return Run(runtime.schedule, runtime.policy, error)


def _measure(conditions: _Conditions, seed: int) -> int:
    return len(conditions.run(seed, Uninterrupted()).schedule)


def _report(
    conditions: _Conditions, run: Run, policy: str, repeat: str, attempts: int
) -> ExplorationFailed:
    """Return the exception that reports a failed run."""
    error = run.error
    assert error is not None, "the run has failed"
    schedule = shrink(conditions.run, run, attempts=attempts).schedule
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


def shrink(
    repeat: Callable[[int, Policy], Run],
    failed: Run,
    *,
    attempts: int,
    kind: Callable[[BaseException], object] = type,
) -> Run:
    """Cut switches from a failed run, by delta debugging over the stretches in which one task ran.

    Args:
        repeat: runs the program under a seed and a policy.
        failed: the run.
        attempts: how often the program may be run.
        kind: of a failure: a shorter run must fail in the same way.
    """
    best = failed
    assert best.error is not None, "the run has not failed"
    wanted = kind(best.error)
    stretches = best.schedule.stretches()
    size = max(1, len(stretches) // 2)
    while attempts > 0:
        start, shrunk = 0, False
        while start < len(stretches) and attempts > 0:
            attempts -= 1
            candidate = stretches[:start] + stretches[start + size :]
            run = repeat(best.schedule.seed, Stretches(candidate))
            same = run.error is not None and kind(run.error) == wanted
            if same and run.cost() < best.cost():
                best, shrunk = run, True
                stretches = best.schedule.stretches()
            else:
                start += size
        if size == 1 and not shrunk:
            break
        size = max(1, min(size // 2, len(stretches) // 2))
    return best


def _name(make_program: Program) -> str:
    name: str = getattr(make_program, "__qualname__", repr(make_program))
    return name
