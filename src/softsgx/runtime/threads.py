"""The threads runtime: a task is a thread, a lock is a real one.

A task waits either for a lock, which its holder releases at some time, or at a *parking place*, a
private lock that the waker releases.  So closing can end every wait: it releases all parking
places, and a killed task raises ``GreenletExit`` as in the other runtimes.

Lock order: a runtime lock, then ``_mutex``.  ``_mutex`` is held for a few instructions.
"""

from __future__ import annotations

import os
import random
import threading
import time
from _thread import allocate_lock
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

from greenlet import GreenletExit

from softsgx.runtime import base
from softsgx.runtime._random import MAIN, TaskRandom
from softsgx.runtime._tasks import end_of_tasks, unique_name
from softsgx.runtime.failures import Deadlock

__all__ = ["ThreadsRuntime"]

_Result = TypeVar("_Result")


class _ThreadTask:
    """A task, or a thread that the runtime did not start."""

    def __init__(self, runtime: ThreadsRuntime, name: str, *, daemon: bool) -> None:
        self._runtime = runtime
        self.name = name
        self.daemon = daemon
        self.thread: threading.Thread | None = None
        self.finished = False
        self.error: BaseException | None = None
        self.joined = False
        self.joiners: list[threading.Lock] = []  # parking places
        self.waits_for: _ThreadLock | _ThreadTask | None = None
        self.wait_text: str | None = None
        self.forfeited: list[_ThreadLock] = []

    def done(self) -> bool:
        return self.finished

    def join(self) -> None:
        self._runtime._join(self)
        self.joined = True
        if self.error is not None:
            raise self.error

    def blocker(self) -> _ThreadTask | None:
        return self


class _ThreadLock:
    __slots__ = ("_holder", "_local", "_raw", "_runtime", "name")

    def __init__(self, runtime: ThreadsRuntime, name: str) -> None:
        self._runtime = runtime
        self._local = runtime._local
        self.name = name
        self._raw = allocate_lock()
        self._holder: _ThreadTask | None = None  # written by the holder only

    def acquire(self) -> None:
        if not self._raw.acquire(False):
            self._runtime._wait_for_lock(self)
        self._holder = self._local.task

    __enter__ = acquire

    def try_acquire(self) -> bool:
        if not self._raw.acquire(False):
            return False
        self._holder = self._local.task
        return True

    def release(self) -> None:
        me = self._local.task
        holder = self._holder
        if holder is not me and self in me.forfeited:
            # A failed wait has not taken it again; the ``with`` around the wait still releases it.
            me.forfeited.remove(self)
            return
        assert holder is me, (
            f"lock {self.name!r} is held by {holder and holder.name}, not by task {me.name!r}"
        )
        self._holder = None
        self._raw.release()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._holder is self._local.task:
            self._holder = None
            self._raw.release()
        else:
            self.release()

    def held(self) -> bool:
        return self._raw.locked()

    def blocker(self) -> _ThreadTask | None:
        return self._holder


class _ThreadCondition:
    def __init__(self, runtime: ThreadsRuntime, lock: _ThreadLock) -> None:
        self._runtime = runtime
        self._lock = lock
        self._places: list[threading.Lock] = []  # changed with the lock held

    def wait(self, timeout_ns: int | None = None) -> bool:
        runtime, lock = self._runtime, self._lock
        me = runtime._local.task
        assert lock._holder is me, f"lock {lock.name!r} is not held by task {me.name!r}"
        place = _new_place()
        self._places.append(place)
        lock.release()
        try:
            runtime._park(me, place, timeout_ns, f"a notification under lock {lock.name!r}")
        finally:
            try:
                lock.acquire()
            except Deadlock:
                me.forfeited.append(lock)
                raise
            # The notifying task removes the place from the list.  It may do so after the timeout
            # and before this task has the lock again; then the wait ended with a notification.
            notified = place not in self._places
            if not notified:
                self._places.remove(place)
        return notified

    def notify_all(self) -> None:
        me = self._runtime._local.task
        assert self._lock._holder is me, f"lock {self._lock.name!r} is not held by {me.name!r}"
        places, self._places = self._places, []
        for place in places:
            _open(place)


class _Latch:
    """A mutex for a few instructions: the C lock itself, which records no holder."""

    __slots__ = ("__enter__", "__exit__", "_raw", "held", "name", "release")

    def __init__(self) -> None:
        raw = allocate_lock()
        self.name = "latch"
        self._raw = raw
        # ``with`` finds these in the class's slots and calls C functions.
        self.__enter__: Callable[[], object] = raw.__enter__
        self.__exit__: Callable[..., None] = raw.__exit__
        self.release = raw.release
        self.held = raw.locked

    def acquire(self) -> None:
        self._raw.acquire()

    def try_acquire(self) -> bool:
        return self._raw.acquire(False)


class _Local(threading.local):
    """The current thread's task; a thread that the runtime did not start gets one at first use."""

    def __init__(self, runtime: ThreadsRuntime) -> None:
        self.task = _ThreadTask(runtime, MAIN, daemon=False)


class ThreadsRuntime:
    """Real threads.

    Threads that the runtime did not start may use it too; each is a task of its own, called
    ``main``.

    Args:
        seed: of :attr:`random`, where each task has a stream of its own.
        clock_ns: a monotonic clock, for :meth:`now_ns` only; waits take real time.
        grace_ns: time that :meth:`close` waits for tasks before it fails.
    """

    concurrent = True
    interleaves = True

    def __init__(
        self,
        seed: int = 0,
        *,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        grace_ns: int = 5_000_000_000,
    ) -> None:
        self.random: random.Random = TaskRandom(seed, self.task_name)
        self.now_ns = clock_ns
        self._grace_ns = grace_ns
        self._local = _Local(self)
        self._mutex = threading.Lock()
        self._names: dict[str, int] = {}
        self._tasks: list[_ThreadTask] = []  # spawned, and running, or failed
        self._parked: dict[threading.Lock, _ThreadTask] = {}
        self._killing = False
        self._closed = False

    def entropy(self, size: int) -> bytes:
        """Return bytes of the system's random number generator."""
        return os.urandom(size)

    def lock(self, name: str) -> base.Lock:
        """Return a new sleeping mutex."""
        return _ThreadLock(self, name)

    def condition(self, lock: base.Lock) -> base.Condition:
        """Return a new condition variable over ``lock``."""
        assert isinstance(lock, _ThreadLock), "a condition needs a lock of its own runtime"
        return _ThreadCondition(self, lock)

    def latch(self) -> base.Lock:
        """Return a new cheap mutex, which records no holder."""
        return _Latch()

    def point(self, where: str) -> None:
        """Do nothing: other threads run anyway."""

    def spawn(self, run: Callable[[], None], name: str, *, daemon: bool = False) -> base.Task:
        """Start a thread."""
        me = self._local.task
        with self._mutex:
            if self._closed and me.thread is not None:  # a daemon that was killed and still runs
                raise GreenletExit
            assert not self._closed, f"task {name!r} spawned on a closed runtime"
            task = _ThreadTask(self, unique_name(self._names, name), daemon=daemon)
            self._tasks.append(task)
        # Python's daemon: a task that hangs must not keep the process from ending.
        task.thread = threading.Thread(
            target=self._body, args=(task, run), name=task.name, daemon=True
        )
        task.thread.start()
        return task

    def yield_now(self) -> None:
        """Let the system run another thread."""
        time.sleep(0)

    def sleep(self, duration_ns: int) -> None:
        """Wait for ``duration_ns`` nanoseconds."""
        self._park(self._local.task, _new_place(), duration_ns, "its sleep to end")

    def task_name(self) -> str:
        """Return the current task's name, ``main`` outside any task."""
        return self._local.task.name

    def _body(self, task: _ThreadTask, run: Callable[[], None]) -> None:
        self._local.task = task
        try:
            run()
        except GreenletExit:
            pass
        except BaseException as error:
            task.error = error
        with self._mutex:
            task.finished = True
            if task.error is None:
                self._tasks.remove(task)
            joiners = task.joiners
        for place in joiners:
            _open(place)

    # Waiting.

    def _park(
        self, me: _ThreadTask, place: threading.Lock, timeout_ns: int | None, what: str
    ) -> None:
        """Wait until another thread opens ``place`` or ``timeout_ns`` have passed."""
        with self._mutex:
            if self._killing and me.thread is not None:
                raise GreenletExit
            self._parked[place] = me
            me.wait_text = what
        seconds = -1.0 if timeout_ns is None else min(timeout_ns / 1e9, threading.TIMEOUT_MAX)
        place.acquire(True, seconds)
        with self._mutex:
            del self._parked[place]
            me.wait_text = None
            killed = self._killing and me.thread is not None
        if killed:
            raise GreenletExit

    def _wait_for_lock(self, lock: _ThreadLock) -> None:
        """Take a lock that another task holds; raise if the wait would close a cycle of waits."""
        me = self._local.task
        assert lock._holder is not me, f"lock {lock.name!r} taken twice by task {me.name!r}"
        with self._mutex:
            me.waits_for = lock
            chain = self._cycle(me)
            if chain is not None:
                me.waits_for = None
        if chain is not None:
            raise Deadlock(chain)
        lock._raw.acquire()
        me.waits_for = None

    def _join(self, task: _ThreadTask) -> None:
        me = self._local.task
        assert task is not me, f"task {task.name!r} joins itself"
        place = _new_place()
        with self._mutex:
            if self._killing and me.thread is not None:
                raise GreenletExit
            if task.finished:
                return
            me.waits_for = task
            chain = self._cycle(me)
            if chain is not None:
                me.waits_for = None
                raise Deadlock(chain)
            task.joiners.append(place)
        try:
            self._park(me, place, None, _describe(me))
        finally:
            me.waits_for = None

    def _cycle(self, me: _ThreadTask) -> str | None:
        """Return the message if ``me`` waits for itself, else None; the caller holds ``_mutex``.

        A holder is read without its lock.  That is safe: a task in the chain waits, so it releases
        no lock, and the chain closes only over tasks that have recorded their wait.
        """
        chain = [me]
        while (wait := chain[-1].waits_for) is not None:
            blocker = wait.blocker()
            if blocker is me:
                return "deadlock: " + "; ".join(f"{t.name} waits for {_describe(t)}" for t in chain)
            if blocker is None or blocker in chain:
                return None
            chain.append(blocker)
        return None

    # The end.

    def run(self, main: Callable[[], _Result]) -> _Result:
        """Run ``main`` in this thread, then :meth:`close`; return the result of ``main``."""
        with self:
            return main()

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
            for text in self._end(grace_ns=0):
                error.add_note(f"task left: {text}")
            for other in self._errors():
                error.add_note(f"a task also raised {other!r}")

    def close(self) -> None:
        """Wait for the tasks that are no daemons, then kill the waiting daemons.

        Raises:
            AssertionError: a task had not ended; if it was waiting, it has been killed.
            BaseException: the exception of a task that no task has joined; several as an
                ``ExceptionGroup``.
        """
        if self._closed:
            return
        left = self._end(grace_ns=self._grace_ns)
        end_of_tasks(left, self._errors(), None)

    def _end(self, *, grace_ns: int) -> list[str]:
        """Join tasks that end, kill those that wait; return a text for each that did not end."""
        with self._mutex:
            self._closed = True
            tasks = list(self._tasks)
        self._join_threads([task for task in tasks if not task.daemon], grace_ns)
        left = [f"{t.name} {_describe_state(t)}" for t in tasks if not t.daemon and not t.finished]
        with self._mutex:
            self._killing = True
            for place, task in self._parked.items():
                if task.thread is not None:
                    _open(place)
        self._join_threads(tasks, self._grace_ns)
        left += [f"{t.name} {_describe_state(t)}" for t in tasks if t.daemon and not t.finished]
        return left

    def _join_threads(self, tasks: list[_ThreadTask], grace_ns: int) -> None:
        deadline = time.monotonic() + grace_ns / 1e9
        for task in tasks:
            assert task.thread is not None, f"task {task.name!r} has no thread"
            task.thread.join(max(0.0, deadline - time.monotonic()))

    def _errors(self) -> list[BaseException]:
        with self._mutex:
            tasks = list(self._tasks)
        return [task.error for task in tasks if task.error is not None and not task.joined]


def _new_place() -> threading.Lock:
    """Return a parking place: a lock that is held until another thread opens it."""
    place = threading.Lock()
    place.acquire()
    return place


def _open(place: threading.Lock) -> None:
    """Wake the thread that is parked at ``place``; opening a place twice has no further effect."""
    if place.locked():
        place.release()


def _describe(task: _ThreadTask) -> str:
    wait = task.waits_for
    if isinstance(wait, _ThreadLock):
        holder = wait._holder
        return f"lock {wait.name!r}, " + (f"held by {holder.name}" if holder else "which is free")
    return f"task {wait.name!r} to end" if wait is not None else "nothing"


def _describe_state(task: _ThreadTask) -> str:
    if task.waits_for is not None:
        return f"waits for {_describe(task)}"
    return f"waits for {task.wait_text}" if task.wait_text is not None else "is running"
