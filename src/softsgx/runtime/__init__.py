"""Waiting, tasks, time and randomness: everything that can differ between two runs.

Higher layers take a :class:`Runtime` as an argument and wait only through it.  There are three:
:class:`InlineRuntime` (one thread, cheap locks), :class:`ThreadsRuntime` (real threads) and
:class:`SeededRuntime` (cooperative tasks in one thread; the same seed gives the same history).
:func:`explore` searches the schedules of the seeded runtime for failures.
"""

from typing import TYPE_CHECKING

from softsgx.ondemand import on_demand
from softsgx.runtime.base import Condition, Lock, Runtime, Task
from softsgx.runtime.failures import (
    Deadlock,
    ExplorationFailed,
    Livelock,
    ReplayDiverged,
    ScriptNotFollowed,
)
from softsgx.runtime.inline import InlineRuntime

if TYPE_CHECKING:
    from softsgx.runtime.exploration import (
        Exploration,
        Program,
        Run,
        explore,
        explore_all,
        minimise,
        shrink,
    )
    from softsgx.runtime.policies import (
        Pct,
        Policy,
        Replay,
        Script,
        Stretches,
        Uniform,
        Uninterrupted,
    )
    from softsgx.runtime.schedule import Schedule, Step, Stretch
    from softsgx.runtime.seeded import SeededRuntime
    from softsgx.runtime.systematic import Systematic
    from softsgx.runtime.threads import ThreadsRuntime

__all__ = [
    "Condition",
    "Deadlock",
    "Exploration",
    "ExplorationFailed",
    "InlineRuntime",
    "Livelock",
    "Lock",
    "Pct",
    "Policy",
    "Program",
    "Replay",
    "ReplayDiverged",
    "Run",
    "Runtime",
    "Schedule",
    "Script",
    "ScriptNotFollowed",
    "SeededRuntime",
    "Step",
    "Stretch",
    "Stretches",
    "Systematic",
    "Task",
    "ThreadsRuntime",
    "Uniform",
    "Uninterrupted",
    "explore",
    "explore_all",
    "minimise",
    "shrink",
]

__getattr__ = on_demand(
    __name__,
    {
        "exploration": (
            "Exploration",
            "Program",
            "Run",
            "explore",
            "explore_all",
            "minimise",
            "shrink",
        ),
        "policies": (
            "Pct",
            "Policy",
            "Replay",
            "Script",
            "Stretches",
            "Uniform",
            "Uninterrupted",
        ),
        "schedule": (
            "Schedule",
            "Step",
            "Stretch",
        ),
        "seeded": ("SeededRuntime",),
        "systematic": ("Systematic",),
        "threads": ("ThreadsRuntime",),
    },
)
