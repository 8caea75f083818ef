"""A random stream for each task, so that a task's random numbers do not depend on the schedule."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

__all__ = ["MAIN", "TaskRandom"]

MAIN = "main"


class TaskRandom(random.Random):
    """Draws from the current task's own stream.

    The main task's stream is ``random.Random(seed)``; the stream of another task depends on the
    seed and the task's name.  With one common stream, a task would draw different numbers when
    another task ran earlier, and two schedules of a seed would be schedules of different programs.
    Threads do not share a stream, so drawing is safe on threads.
    """

    def __init__(self, seed: int, current_name: Callable[[], str]) -> None:
        self._seed = seed
        self._current_name = current_name
        self._streams: dict[str, random.Random] = {}
        super().__init__(seed)

    def restart(self, seed: int) -> None:
        """Replace every stream by that of another seed."""
        self._seed = seed
        self._streams = {}

    def _stream(self) -> random.Random:
        name = self._current_name()
        stream = self._streams.get(name)
        if stream is None:
            seed = self._seed if name == MAIN else f"{self._seed}:{name}"
            stream = self._streams[name] = random.Random(seed)
        return stream

    def random(self) -> float:
        """Return a float in [0, 1)."""
        return self._stream().random()

    def getrandbits(self, k: int, /) -> int:
        """Return an integer of ``k`` random bits."""
        return self._stream().getrandbits(k)

    def gauss(self, mu: float = 0.0, sigma: float = 1.0) -> float:
        """Return a Gaussian number (the base class would share a cached half between tasks)."""
        return self._stream().gauss(mu, sigma)

    def seed(self, *arguments: Any, **keywords: Any) -> None:
        """Do nothing: the seed is fixed at creation (the base class calls this there)."""

    def getstate(self) -> tuple[Any, ...]:
        """Return the current task's state."""
        return self._stream().getstate()

    def setstate(self, state: tuple[Any, ...]) -> None:
        """Set the current task's state."""
        self._stream().setstate(state)
