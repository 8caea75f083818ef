"""The inline runtime: one thread, cheap locks, tasks that run while the current one waits.

The native engine uses it.  A lock is an attribute: another task can find it held only if its holder
waits.  Release therefore wakes no task; when the scheduler chooses, it checks the locks of the few
tasks that wait for one.
"""

from __future__ import annotations

import heapq
import os
import random
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import cast

from softsgx import compiled
from softsgx.runtime import base
from softsgx.runtime._random import TaskRandom
from softsgx.runtime._tasks import SLEEP, Cooperative, CoTask
from softsgx.runtime.failures import Deadlock

__all__ = ["InlineRuntime"]


class _InlineLock:
    __slots__ = ("_holder", "_runtime", "name")

    def __init__(self, runtime: InlineRuntime, name: str) -> None:
        self._runtime = runtime
        self.name = name
        self._holder: CoTask | None = None

    # The same as acquire and release, without a further call.  Hot code calls acquire and release
    # itself: the two calls take half the time of a ``with``.

    def __enter__(self) -> None:
        if self._holder is None:
            self._holder = self._runtime._current
        else:
            self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._holder is self._runtime._current:
            self._holder = None
        else:
            self.release()

    def acquire(self) -> None:
        runtime = self._runtime
        if self._holder is None:
            self._holder = runtime._current
            return
        me = runtime._current
        assert self._holder is not me, f"lock {self.name!r} taken twice by task {me.name!r}"
        while self._holder is not None:
            runtime._refuse_cycle(self)
            runtime._enlist(runtime._lock_waiters, self)
            runtime._park()
        self._holder = me

    def try_acquire(self) -> bool:
        if self._holder is not None:
            return False
        self._holder = self._runtime._current
        return True

    def release(self) -> None:
        runtime = self._runtime
        if self._holder is runtime._current:
            self._holder = None
        else:
            runtime._release_without_holding(self, self.name)

    def held(self) -> bool:
        return self._holder is not None

    def blocker(self) -> CoTask | None:
        return self._holder

    def describe_wait(self) -> str:
        holder = self._holder
        return f"lock {self.name!r}, " + (f"held by {holder.name}" if holder else "which is free")


class _InlineCondition:
    __slots__ = ("_lock", "_runtime", "_waiters")

    def __init__(self, runtime: InlineRuntime, lock: _InlineLock) -> None:
        self._runtime = runtime
        self._lock = lock
        self._waiters: list[CoTask] = []

    def wait(self, timeout_ns: int | None = None) -> bool:
        runtime, lock = self._runtime, self._lock
        me = runtime._current
        assert lock._holder is me, _not_yours(lock)
        lock._holder = None
        runtime._enlist(self._waiters, self, timeout_ns)
        runtime._park()
        timed_out = me.timed_out
        try:
            lock.acquire()
        except Deadlock:
            me.forfeited.append(lock)
            raise
        return not timed_out

    def notify_all(self) -> None:
        runtime, lock = self._runtime, self._lock
        assert lock._holder is runtime._current, _not_yours(lock)
        for task in list(self._waiters):
            runtime._unpark(task)
            runtime._make_ready(task)

    def blocker(self) -> CoTask | None:
        return None

    def describe_wait(self) -> str:
        return f"a notification under lock {self._lock.name!r}"


class _NoLatch:
    """A latch among tasks that cannot be interrupted: it does nothing, as fast as possible.

    Its methods are C functions that do nothing, in half the time of Python methods.  Tests on the
    seeded runtime find misuse: its latch checks.
    """

    __slots__ = ("name",)

    __enter__: Callable[..., object] = [].clear
    __exit__: Callable[..., None] = cast(Callable[..., None], "".format)
    acquire: Callable[..., None] = [].clear
    release: Callable[..., None] = [].clear

    def __init__(self) -> None:
        self.name = "latch"

    def try_acquire(self) -> bool:
        return True

    def held(self) -> bool:
        return True  # used only to assert that the latch is held


class InlineRuntime(Cooperative):
    """One thread; other tasks run while the current one waits, and real time passes.

    It belongs to the thread that uses it.  An event loop calls :meth:`run_pending` to let
    background tasks run.

    Args:
        seed: of :attr:`random`, where each task has a stream of its own.
        clock_ns: a monotonic clock.
        sleep_ns: sleeps for a time on ``clock_ns``; called when all tasks wait, one of them for a
            time.
    """

    __slots__ = ("_clock_ns", "_lock_waiters", "_main_is_last", "_ready", "_sleep_ns", "random")

    interleaves = False

    def __init__(
        self,
        seed: int = 0,
        *,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        sleep_ns: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self.random: random.Random = TaskRandom(seed, self.task_name)
        self._clock_ns = clock_ns
        self._sleep_ns = sleep_ns if sleep_ns is not None else _sleep_really
        self._ready: deque[CoTask] = deque()
        self._lock_waiters: list[CoTask] = []
        self._main_is_last = False  # in run_pending(): the main task runs when no other can

    def entropy(self, size: int) -> bytes:
        """Return bytes of the system's random number generator."""
        return os.urandom(size)

    def lock(self, name: str) -> base.Lock:
        """Return a new sleeping mutex."""
        return _InlineLock(self, name)

    def condition(self, lock: base.Lock) -> base.Condition:
        """Return a new condition variable over ``lock``."""
        assert isinstance(lock, _InlineLock), "a condition needs a lock of its own runtime"
        return _InlineCondition(self, lock)

    def latch(self) -> base.Lock:
        """Return a latch that does nothing: no other task can run while it is held."""
        return _NoLatch()

    def point(self, where: str) -> None:
        """Do nothing: no other task runs here."""

    def spawn(self, run: Callable[[], None], name: str, *, daemon: bool = False) -> base.Task:
        """Make ``run`` a task, which runs while the current task waits."""
        task = self._new_task(run, name, daemon=daemon)
        self._ready.append(task)
        return task

    def yield_now(self) -> None:
        """Let every task that can run do so first."""
        self._wake_due()
        if self._ready:
            self._ready.append(self._current)
            self._park()

    def has_pending(self) -> bool:
        """Return whether :meth:`run_pending` would let a task run."""
        if self._lock_waiters or self._timers:
            self._wake_due()
        return bool(self._ready)

    def is_quiet(self) -> bool:
        """Return whether no task can run or waits for a lock or a time, and none has failed."""
        return not (self._ready or self._lock_waiters or self._timers or self._has_failures)

    def run_pending(self) -> None:
        """Let the tasks run until each of them waits; the main task calls it between events."""
        assert self._current is self._main, f"run_pending() called by {self.task_name()!r}"
        if self.has_pending():
            self._main_is_last = True
            self._park()  # raises only at the end of all tasks
            self._main_is_last = False

    _run_pending = run_pending

    def take_failures(self) -> list[tuple[str, Exception]]:
        """Return name and exception of each task that has failed since the previous call.

        Neither joining such a task nor :meth:`close` raises its exception again.
        """
        if not self._has_failures:
            return []
        self._has_failures = False
        failed = [task for task in self._tasks if task.error is not None]
        taken: list[tuple[str, Exception]] = []
        for task in failed:
            assert isinstance(task.error, Exception), "other exceptions end the program"
            taken.append((task.name, task.error))
            task.error = None
            self._tasks.remove(task)
        return taken

    def sleep(self, duration_ns: int) -> None:
        """Let others run until ``duration_ns`` nanoseconds have passed."""
        self._enlist(None, SLEEP, duration_ns)
        self._park()

    def now_ns(self) -> int:
        """Return the clock's nanoseconds."""
        clock_ns = self._clock_ns
        return clock_ns()

    def _join(self, task: CoTask) -> None:
        assert task is not self._current, f"task {task.name!r} joins itself"
        while not task.finished:
            self._refuse_cycle(task)
            self._enlist(task.joiners, task)
            self._park()

    def _make_ready(self, task: CoTask) -> None:
        self._ready.append(task)

    def _next(self) -> CoTask:
        while True:
            self._wake_due()
            if self._ready:
                return self._ready.popleft()
            if self._main_is_last:
                return self._main
            due_ns = self._next_due_ns()
            if due_ns is None:
                raise self._deadlock()
            self._sleep_ns(max(0, due_ns - self._clock_ns()))

    def _wake_due(self) -> None:
        """Make each task ready whose lock is free or whose timer is due."""
        if not self._lock_waiters and not self._timers:
            return
        for task in list(self._lock_waiters):
            lock = task.waits_for
            if lock is not None and lock.blocker() is None:
                self._unpark(task)
                self._ready.append(task)
        while (due_ns := self._next_due_ns()) is not None and due_ns <= self._clock_ns():
            task = heapq.heappop(self._timers)[2]
            self._unpark(task)
            task.timed_out = True
            self._ready.append(task)


def _sleep_really(duration_ns: int) -> None:
    time.sleep(duration_ns / 1e9)


def _not_yours(lock: _InlineLock) -> str:
    holder, me = lock._holder, lock._runtime._current
    return f"lock {lock.name!r} is held by {holder and holder.name}, not by task {me.name!r}"


if compiled.speedups is not None:
    compiled.speedups.bind("InlineLock", _InlineLock)
    if compiled.speedups.bind("InlineRuntime", InlineRuntime):
        compiled.speedups.give("InlineRuntime", InlineRuntime)
    compiled.speedups.give("monotonic_ns", time.monotonic_ns)
