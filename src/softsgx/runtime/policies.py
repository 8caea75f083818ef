"""The policies of the seeded runtime: they choose the task that runs next.

A policy sees only names.  The runtime calls it at every place that a task reaches.  Its choice must
depend only on the arguments of its calls and on the random stream given to :meth:`Policy.begin`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Protocol

from softsgx.runtime.failures import ReplayDiverged, ScriptNotFollowed
from softsgx.runtime.schedule import Schedule, Step, Stretch

__all__ = [
    "END",
    "RACE",
    "SLEEP",
    "YIELD",
    "Pct",
    "Policy",
    "Replay",
    "Script",
    "Stretches",
    "Uniform",
    "Uninterrupted",
]

YIELD = "yield"
END = "end"
RACE = "race"
SLEEP = "sleep"


class Policy(Protocol):
    """Chooses the next task."""

    def begin(self, rng: random.Random) -> None:
        """Reset the state; draw from ``rng`` from now on.

        The runtime calls it on a shallow copy, so it must make new containers, not change old ones.
        """

    def choose(self, current: str, where: str, ready: Sequence[str]) -> str:
        """Return the task to run.

        Args:
            current: the task that has just reached ``where``.
            where: the place; ``end`` when the task has ended.
            ready: the tasks that can run, at least one, in the order in which they became ready;
                ``current`` is among them unless it has to wait or has ended.
        """

    def finish(self) -> None:
        """The program has returned; raise if it was another program than the policy's."""


class Uninterrupted:
    """A task runs until it waits or yields: the fewest switches a program allows."""

    def begin(self, rng: random.Random) -> None:
        """Do nothing: the policy has no state."""

    def choose(self, current: str, where: str, ready: Sequence[str]) -> str:
        """Stay; after a yield or when ``current`` cannot run, take the first."""
        return current if where != YIELD and current in ready else ready[0]

    def finish(self) -> None:
        """Any program is right."""

    def __repr__(self) -> str:
        return "Uninterrupted()"


class Uniform:
    """Chooses among the tasks that can run with equal probability, at every place."""

    def begin(self, rng: random.Random) -> None:
        """Draw from ``rng``."""
        self._random = rng.random

    def choose(self, current: str, where: str, ready: Sequence[str]) -> str:
        """Draw one."""
        count = len(ready)
        return ready[0] if count == 1 else ready[int(self._random() * count)]

    def finish(self) -> None:
        """Any program is right."""

    def __repr__(self) -> str:
        return "Uniform()"


class Pct:
    """Random priorities with a few random changes: finds bugs that need few switches.

    Every task gets a random priority; of the tasks that can run, the one with the highest priority
    runs.  At ``depth - 1`` random places of the whole run, the running task gets a priority below
    all others.  A run finds a bug that needs ``depth`` ordering constraints with a probability of
    at least ``1 / (tasks * steps ** (depth - 1))``.

    Args:
        depth: the number of ordering constraints; 1 changes no priorities, 2 finds most races.
        steps: about how many places the program passes (:func:`explore` measures it).

    Source:
        Burckhardt, Kothari, Musuvathi, Nagarakatte: "A Randomized Scheduler with Probabilistic
        Guarantees of Finding Bugs", ASPLOS 2010, section 3.
    """

    def __init__(self, depth: int = 3, steps: int = 1000) -> None:
        assert depth >= 1, f"depth {depth} must be at least 1"
        self._depth = depth
        self._steps = max(steps, depth)

    def begin(self, rng: random.Random) -> None:
        """Draw the places where priorities change."""
        self._random = rng.random
        self._priorities: dict[str, float] = {}
        places = rng.sample(range(self._steps), self._depth - 1)
        # The new priorities are a random permutation, as in the paper.
        self._falls = {place: float(fall) for fall, place in enumerate(places)}
        self._passed = 0
        self._lowest = 0.0

    def choose(self, current: str, where: str, ready: Sequence[str]) -> str:
        """Return the ready task of the highest priority."""
        priorities = self._priorities
        fall = self._falls.get(self._passed)
        self._passed += 1
        if fall is not None:
            priorities[current] = fall
        # Deviation: the paper has no yields.  A task that yields gets the lowest priority: one
        # that polls would otherwise keep every other task from running.
        if where == YIELD:
            self._lowest -= 1
            priorities[current] = self._lowest
        if len(ready) == 1:
            return ready[0]
        for name in ready:
            if name not in priorities:
                priorities[name] = self._depth + self._random()
        return max(ready, key=priorities.__getitem__)

    def finish(self) -> None:
        """Any program is right."""

    def __repr__(self) -> str:
        return f"Pct(depth={self._depth}, steps={self._steps})"


class Script:
    """A scenario: run one task until it reaches a place, then another one until another place.

    ``Script(("reclaim", "EWB"), ("fault", "ELDU"))`` runs ``reclaim`` until it is about to do EWB,
    stops it there, and runs ``fault`` until it is about to do ELDU; after that a task runs until it
    waits.  A place may be a pattern (``"acquire *"``).  While a task of the script sleeps or has
    not been spawned, tasks run that the script has not stopped.

    Args:
        steps: tasks and places, in order.
        strict: whether it is an error if a task has to wait for another one before it reaches its
            place.  If not, the other tasks run meanwhile, including stopped ones.

    Raises:
        ScriptNotFollowed: from the run, when a task could not reach its place.
    """

    def __init__(self, *steps: Step, strict: bool = True) -> None:
        self._steps = steps
        self._strict = strict

    def begin(self, rng: random.Random) -> None:
        """Start with the first step."""
        self._at = 0
        self._last: dict[str, str] = {}
        self._rest = Uninterrupted()

    def choose(self, current: str, where: str, ready: Sequence[str]) -> str:
        """Return the task of the script's current step."""
        self._last[current] = where
        if self._at < len(self._steps):
            task, place = self._steps[self._at]
            if task == current and (place == where or fnmatchcase(where, place)):
                self._at += 1
        if self._at == len(self._steps):
            return self._rest.choose(current, where, ready)
        task, place = self._steps[self._at]
        if task in ready:
            return task
        last = self._last.get(task)
        stopped = {task for task, _ in self._steps[: self._at]}
        others = [name for name in ready if name not in stopped]
        must_wait = last not in (None, SLEEP) or not others
        if last == END or (self._strict and must_wait):
            raise ScriptNotFollowed(self._complaint(task, place))
        return self._rest.choose(current, where, others or ready)

    def finish(self) -> None:
        """Every step must have been reached."""
        if self._at < len(self._steps):
            raise ScriptNotFollowed(self._complaint(*self._steps[self._at]))

    def _complaint(self, task: str, place: str) -> str:
        last = self._last.get(task)
        state = "was never spawned" if last is None else f"is at {last!r}"
        return f"step {self._at + 1}: task {task!r} cannot reach {place!r}: it {state}"

    def __repr__(self) -> str:
        strict = "" if self._strict else ", strict=False"
        return f"Script({', '.join(map(repr, self._steps))}{strict})"


class Replay:
    """Repeats a recorded schedule; after its end a task runs until it waits.

    Raises:
        ReplayDiverged: from the run, when the program does not reach the recorded places.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._steps = schedule.steps

    def begin(self, rng: random.Random) -> None:
        """Start with the first step."""
        self._at = 0
        self._rest = Uninterrupted()

    def choose(self, current: str, where: str, ready: Sequence[str]) -> str:
        """Return the task that ran next in the recorded schedule."""
        at = self._at
        self._at += 1
        if at < len(self._steps) and self._steps[at] != (current, where):
            raise ReplayDiverged(
                f"step {at}: {self._steps[at]} was recorded, but {(current, where)} happened"
            )
        if at + 1 >= len(self._steps):
            return self._rest.choose(current, where, ready)
        following = self._steps[at + 1][0]
        if following not in ready:
            raise ReplayDiverged(f"step {at + 1}: task {following!r} cannot run after {where!r}")
        return following

    def finish(self) -> None:
        """Every step must have happened."""
        if self._at < len(self._steps):
            raise ReplayDiverged(f"the program ended after {self._at} of {len(self._steps)} steps")

    def __repr__(self) -> str:
        return f"Replay({len(self._steps)} steps)"


class Stretches(Uninterrupted):
    """Follows stretches; when the task of a stretch cannot run, the running task continues."""

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        self._stretches = stretches

    def begin(self, rng: random.Random) -> None:
        """Start with the first stretch."""
        self._at = 0
        self._reached: dict[str, int] = {}
        self._ended: set[str] = set()

    def choose(self, current: str, where: str, ready: Sequence[str]) -> str:
        """Return the task of the stretch, if it can run."""
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

    def __repr__(self) -> str:
        return f"Stretches({len(self._stretches)})"
