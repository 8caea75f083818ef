"""How a program of tasks can fail as a whole, and how an exploration of it does.

All are our own mistakes, never a user's input, hence assertions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softsgx.runtime.schedule import Schedule

__all__ = ["Deadlock", "ExplorationFailed", "Livelock", "ReplayDiverged", "ScriptNotFollowed"]


class Deadlock(AssertionError):
    """Tasks wait for each other, or for a notification that no task is left to send.

    The text names every waiting task, what it waits for, and who holds that.
    """


class Livelock(AssertionError):
    """The program passed more points than it was allowed to; names each task's last places."""


class ReplayDiverged(AssertionError):
    """A replayed program reached other places than the recorded one: not the same program."""


class ScriptNotFollowed(AssertionError):
    """A scripted task could not reach its place, so the scenario did not happen."""


class ExplorationFailed(AssertionError):
    """A program failed under one of the explored schedules.

    Attributes:
        seed: the seed under which it failed.
        schedule: what happened, for :meth:`SeededRuntime.replay`.
        error: what it raised.
    """

    def __init__(self, text: str, *, seed: int, schedule: Schedule, error: BaseException) -> None:
        super().__init__(text)
        self.seed = seed
        self.schedule = schedule
        self.error = error
