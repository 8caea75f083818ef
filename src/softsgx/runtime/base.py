"""The interface of a runtime."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, TypeVar

__all__ = ["Condition", "Lock", "Runtime", "Task"]

_Result = TypeVar("_Result")


class Lock(Protocol):
    """A sleeping mutex: one task holds it; a task that takes it twice fails an assertion."""

    name: str

    def acquire(self) -> None:
        """Wait until it is free, then hold it."""

    def try_acquire(self) -> bool:
        """Hold it if it is free; never wait."""

    def release(self) -> None:
        """Release it; the caller must be its holder."""

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

    The lock is an argument of its creation.  Every caller must hold it; a wait releases it.
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
        """Wait until it is done; raise its exception if it ended with one."""


class Runtime(Protocol):
    """Locks, tasks, time and randomness.

    Attributes:
        random: the only source of random decisions; a function of a seed.
        concurrent: whether tasks run at the same time on several threads, so that even a single
            read-modify-write needs the :meth:`latch`.
        interleaves: whether another task may run at a :meth:`point`; if not, the code between two
            waits is atomic.
    """

    random: random.Random
    concurrent: bool
    interleaves: bool

    def entropy(self, size: int) -> bytes:
        """Return ``size`` random bytes for a key, which must not be predictable.

        The system provides them.  The seeded runtime takes them from :attr:`random`, because the
        same seed must repeat everything, ciphertext included.
        """

    def lock(self, name: str) -> Lock:
        """Return a new sleeping mutex."""

    def condition(self, lock: Lock) -> Condition:
        """Return a new condition variable over ``lock``."""

    def latch(self) -> Lock:
        """Return a new mutex for a few instructions: never held across a wait or a point.

        It is no scheduling point, and costs nothing where tasks are cooperative.  There, calling
        ``acquire`` and ``release`` takes a third of the time of a ``with``, which matters on the
        path of every page.  ``held`` may only be used to assert that the latch is held, not that
        it is free.
        """

    def point(self, where: str) -> None:
        """Let another task run here; ``where`` is the name of the place in schedules and traces.

        Every leaf calls it while it holds its EPC page locks, and so does every lock operation.
        """

    def spawn(self, run: Callable[[], None], name: str, *, daemon: bool = False) -> Task:
        """Start ``run`` as a task.

        Args:
            run: the function of the task; :meth:`Task.join` or :meth:`close` raises its exception.
            name: its name; the second task of a name is called ``name#2``.
            daemon: whether the task may still wait when the runtime is closed.  It is then killed:
                the call that it waits in raises ``greenlet.GreenletExit``.
        """

    def yield_now(self) -> None:
        """Let other tasks run first, if there are any."""

    def sleep(self, duration_ns: int) -> None:
        """Wait for ``duration_ns`` nanoseconds of runtime time."""

    def now_ns(self) -> int:
        """Return nanoseconds since an arbitrary start; virtual time on the seeded runtime."""

    def task_name(self) -> str:
        """Return the current task's name, ``main`` outside any task."""

    def run(self, main: Callable[[], _Result]) -> _Result:
        """Run ``main`` as the main task, then :meth:`close`; return the result of ``main``."""

    def close(self) -> None:
        """End all spawned tasks; the main task calls it.

        Raises:
            AssertionError: a task that is no daemon had not ended; it has been killed.
            BaseException: the exception of a task that no task has joined; several as an
                ``ExceptionGroup``.
        """
