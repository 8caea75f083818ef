"""Locks, conditions and latches of the seeded runtime: places where its policy chooses.

A lock is free, or held by one task; tasks that wait for a free lock are ready, and the one that is
chosen first takes it.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from softsgx.runtime._tasks import CoTask

if TYPE_CHECKING:
    from softsgx.runtime.seeded import SeededRuntime

__all__ = ["Latch", "SeededCondition", "SeededLock"]


class _Held:
    """What a lock and a latch have in common: a name, a holder, and ``with``."""

    def __init__(self, runtime: SeededRuntime, name: str) -> None:
        self._runtime = runtime
        self.name = name
        self._holder: CoTask | None = None

    def acquire(self) -> None:
        raise NotImplementedError

    def release(self) -> None:
        raise NotImplementedError

    def held(self) -> bool:
        return self._holder is not None

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class SeededLock(_Held):
    def __init__(self, runtime: SeededRuntime, name: str) -> None:
        super().__init__(runtime, name)
        self._waiters: list[CoTask] = []
        self._at_acquire = f"acquire {name}"
        self._at_try = f"try_acquire {name}"
        self._at_release = f"release {name}"

    def acquire(self) -> None:
        runtime = self._runtime
        me = runtime._current
        holder = self._holder
        assert holder is not me, f"lock {self.name!r} taken twice by task {me.name!r}"
        if runtime._quiet and holder is None and not self._waiters:
            self._holder = me
            return
        if holder is not None:
            me.place = self._at_acquire
            runtime._refuse_cycle(self)
            del runtime._ready[me.name]
        runtime._enlist(self._waiters, self)
        runtime._reach(self._at_acquire, blocked=holder is not None)
        self._take(me)

    def _take(self, me: CoTask) -> None:
        """Hold the lock, which is free; tasks that wait for it cannot run now."""
        assert self._holder is None, f"{me.name!r} was chosen but {self.name!r} is held"
        runtime = self._runtime
        runtime._unpark(me)
        self._holder = me
        for task in self._waiters:
            runtime._ready.pop(task.name, None)

    def _give_up(self) -> None:
        """Leave the lock free; tasks that wait for it can run."""
        self._holder = None
        ready = self._runtime._ready
        for task in self._waiters:
            ready[task.name] = task

    def try_acquire(self) -> bool:
        runtime = self._runtime
        runtime._reach(self._at_try)
        if self._holder is not None:
            return False
        self._take(runtime._current)
        return True

    def release(self) -> None:
        runtime = self._runtime
        if self._holder is not runtime._current:
            runtime._release_without_holding(self, self.name)
            return
        if self._waiters:
            self._give_up()
        else:
            self._holder = None
        if not runtime._quiet:
            runtime._reach(self._at_release)

    def blocker(self) -> CoTask | None:
        return self._holder

    def describe_wait(self) -> str:
        holder = self._holder
        return f"lock {self.name!r}, " + (f"held by {holder.name}" if holder else "which is free")


class SeededCondition:
    def __init__(self, runtime: SeededRuntime, lock: SeededLock) -> None:
        self._runtime = runtime
        self._lock = lock
        self._waiters: list[CoTask] = []
        self._at_wait = f"wait {lock.name}"
        self._at_notify = f"notify {lock.name}"

    def wait(self, timeout_ns: int | None = None) -> bool:
        runtime, lock = self._runtime, self._lock
        me = runtime._current
        assert lock._holder is me, _not_yours(lock)
        lock._give_up()
        del runtime._ready[me.name]
        runtime._enlist(self._waiters, self, timeout_ns)
        runtime._reach(self._at_wait, blocked=True)
        timed_out = me.timed_out
        lock._take(me)
        return not timed_out

    def notify_all(self) -> None:
        runtime, lock = self._runtime, self._lock
        assert lock._holder is runtime._current, _not_yours(lock)
        for task in list(self._waiters):
            self.wake(task, timed_out=False)
        runtime._reach(self._at_notify)

    def wake(self, task: CoTask, *, timed_out: bool) -> None:
        """Let ``task``, which waits here, wait for the lock instead, or refuse it the lock."""
        runtime, lock = self._runtime, self._lock
        runtime._unpark(task)
        task.inject = runtime._cycle(task, lock)
        if task.inject is not None:
            task.forfeited.append(lock)
            runtime._ready[task.name] = task
            return
        task.timed_out = timed_out
        task.waits_for = lock
        task.parked_in = lock._waiters
        lock._waiters.append(task)
        if lock._holder is None:
            runtime._ready[task.name] = task

    def blocker(self) -> CoTask | None:
        return None

    def describe_wait(self) -> str:
        return f"a notification under lock {self._lock.name!r}"


class Latch(_Held):
    """A lock that no task may wait for: it asserts what :meth:`base.Runtime.latch` promises."""

    def __init__(self, runtime: SeededRuntime) -> None:
        super().__init__(runtime, "latch")

    def acquire(self) -> None:
        assert self._holder is None, "a latch is taken while it is held"
        self._holder = self._runtime._current
        self._runtime._latched += 1

    def try_acquire(self) -> bool:
        self.acquire()
        return True

    def release(self) -> None:
        assert self._holder is self._runtime._current, "a latch is released by another task"
        self._holder = None
        self._runtime._latched -= 1


def _not_yours(lock: SeededLock) -> str:
    holder, me = lock._holder, lock._runtime._current
    return f"lock {lock.name!r} is held by {holder and holder.name}, not by task {me.name!r}"
