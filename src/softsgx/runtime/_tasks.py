"""The common part of the two cooperative runtimes: tasks as greenlets, their errors, their end.

This module does not schedule: ``_next`` of the runtime chooses the task that runs next.  A task is
parked in at most one list at a time (the waiters of a lock, a condition or a task).  ``_unpark``
removes it from there, for every kind of wakeup.

Invariant: ``_current`` is the task whose greenlet runs; only :meth:`Cooperative._switch_to` and the
end of a task change it.
"""

from __future__ import annotations

import heapq
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import NoReturn, Protocol, Self, TypeVar

import greenlet

from softsgx.runtime._random import MAIN
from softsgx.runtime.failures import Deadlock

__all__ = ["SLEEP", "CoTask", "Cooperative", "Waitable", "end_of_tasks", "unique_name"]

_Result = TypeVar("_Result")


class Waitable(Protocol):
    """A lock, a condition, a task or anything else that a task can wait for."""

    def blocker(self) -> CoTask | None:
        """Return the one task that can end the wait, if it is one."""

    def describe_wait(self) -> str:
        """Return ``lock 'epc', held by reclaim`` or the like."""


class _Sleep:
    """The object that a sleeping task waits for."""

    def blocker(self) -> CoTask | None:
        return None

    def describe_wait(self) -> str:
        return "its sleep to end"


SLEEP = _Sleep()


class CoTask:
    """A cooperative task; a runtime has one for its main task, too."""

    __slots__ = (
        "_runtime",
        "daemon",
        "error",
        "finished",
        "forfeited",
        "greenlet",
        "inject",
        "joined",
        "joiners",
        "name",
        "parked_in",
        "place",
        "ticket",
        "timed_out",
        "waits_for",
    )

    def __init__(self, runtime: Cooperative, name: str, *, daemon: bool) -> None:
        self._runtime = runtime
        self.name = name
        self.daemon = daemon
        self.greenlet: greenlet.greenlet | None = None
        self.finished = False
        self.error: BaseException | None = None
        self.joined = False
        self.joiners: list[CoTask] = []
        # Where it waits.
        self.waits_for: Waitable | None = None
        self.parked_in: list[CoTask] | None = None
        self.ticket = 0  # of its latest wait: a timer with another one is stale
        self.timed_out = False
        self.inject: BaseException | None = None  # raised in the task when it runs next
        self.forfeited: list[Waitable] = []  # locks that a failed wait has not taken again
        self.place = "start"

    def done(self) -> bool:
        """Return whether it has returned or raised."""
        return self.finished

    def join(self) -> None:
        """Wait until it is done; raise its exception if it ended with one."""
        self._runtime._join(self)
        self.joined = True
        if self.error is not None:
            raise self.error

    def blocker(self) -> CoTask | None:
        """Return this task: the task that joins it waits for it."""
        return self

    def describe_wait(self) -> str:
        """Return the text for a task that joins this one."""
        return f"task {self.name!r} to end"


class Cooperative(ABC):
    """Greenlets in one thread; a subclass decides which task runs."""

    __slots__ = (
        *("_closed", "_current", "_failure", "_has_failures", "_main", "_names", "_over"),
        *("_tasks", "_tie_break", "_timers"),
    )

    concurrent = False
    interleaves = True

    def __init__(self) -> None:
        self._main = CoTask(self, MAIN, daemon=False)
        self._current = self._main
        self._has_failures = False  # whether a task may have failed
        self._tasks: list[CoTask] = []  # spawned, and running, or failed and not joined
        self._names: dict[str, int] = {}
        self._timers: list[tuple[int, int, CoTask, int]] = []  # due, tie-break, task, ticket
        self._tie_break = itertools.count()
        # Over: the program has failed or is being closed.  No task is scheduled any more.  Code
        # that unwinds may release locks; a task that would have to wait gets an exception.
        self._over = False
        self._closed = False
        self._failure: BaseException | None = None

    # What a subclass decides.

    @abstractmethod
    def _next(self) -> CoTask:
        """Return the task to run now; raise :class:`Deadlock` when there is none."""

    @abstractmethod
    def _make_ready(self, task: CoTask) -> None:
        """``task`` is no longer parked and can run."""

    @abstractmethod
    def _join(self, task: CoTask) -> None:
        """Wait until ``task`` has finished."""

    @abstractmethod
    def _run_pending(self) -> None:
        """Let the other tasks run until each of them waits."""

    @abstractmethod
    def now_ns(self) -> int:
        """Return nanoseconds since an arbitrary start."""

    def task_name(self) -> str:
        """Return the current task's name, ``main`` outside any task."""
        return self._current.name

    # Starting, switching, ending.

    def _new_task(self, run: Callable[[], None], name: str, *, daemon: bool) -> CoTask:
        if self._closed and self._current is not self._main:  # a daemon that unwinds
            raise greenlet.GreenletExit
        assert not self._closed, f"task {name!r} spawned on a closed runtime"
        task = CoTask(self, unique_name(self._names, name), daemon=daemon)
        if self._current is self._main:
            self._main.greenlet = greenlet.getcurrent()
        # A greenlet that ends passes its result to the next one, which ignores it.
        task.greenlet = greenlet.greenlet(
            lambda *_: self._body(task, run), parent=self._main.greenlet
        )
        self._tasks.append(task)
        return task

    def _body(self, task: CoTask, run: Callable[[], None]) -> None:
        try:
            run()
        except greenlet.GreenletExit:
            pass
        except Exception as error:
            task.error = error
            self._has_failures = True
        except BaseException as error:
            # An interrupt is not the task's result: it ends the program.
            task.finished = True
            self._leave_for(self._stop(error))
            return
        task.finished = True
        if task.error is None:
            self._tasks.remove(task)
        for joiner in list(task.joiners):
            self._unpark(joiner)
            self._make_ready(joiner)
        try:
            following = self._main if self._over else self._after_end(task)
        except BaseException as error:
            following = self._stop(error)
        self._leave_for(following)

    def _after_end(self, task: CoTask) -> CoTask:
        """Return which task runs when ``task`` has ended."""
        return self._next()

    def _leave_for(self, following: CoTask) -> None:
        """Let ``following`` run after the end of the current greenlet."""
        self._current = following
        target = following.greenlet
        assert target is not None, f"task {following.name!r} has no greenlet"
        greenlet.getcurrent().parent = target

    def _stop(self, error: BaseException) -> CoTask:
        """The program has failed: return the main task, which raises ``error`` when it runs."""
        self._over = True
        if self._failure is None:
            self._failure = error
        main = self._main
        self._unpark(main)
        main.inject = error
        return main

    def _park(self) -> None:
        """Let others run; return when the current task is chosen again, or raise in it."""
        me = self._current
        if self._over:
            self._raise_over(me)
        try:
            following = self._next()
        except BaseException as error:
            following = self._stop(error)
        self._switch_to(following)

    def _switch_to(self, following: CoTask) -> None:
        me = self._current
        if following is not me:
            if me is self._main:
                me.greenlet = greenlet.getcurrent()
            self._current = following
            target = following.greenlet
            assert target is not None, f"task {following.name!r} has no greenlet"
            target.switch()
        if me.inject is not None:
            error, me.inject = me.inject, None
            raise error

    def _raise_over(self, me: CoTask) -> NoReturn:
        """Raise instead of waiting: the program is over."""
        self._unpark(me)
        if me is self._main and self._failure is not None:
            raise self._failure
        raise greenlet.GreenletExit

    # Waiting.

    def _enlist(
        self, place: list[CoTask] | None, what: Waitable | None, timeout_ns: int | None = None
    ) -> None:
        """Record that the current task waits for ``what``, in the list ``place``."""
        me = self._current
        me.ticket += 1
        me.waits_for = what
        me.parked_in = place
        me.timed_out = False
        if place is not None:
            place.append(me)
        if timeout_ns is not None:
            due_ns = self.now_ns() + timeout_ns
            heapq.heappush(self._timers, (due_ns, next(self._tie_break), me, me.ticket))

    def _unpark(self, task: CoTask) -> None:
        """Remove ``task`` from the list where it waits; its timers become stale."""
        if task.parked_in is not None:
            task.parked_in.remove(task)
            task.parked_in = None
        task.waits_for = None
        task.ticket += 1

    def _next_due_ns(self) -> int | None:
        """Return when the earliest timer that is not stale is due."""
        timers = self._timers
        while timers and timers[0][2].ticket != timers[0][3]:
            heapq.heappop(timers)
        return timers[0][0] if timers else None

    def _refuse_cycle(self, what: Waitable) -> None:
        """Raise when the current task, waiting for ``what``, would wait for itself."""
        error = self._cycle(self._current, what)
        if error is not None:
            raise error

    def _cycle(self, task: CoTask, what: Waitable) -> Deadlock | None:
        """Return the error if ``task``, waiting for ``what``, would wait for itself."""
        chain = [task]
        blocker = what.blocker()
        while blocker is not None:
            if blocker is task:
                return Deadlock(self._describe_deadlock(chain[1:], describe_wait(task, what)))
            if blocker in chain:  # a cycle of other tasks
                return None
            chain.append(blocker)
            wait = blocker.waits_for
            blocker = None if wait is None else wait.blocker()
        return None

    def _release_without_holding(self, lock: Waitable, name: str) -> None:
        """Assert that a task which does not hold ``lock`` has a reason to release it.

        The reason is a wait on a condition that ended with an exception and without the lock: the
        ``with`` around the wait still releases it.
        """
        me = self._current
        if lock in me.forfeited:
            me.forfeited.remove(lock)
            return
        holder = lock.blocker()
        assert self._over, (
            f"lock {name!r} is held by {holder and holder.name}, not by task {me.name!r}"
        )

    def _describe_deadlock(self, tasks: Iterable[CoTask], *more: str) -> str:
        waits = [*more, *(describe_task(task) for task in tasks if not task.finished)]
        ended = [
            f"{task.name} has raised {task.error!r}"
            for task in self._tasks
            if task.error is not None
        ]
        return "deadlock: " + "; ".join(waits + ended)

    def _deadlock(self) -> Deadlock:
        """Return the error for the state where every task waits and nothing can wake one."""
        error = Deadlock(self._describe_deadlock([self._main, *self._tasks]))
        for task in self._tasks:
            if task.error is not None:
                error.__cause__ = task.error
        return error

    # The end.

    def run(self, main: Callable[[], _Result]) -> _Result:
        """Run ``main`` as the main task, then :meth:`close`; return the result of ``main``."""
        with self:
            return main()

    def close(self) -> None:
        """End all spawned tasks; the main task calls it.

        Daemons first run until each of them waits, and are then killed.

        Raises:
            AssertionError: a task that is no daemon had not ended; it has been killed.
            BaseException: the exception of a task that no task has joined; several as an
                ``ExceptionGroup``.
        """
        assert self._current is self._main, f"close() called by task {self.task_name()!r}"
        if self._closed:
            return
        if not self._over and any(task.daemon for task in self._tasks):
            self._run_pending()
        end_of_tasks(self._kill_all(), self._errors(), self._failure)

    def _kill_all(self) -> list[str]:
        """Kill every task that has not ended; describe each that is no daemon."""
        self._over = self._closed = True
        alive = [task for task in self._tasks if not task.finished]
        left = [describe_task(task) for task in alive if not task.daemon]
        self._main.greenlet = greenlet.getcurrent()
        for task in alive:
            self._unpark(task)
            started = task.greenlet
            assert started is not None, f"task {task.name!r} has no greenlet"
            if started:  # it has begun: let it unwind
                task.inject = greenlet.GreenletExit()
                self._switch_to(task)
            task.finished = True
        return left

    def _errors(self) -> list[BaseException]:
        return [task.error for task in self._tasks if task.error is not None and not task.joined]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        elif not self._closed:
            self._kill_all()
            for other in self._errors():
                error.add_note(f"a task also raised {other!r}")


def unique_name(counts: dict[str, int], name: str) -> str:
    """Return ``name`` for its first task, ``name#2`` for its second, and so on."""
    count = counts[name] = counts.get(name, 0) + 1
    assert name != MAIN, "a task cannot be called main"
    return name if count == 1 else f"{name}#{count}"


def describe_task(task: CoTask) -> str:
    """Return the state of a task as text: what it waits for, or that it can run."""
    what = task.waits_for
    return describe_wait(task, what) if what else f"{task.name} could run, at {task.place!r}"


def describe_wait(task: CoTask, what: Waitable) -> str:
    """Return as text which task waits for ``what``."""
    return f"{task.name} waits for {what.describe_wait()}"


def end_of_tasks(
    left: list[str], errors: list[BaseException], failure: BaseException | None
) -> None:
    """Raise the errors of closing a runtime, the most important one first."""
    complaint = f"tasks left: {'; '.join(left)}" if left else None
    first: BaseException | None = failure
    if first is None and len(errors) == 1:
        first = errors[0]
    elif first is None and errors:
        first = BaseExceptionGroup("several tasks failed", errors)
    if first is not None:
        if complaint is not None:
            first.add_note(complaint)
        raise first
    assert complaint is None, complaint
