"""The interface of a runtime."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, TypeVar

__all__ = ["Condition", "Lock", "Runtime", "Task"]

_Result = TypeVar("_Result")


class Lock(Protocol):
    """A sleeping mutex: held by one task, not re-entrant (taking it twice is an assertion)."""

    name: str

    def acquire(self) -> None:
        """Wait until it is free, then hold it."""

    def try_acquire(self) -> bool:
        """Hold it if it is free; never wait."""

    def release(self) -> None:
        """Give it up; only its holder may."""

    def held(self) -> bool:
        """Return whether any task holds it: for assertions only."""

    def __enter__(self) -> object: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class Condition(Protocol):
    """A condition variable over a lock of the same runtime.

    The lock is given at creation, must be held by every caller, and is released while waiting.
    """

    def wait(self, timeout_ns: int | None = None) -> bool:
        """Wait for a notification; ``False`` when ``timeout_ns`` of runtime time passed first."""

    def notify_all(self) -> None:
        """Wake every waiter."""


class Task(Protocol):
    """A task that was spawned."""

    name: str

    def done(self) -> bool:
        """Return whether it has returned or raised."""

    def join(self) -> None:
        """Wait until it is done; raise what it raised."""


class Runtime(Protocol):
    """Locks, tasks, time and randomness.

    Attributes:
        random: the only source of randomness that decides what happens; a function of a seed.
        concurrent: whether tasks run at the same time on several threads, so that even a single
            read-modify-write needs the :meth:`latch`.
        interleaves: whether another task may run at a :meth:`point`; where it is False, what lies
            between two waits happens as one.
    """

    random: random.Random
    concurrent: bool
    interleaves: bool

    def entropy(self, size: int) -> bytes:
        """Return ``size`` random bytes for a key that nothing outside may predict.

        They come from the system; on the seeded runtime from :attr:`random`, because there the
        same seed must repeat everything, ciphertext included.
        """

    def lock(self, name: str) -> Lock:
        """Return a new sleeping mutex."""

    def condition(self, lock: Lock) -> Condition:
        """Return a new condition variable over ``lock``."""

    def latch(self) -> Lock:
        """Return a new mutex for a few instructions: never held across a wait or a point.

        Where tasks are cooperative it costs nothing, and it is not a scheduling point; there
        ``acquire`` and ``release`` take a third of the time of a ``with``, which counts where
        every page that comes or goes passes.  Its ``held`` is for asserting that it is held, not
        that it is free.
        """

    def point(self, where: str) -> None:
        """Say that another task may run here: ``where`` names the place in schedules and traces.

        Called by every leaf while it holds its EPC page locks, and by every lock operation.
        """

    def spawn(self, run: Callable[[], None], name: str, *, daemon: bool = False) -> Task:
        """Start ``run`` as a task.

        Args:
            run: what it does; what it raises is kept for :meth:`Task.join`, or for :meth:`close`.
            name: its name; the second task of a name is called ``name#2``.
            daemon: it may still be waiting when the runtime is closed, and is then killed: the
                call it waits in raises ``greenlet.GreenletExit``.
        """

    def yield_now(self) -> None:
        """Let other tasks run first, if there are any."""

    def sleep(self, duration_ns: int) -> None:
        """Wait for ``duration_ns`` nanoseconds of runtime time."""

    def now_ns(self) -> int:
        """Return nanoseconds since an arbitrary start; virtual time where schedules are seeded."""

    def task_name(self) -> str:
        """Return the current task's name, ``main`` outside any task."""

    def run(self, main: Callable[[], _Result]) -> _Result:
        """Run ``main`` as the main task, :meth:`close`, and return what ``main`` returned."""

    def close(self) -> None:
        """End everything that was spawned; called by the main task.

        Raises:
            AssertionError: a task that is no daemon was left; it has been killed.
            BaseException: what a task raised that no task has joined; several as an
                ``ExceptionGroup``.
        """
