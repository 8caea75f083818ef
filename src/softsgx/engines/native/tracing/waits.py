"""wait(2) for all threads of the program, in one place.

wait(2) reports a stop or an end once, often while the supervisor waits for another thread: a
request to one thread can depend on the end of another one.  So every wait accepts reports of all
threads, lets ending threads end, and keeps the other reports for later.

A time limit or signals may end a wait: then the supervisor does timed work.  Such waits are for
SIGCHLD, so SIGCHLD and those signals are blocked while the program runs.

Deviation: every child of the calling process that ends while a program runs is reaped here.

Source:
    wait(2), ptrace(2): the end of a leader is reported after its last thread was reaped;
    sigtimedwait(2).
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager

from softsgx.engines.native import abi, kernel, libc
from softsgx.engines.native.kernel import Place

__all__ = ["Waits", "let_end", "stops_at_exit"]


#: Another thread of the calling process that does not block SIGCHLD may take it: look again.
_LONGEST_WAIT_NS = 100_000_000


class Waits:
    """See the module.

    Args:
        signals: signals to the calling process that end a wait, and are counted.
        clock: returns nanoseconds.
        wakes: signals that end a wait, and are not counted.
        keeps_exits: keep reports of the stop before a thread's end, too: no request to one thread
            depends on the end of another.

    Attributes:
        places: by thread, memory for what a wait fetches of it when it has stopped.
        unreported: last status of each thread that no event of its parent has reported yet.
    """

    def __init__(
        self,
        signals: Set[int] = frozenset(),
        clock: Callable[[], int] = time.monotonic_ns,
        *,
        wakes: Set[int] = frozenset(),
        keeps_exits: bool = False,
    ) -> None:
        self._keeps_exits = keeps_exits
        self._signals, self.clock = frozenset(signals), clock
        self._ended_by = self._signals | wakes
        self._kept: deque[tuple[int, int]] = deque()
        self._received = 0
        self.places: dict[int, Place] = {}
        self.unreported: dict[int, int] = {}

    @contextmanager
    def signals_blocked(self) -> Iterator[None]:
        """Block SIGCHLD and the signals that end waits; threads that start meanwhile inherit that.

        Signals that no call has received are dropped at the end.
        """
        ended_by = self._ended_by
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *ended_by})
        try:
            yield
        finally:
            while ended_by and signal.sigtimedwait(ended_by, 0) is not None:
                pass
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def received(self) -> bool:
        """Return whether one of the signals has arrived; each of them is reported once.

        The kernel keeps one of each number, so two signals may be reported as one.
        """
        if self._received:
            self._received -= 1
            return True
        return bool(self._signals) and signal.sigtimedwait(self._signals, 0) is not None

    def next(self, until_ns: int | None = None) -> tuple[int, int, int] | None:
        """Return the earliest stop or end that :meth:`of` has not returned.

        Args:
            until_ns: a time on the clock that ends the wait.

        Returns:
            The thread's id, its status, and what was fetched of it
            (:func:`softsgx.engines.native.kernel.next_stop`).  ``None``: the time is ``until_ns``,
            or one of the signals has arrived.

        Raises:
            ChildProcessError: there is no thread, and no other child.
        """
        if self._kept:
            return *self._kept.popleft(), 0
        if until_ns is None and not self._ended_by:
            return kernel.next_stop(0, self.places)
        while True:
            event = kernel.next_stop(os.WNOHANG, self.places)
            if event[0]:
                return event
            left_ns = _LONGEST_WAIT_NS if until_ns is None else until_ns - self.clock()
            if left_ns <= 0:
                return None
            limit_s = min(left_ns, _LONGEST_WAIT_NS) / 1e9
            came = signal.sigtimedwait({signal.SIGCHLD, *self._ended_by}, limit_s)
            if came is not None and came.si_signo in self._ended_by:
                self._received += came.si_signo in self._signals
                return None

    def of(self, tid: int) -> int:
        """Return the next status of thread ``tid``.

        Raises:
            ChildProcessError: there is no such thread any more.
        """
        for index, (other, status) in enumerate(self._kept):
            if other == tid:
                del self._kept[index]
                return status
        os.waitid(os.P_PID, tid, _PEEK)  # fails at once for a thread that does not exist
        while True:
            other, status = os.waitpid(-1, abi.WALL)
            if other == tid:
                return status
            if stops_at_exit(status) and not self._keeps_exits:
                let_end(other)
            self._kept.append((other, status))

    def keep_first(self, tid: int, status: int) -> None:
        """Keep a status of an unknown thread until its parent's event reports the thread.

        Either may arrive first.  A child of the calling process that is no thread of the program
        has no such event.
        """
        if stops_at_exit(status):
            let_end(tid)
        elif os.WIFSTOPPED(status) or tid in self.unreported:
            self.unreported[tid] = status

    def first_stop(self, tid: int) -> int | None:
        """Return the status of a thread's first stop, when its parent's event reports the thread.

        Returns:
            ``None``: the thread has ended, or ends now without having run.
        """
        try:
            status = self.unreported.pop(tid, None) or self.of(tid)
        except ChildProcessError:
            return None
        if not os.WIFSTOPPED(status):
            return None
        if stops_at_exit(status):
            let_end(tid)
            return None
        return status

    def keep(self, tid: int, status: int) -> None:
        """Report a status again through :meth:`next`; the caller of :meth:`of` cannot handle it."""
        self._kept.append((tid, status))

    def has_moved(self, tid: int) -> bool:
        """Return whether a stopped thread has left its stop, which only SIGKILL can cause."""
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
    """Return whether a status is that of the stop before a thread's end."""
    return os.WIFSTOPPED(status) and status >> 16 == abi.PTRACE_EVENT_EXIT


def let_end(tid: int) -> None:
    """Resume a thread from the stop before its end; do nothing if it is not in that stop."""
    kernel.try_ptrace(abi.PTRACE_CONT, tid, 0, 0)
