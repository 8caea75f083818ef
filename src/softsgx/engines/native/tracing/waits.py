"""wait(2) for all threads of the program, in one place.

A stop or an end is told once, and often while something else is waited for: what one thread is
asked to do can depend on the end of another.  So every wait listens to all of them, lets go what
ends, and keeps the rest for later.

Deviation: every child of the calling process that ends while a program runs is reaped here.

Source:
    wait(2), ptrace(2): a leader that has ended is told of when its last thread was reaped.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque

from softsgx.engines.native import abi, libc

__all__ = ["Waits", "let_end", "stops_at_exit"]


class Waits:
    """See the module."""

    def __init__(self) -> None:
        self._kept: deque[tuple[int, int]] = deque()

    def next(self) -> tuple[int, int]:
        """Return a thread's id and its status, the earliest that nothing has asked for.

        Raises:
            ChildProcessError: there is no thread, and no other child.
        """
        return self._kept.popleft() if self._kept else os.waitpid(-1, abi.WALL)

    def next_now(self) -> tuple[int, int] | None:
        """As :meth:`next`, but ``None`` when there is nothing yet."""
        if self._kept:
            return self._kept.popleft()
        tid, status = os.waitpid(-1, abi.WALL | os.WNOHANG)
        return (tid, status) if tid else None

    def of(self, tid: int) -> int:
        """Return the next status of thread ``tid``.

        Raises:
            ChildProcessError: there is no such thread any more.
        """
        for index, (other, status) in enumerate(self._kept):
            if other == tid:
                del self._kept[index]
                return status
        os.waitid(os.P_PID, tid, _PEEK)  # or the others would be waited for instead
        while True:
            other, status = os.waitpid(-1, abi.WALL)
            if other == tid:
                return status
            if stops_at_exit(status):
                let_end(other)
            self._kept.append((other, status))

    def keep(self, tid: int, status: int) -> None:
        """Tell a status again: what waited for it was not the one to handle it."""
        self._kept.append((tid, status))

    def has_moved(self, tid: int) -> bool:
        """Return whether a thread that was stopped has left its stop: only SIGKILL does that."""
        if any(other == tid for other, _status in self._kept):
            return True
        try:
            if os.waitid(os.P_PID, tid, _PEEK) is not None:
                return True
            message = ctypes.c_uint64()
            libc.ptrace(abi.PTRACE_GETEVENTMSG, tid, 0, ctypes.addressof(message))
        except (ChildProcessError, ProcessLookupError):
            return True
        return False


_PEEK = os.WEXITED | os.WSTOPPED | os.WNOWAIT | os.WNOHANG | abi.WALL


def stops_at_exit(status: int) -> bool:
    """Return whether a status tells of the stop that comes before a thread's end."""
    return os.WIFSTOPPED(status) and status >> 16 == abi.PTRACE_EVENT_EXIT


def let_end(tid: int) -> None:
    """Let a thread go on from the stop before its end; nothing happens when it is not there."""
    libc.raw_ptrace(abi.PTRACE_CONT, tid, 0, 0)
