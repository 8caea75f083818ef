"""Kills a traced thread at an event, as another process may at any time."""

from __future__ import annotations

import os
import signal

from softsgx.engines.native import abi

__all__ = ["kill_at_event"]


def kill_at_event(tid: int) -> None:
    """Kill a thread that is stopped at an event; it is at the event of its end, or gone, then."""
    os.kill(tid, signal.SIGKILL)
    os.waitid(os.P_PID, tid, os.WEXITED | os.WSTOPPED | os.WNOWAIT | abi.WALL)
