"""Failures of a whole program of tasks, and of an exploration of it.

They are bugs, never bad input, and therefore assertions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softsgx.runtime.schedule import Schedule

__all__ = ["Deadlock", "ExplorationFailed", "Livelock", "ReplayDiverged", "ScriptNotFollowed"]


class Deadlock(AssertionError):
    """Tasks wait for each other, or for a notification that no remaining task can send.

    The text names every waiting task, the object that it waits for, and the holder of that object.
    """


class Livelock(AssertionError):
    """The program passed more points than the limit; the text has each task's last places."""


class ReplayDiverged(AssertionError):
    """A replayed program reached other places than the recorded one: not the same program."""


class ScriptNotFollowed(AssertionError):
    """A scripted task could not reach its place, so the scenario did not happen."""


class ExplorationFailed(AssertionError):
    """A program failed under one of the explored schedules.

    Attributes:
        seed: the seed of the failing run.
        schedule: the schedule of that run, for :meth:`SeededRuntime.replay`.
        error: the exception of the program.
    """

    def __init__(self, text: str, *, seed: int, schedule: Schedule, error: BaseException) -> None:
        super().__init__(text)
        self.seed = seed
        self.schedule = schedule
        self.error = error
