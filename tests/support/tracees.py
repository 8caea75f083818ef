"""Ends of traced processes that a test has started by itself."""

from __future__ import annotations

import os
import signal

from softsgx.engines.native import abi
from softsgx.engines.native.tracing.waits import let_end

__all__ = ["end_tracee"]


def end_tracee(tid: int) -> None:
    """Kill a process of one thread, and wait until it is gone; it may be gone already.

    It may report stops first, as the one before its end.
    """
    try:
        os.kill(tid, signal.SIGKILL)
        while os.WIFSTOPPED(os.waitpid(tid, abi.WALL)[1]):
            let_end(tid)
    except (ProcessLookupError, ChildProcessError):
        return
