"""Waiting, tasks, time and randomness: everything that may differ from run to run.

Code above takes a :class:`Runtime` as an argument and waits through nothing else.  Three exist:
``InlineRuntime`` (one thread, locks cost next to nothing), ``ThreadsRuntime`` (real threads) and
``SeededRuntime`` (cooperative tasks in one thread; the same seed gives the same history).
"""

from softsgx.runtime.base import Condition, Lock, Runtime, Task

__all__ = ["Condition", "Lock", "Runtime", "Task"]
