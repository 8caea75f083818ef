"""The seeded runtime: cooperative tasks in one thread, every interleaving a function of a seed.

A task can be switched away from at every place it names and at every lock operation, so that the
races of the threads runtime can be found, replayed and cut down to a few switches.  Time is
virtual.

Invariant: ``_ready`` holds exactly the tasks that could run now: those that wait for nothing, and
those that wait for a lock that is free.  The first of these tasks that the policy chooses takes the
lock, as with a mutex that is not fair; so there are more histories than a fair lock would allow.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Self

from softsgx.runtime import base, policies
from softsgx.runtime._random import TaskRandom
from softsgx.runtime._seeded_locks import Latch, SeededCondition, SeededLock
from softsgx.runtime._tasks import SLEEP, Cooperative, CoTask
from softsgx.runtime.failures import Livelock
from softsgx.runtime.policies import Policy, Replay, Uniform, Uninterrupted
from softsgx.runtime.schedule import Schedule, Step

__all__ = ["SeededRuntime"]


class _Race:
    """What the main task waits for while tasks race."""

    def blocker(self) -> CoTask | None:
        return None

    def describe_wait(self) -> str:
        return "the race to end"


_RACE = _Race()


def _call(run: Callable[[], object]) -> None:
    run()


class SeededRuntime(Cooperative):
    """Tasks interleaved by a policy; the same seed and program give the same schedule.

    Args:
        seed: of the schedule and, separately, of :attr:`random`, where each task has a stream of
            its own so that what it draws does not depend on the schedule.
        policy: chooses the task that runs next; :class:`Uniform` if not given.
        step_limit: after so many places :class:`Livelock` is raised.
        point_ns: virtual nanoseconds that pass at every place.  With 0, time passes only when no
            task can run, so a timer expires only then.
    """

    def __init__(
        self,
        seed: int,
        *,
        policy: Policy | None = None,
        step_limit: int = 1_000_000,
        point_ns: int = 0,
    ) -> None:
        super().__init__()
        self.seed = seed
        self.random: random.Random = TaskRandom(seed, self.task_name)
        # A copy: two runtimes may be given the same policy, and each has its own state.
        self.policy: Policy = Uniform() if policy is None else copy(policy)
        # A string, so that the scheduler does not draw the numbers the program draws.
        self.policy.begin(random.Random(f"schedule {seed}"))
        self._step_limit = step_limit
        self._point_ns = point_ns
        self._clock_ns = 0
        self._steps: list[Step] = []
        self._ready: dict[str, CoTask] = {self._main.name: self._main}
        self._latched = 0
        self._running_pending = False
        self._quiet = False
        self._passed = 0  # places in quiet code
        self._scheduled = self.policy, self._steps  # what quiet code has put aside
        self._racing: set[CoTask] = set()
        self._watch: Callable[[], None] | None = None

    @classmethod
    def replay(cls, schedule: Schedule, *, step_limit: int = 1_000_000, point_ns: int = 0) -> Self:
        """Return a runtime that repeats ``schedule``.

        A program that reaches other places raises :class:`ReplayDiverged`.
        """
        return cls(schedule.seed, policy=Replay(schedule), step_limit=step_limit, point_ns=point_ns)

    @property
    def schedule(self) -> Schedule:
        """What has happened so far."""
        return Schedule(self.seed, tuple(self._steps))

    def entropy(self, size: int) -> bytes:
        """Return bytes that follow from the seed."""
        return self.random.randbytes(size)

    def lock(self, name: str) -> base.Lock:
        """Return a new sleeping mutex."""
        return SeededLock(self, name)

    def condition(self, lock: base.Lock) -> base.Condition:
        """Return a new condition variable over ``lock``."""
        assert isinstance(lock, SeededLock), "a condition needs a lock of its own runtime"
        return SeededCondition(self, lock)

    def latch(self) -> base.Lock:
        """Return a mutex that asserts that no place is reached while it is held."""
        return Latch(self)

    def point(self, where: str) -> None:
        """Let the policy choose which task runs, perhaps still the current one."""
        self._reach(where)

    def spawn(self, run: Callable[[], None], name: str, *, daemon: bool = False) -> base.Task:
        """Make ``run`` a task that can run."""
        task = self._new_task(run, name, daemon=daemon)
        self._ready[task.name] = task
        self._reach(f"spawn {task.name}")
        return task

    def yield_now(self) -> None:
        """Let other tasks run first, as the policy understands it."""
        me = self._current
        if not self._over:
            del self._ready[me.name]  # to the end of the queue
            self._ready[me.name] = me
        self._reach(policies.YIELD)

    def sleep(self, duration_ns: int) -> None:
        """Wait until virtual time has advanced by ``duration_ns``."""
        if not self._over:
            del self._ready[self._current.name]
        self._enlist(None, SLEEP, duration_ns)
        self._reach(policies.SLEEP, blocked=True)

    def now_ns(self) -> int:
        """Return virtual nanoseconds since the start."""
        return self._clock_ns

    # Races on one state, round by round.

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Run the ``with`` block unscheduled: no step is recorded, and the policy is not asked.

        Other tasks run only while the main task waits or yields; each runs until it waits.
        """
        assert self._current is self._main, f"quiet() called by task {self.task_name()!r}"
        self._passed = 0
        with self._scheduling(Uninterrupted(), [], quiet=True):
            yield

    @contextmanager
    def _scheduling(self, policy: Policy, steps: list[Step], *, quiet: bool) -> Iterator[None]:
        before = self.policy, self._steps, self._quiet
        if not self._quiet:
            self._scheduled = self.policy, self._steps
        self.policy, self._steps, self._quiet = policy, steps, quiet
        try:
            yield
        finally:
            self.policy, self._steps, self._quiet = before

    def restart(self, seed: int, policy: Policy) -> None:
        """Begin another schedule with the state that the program has now.

        The random streams begin anew, so a round depends on the state, the seed and the policy.
        """
        assert self._current is self._main and not self._over, "a race is running, or has failed"
        self.seed = seed
        assert isinstance(self.random, TaskRandom), "the runtime keeps its kind of stream"
        self.random.restart(seed)
        self.policy = copy(policy)
        self.policy.begin(random.Random(f"schedule {seed}"))
        self._steps = []
        self._names = {task.name: 1 for task in self._tasks}

    def race(
        self, runs: Mapping[str, Callable[[], object]], *, watch: Callable[[], None] | None = None
    ) -> None:
        """Run tasks against each other until all of them have ended; scheduled also in quiet code.

        The main task is no part of the schedule.  The first exception ends the race and the
        program: it is raised here, and no other task runs any more.

        Args:
            runs: what each task does, by its name.
            watch: called at every place, before the policy chooses; it must not reach a place.
        """
        main = self._main
        assert self._current is main and runs, "a race needs the main task and at least one other"
        tasks = [
            self._new_task(partial(_call, run), name, daemon=False) for name, run in runs.items()
        ]
        self._racing = set(tasks)
        del self._ready[main.name]
        self._ready.update((task.name, task) for task in tasks)
        self._watch = watch
        self._enlist(None, _RACE)
        policy, steps = self._scheduled if self._quiet else (self.policy, self._steps)
        try:
            with self._scheduling(policy, steps, quiet=False):
                self._reach(policies.RACE, blocked=True)
        finally:
            self._unpark(main)
            self._watch = None
            self._racing = set()

    def run_pending(self) -> None:
        """Let the other tasks run until each of them waits."""
        if len(self._ready) > 1:
            self._run_pending()

    def close(self) -> None:
        """As :meth:`Cooperative.close`; then the policy says whether it was its program."""
        already = self._closed
        super().close()
        if not already:
            self.policy.finish()

    def _join(self, task: CoTask) -> None:
        me = self._current
        assert task is not me, f"task {task.name!r} joins itself"
        waits = not task.finished
        if waits:
            me.place = f"join {task.name}"
            self._refuse_cycle(task)
            self._ready.pop(me.name, None)
            self._enlist(task.joiners, task)
        self._reach(f"join {task.name}", blocked=waits)

    def _run_pending(self) -> None:
        self._running_pending = True
        del self._ready[self._main.name]
        self._reach(policies.END, blocked=True)
        self._running_pending = False
        self._ready[self._main.name] = self._main

    # Scheduling.

    def _reach(self, where: str, *, blocked: bool = False) -> None:
        """Let the policy choose at ``where``; the current task cannot continue if ``blocked``."""
        me = self._current
        if self._over:
            if blocked:
                self._raise_over(me)
            return
        if self._quiet and not blocked and where != policies.YIELD:
            self._passed += 1
            if self._passed > self._step_limit:
                raise Livelock(f"livelock: {self._step_limit} places passed; the last is {where!r}")
            return
        assert not self._latched, f"task {me.name!r} reached {where!r} with a latch held"
        me.place = where
        # As _park does, but this is passed often, and mostly nothing changes.
        try:
            following = self._next()
        except BaseException as error:
            following = self._stop(error)
        if following is not me or me.inject is not None:
            self._switch_to(following)

    def _after_end(self, task: CoTask) -> CoTask:
        self._ready.pop(task.name, None)
        task.place = policies.END
        if task in self._racing:
            if task.error is not None:
                task.joined = True  # the race raises it
                self._record(task)
                raise task.error
            self._racing.discard(task)
            if not self._racing:
                return self._end_race(task)
        return self._next()

    def _end_race(self, last: CoTask) -> CoTask:
        """Return the main task, which continues alone: other tasks that are ready are daemons."""
        self._record(last)
        main = self._main
        self._ready[main.name] = main
        self.policy.choose(last.name, policies.END, [main.name])
        return main

    def _record(self, task: CoTask) -> None:
        self._steps.append((task.name, task.place))
        if self._watch is not None:
            self._watch()

    def _next(self) -> CoTask:
        """Record the step, let time pass, and ask the policy."""
        me = self._current
        where = me.place
        ready = self._ready
        if self._running_pending and not ready:  # the program is over: nothing to choose
            return self._main
        self._record(me)
        if len(self._steps) > self._step_limit:
            raise Livelock(self._describe_livelock())
        if self._point_ns:
            self._clock_ns += self._point_ns
            self._wake_due()
        while not ready:  # a timeout alone makes no task ready while the lock is held
            due_ns = self._next_due_ns()
            if due_ns is None:
                raise self._deadlock()
            self._clock_ns = due_ns
            self._wake_due()
        return ready[self.policy.choose(me.name, where, list(ready))]

    def _wake_due(self) -> None:
        while (due_ns := self._next_due_ns()) is not None and due_ns <= self._clock_ns:
            task = heapq.heappop(self._timers)[2]
            wait = task.waits_for
            if isinstance(wait, SeededCondition):
                wait.wake(task, timed_out=True)
            else:
                self._unpark(task)
                self._ready[task.name] = task

    def _make_ready(self, task: CoTask) -> None:
        self._ready[task.name] = task

    def _describe_livelock(self) -> str:
        last: dict[str, list[str]] = {}
        for task, where in reversed(self._steps[-1000:]):
            places = last.setdefault(task, [])
            if len(places) < 3:
                places.insert(0, where)
        places_text = "; ".join(f"{task}: {', '.join(last[task])}" for task in sorted(last))
        return f"livelock: {self._step_limit} places passed; the last of each task: {places_text}"
