"""wait(2) for all threads of the program, in one place.

wait(2) reports a stop or an end once, often while the supervisor waits for another thread: a
request to one thread can depend on the end of another one.  So every wait accepts reports of all
threads, lets ending threads end, and keeps the other reports for later.

A time limit or signals may end a wait: then the supervisor does timed work.  A look interrupts it
at a time.  Such waits are for SIGCHLD, so SIGCHLD and those signals are blocked while the program
runs.

Where faults are events (:mod:`.fault_events`), a wait accepts them, too.  The caller of
:meth:`Waits.next_or_fault` resolves them; at any other wait the thread of a fault is stopped.

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

from softsgx import compiled
from softsgx.engines.native import abi, kernel, libc
from softsgx.engines.native.kernel import Place
from softsgx.engines.native.tracing.fault_events import (
    FaultEvent,
    FaultEvents,
    can_wait_for_events,
)

__all__ = ["LONGEST_WAIT_S", "Waits", "let_end", "stops_at_exit"]


#: Another thread of the calling process that does not block SIGCHLD may take it: look again.
_LONGEST_WAIT_NS = 100_000_000
LONGEST_WAIT_S = _LONGEST_WAIT_NS / 1e9


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
        kept: (thread, status) of the stops and ends that :meth:`next` returns before it waits.
        unreported: last status of each thread that no event of its parent has reported yet.
        look_ns: when the next look is due; see :meth:`look_at`.  ``None``: none is planned.
        faults: faults whose threads wait; ``None``: each fault stops its thread.
        asked: what each thread waits for that waited for a page and was asked to stop.
    """

    __slots__ = (
        *("_ended_by", "_keeps_exits", "_looks", "_received", "_signals", "asked", "clock"),
        *("faults", "kept", "look_ns", "places", "unreported"),
    )

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
        self._ended_by = sum(1 << number - 1 for number in self._signals | wakes)
        self.kept: deque[tuple[int, int]] = deque()
        self._received = 0
        self.places: dict[int, Place] = {}
        self.unreported: dict[int, int] = {}
        self.look_ns: int | None = None
        self._looks: dict[Callable[[], None], int] = {}
        self.faults: FaultEvents | None = None
        self.asked: dict[int, int] = {}

    @contextmanager
    def signals_blocked(self) -> Iterator[None]:
        """Block SIGCHLD and the signals that end waits; threads that start meanwhile inherit that.

        No fault is accepted afterwards.  Signals that no call has received are dropped at the end.
        """
        ended_by = {number for number in signal.valid_signals() if self._ended_by >> number - 1 & 1}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *ended_by})
        try:
            yield
        finally:
            if self.faults is not None:
                self.faults.close()
            while ended_by and signal.sigtimedwait(ended_by, 0) is not None:
                pass
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def accept_faults(self) -> None:
        """Let faults be events, if that is possible; SIGCHLD is blocked."""
        if can_wait_for_events():
            self.faults = FaultEvents()

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
        while True:
            event = self.next_or_fault(until_ns)
            if not isinstance(event, FaultEvent):
                return event
            self.stop_at(event)

    def stop_of(self, tid: int) -> tuple[int, int, int] | None:
        """Return a stop or end of thread ``tid`` as :meth:`next`; ``None``: it has none now."""
        if self.kept:
            return None  # they are served before
        try:
            tid, status = os.waitpid(tid, abi.WALL | os.WNOHANG)
        except ChildProcessError:
            return None
        return (tid, status, 0) if tid else None

    def fault_now(self) -> FaultEvent | None:
        """Return a fault whose thread waits now, before stops that are not kept."""
        if self.kept or self.faults is None or not self.faults.images:
            return None
        return self.faults.wait(0)

    def next_or_fault(
        self, until_ns: int | None = None
    ) -> tuple[int, int, int] | FaultEvent | None:
        """As :meth:`next`; or return a fault whose thread waits: the caller has to see to it."""
        if self.kept:
            return *self.kept.popleft(), 0
        faults = self.faults if self.faults is not None and self.faults.images else None
        while True:
            if faults is not None:
                if faults.may_have_stopped:
                    event = kernel.next_stop(os.WNOHANG, self.places)
                    if event[0]:
                        return event
                    faults.may_have_stopped = False
            elif self.look_ns is None and until_ns is None and not self._ended_by:
                return kernel.next_stop(0, self.places)
            else:
                limit_ns = self._limit_ns(until_ns)
                event = kernel.next_stop_within(limit_ns, self._ended_by, self.places)
                if event[0]:
                    return event
                if event[1]:
                    self._received += event[1] in self._signals
                    return None
            if self.look_ns is not None and self.clock() >= self.look_ns:
                self.look_now()
                continue
            if until_ns is not None and self.clock() >= until_ns:
                return None
            if faults is not None:
                fault = faults.wait(self._limit_ns(until_ns) / 1e9)
                if fault is not None:
                    return fault

    def _limit_ns(self, until_ns: int | None) -> int:
        """Return how long a wait may last."""
        limit_ns = _LONGEST_WAIT_NS
        for due_ns in (self.look_ns, until_ns):
            if due_ns is not None:
                limit_ns = min(limit_ns, due_ns - self.clock())
        return max(limit_ns, 0)

    def keep_all(self) -> None:
        """Receive every stop and end that there is; :meth:`next` returns them before all others.

        wait(2) reports the stops of the latest threads first.  If these stop again and again, it
        does not report those of earlier ones.
        """
        while True:
            try:
                tid, status = os.waitpid(-1, abi.WALL | os.WNOHANG)
            except ChildProcessError:
                return
            if not tid:
                return
            self._keep_last(tid, status)

    def look_at(self, look: Callable[[], None], due_ns: int | None) -> None:
        """Call ``look`` once, when no thread has stopped and the time on the clock is ``due_ns``.

        The earliest of several times counts.  ``None``: do not call it.
        """
        if due_ns is None:
            self._looks.pop(look, None)
        else:
            self._looks[look] = min(due_ns, self._looks.get(look, due_ns))
        self.look_ns = min(self._looks.values(), default=None)

    def look_now(self) -> None:
        """Do the looks that are due."""
        if self.look_ns is None:
            return
        now_ns = self.clock()
        for look in [look for look, due_ns in self._looks.items() if due_ns <= now_ns]:
            self.look_at(look, None)
            look()

    def of(self, tid: int) -> int:
        """Return the next status of thread ``tid``.

        Raises:
            ChildProcessError: there is no such thread any more; it may have executed a program,
                which gave it the id of its leader.
        """
        for index, (other, status) in enumerate(self.kept):
            if other == tid:
                del self.kept[index]
                return status
        os.waitid(os.P_PID, tid, _PEEK)  # fails at once for a thread that does not exist
        while True:
            other, status = self._wait()
            if other == tid:
                return status
            self._keep_last(other, status)
            if os.WIFSTOPPED(status) and status >> 16 == abi.PTRACE_EVENT_EXEC:
                message = ctypes.c_uint64()
                at = ctypes.addressof(message)
                if kernel.try_ptrace(abi.PTRACE_GETEVENTMSG, other, 0, at) == 0 and (
                    message.value == tid
                ):
                    raise ChildProcessError

    def _keep_last(self, tid: int, status: int) -> None:
        if stops_at_exit(status) and not self._keeps_exits:
            let_end(tid)  # a request to another thread may depend on its end
        self.kept.append((tid, status))

    def _wait(self) -> tuple[int, int]:
        """Wait for any stop or end; threads that wait for pages stop, too."""
        faults = self.faults
        if faults is None or not faults.images:
            return os.waitpid(-1, abi.WALL)
        faults.may_have_stopped = True
        while True:
            tid, status = os.waitpid(-1, abi.WALL | os.WNOHANG)
            if tid:
                return tid, status
            fault = faults.wait(_LONGEST_WAIT_NS / 1e9)
            if fault is not None:
                self.stop_at(fault)

    def stop_at(self, fault: FaultEvent) -> None:
        """Make a thread that waits for a page stop, as if it had received SIGBUS.

        :meth:`Thread.stopped() <softsgx.engines.native.tracing.tracee.Thread.stopped>` recognises
        the stop.
        """
        assert self.faults is not None, "a fault is reported, and none can be"
        thread = self.faults.thread(fault)
        if thread is not None:
            self.asked[thread.tid] = fault.address
            kernel.try_ptrace(abi.PTRACE_INTERRUPT, thread.tid, 0, 0)  # or it has been killed

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
        status = self.unreported.pop(tid, None)
        if status is None:
            status = next((status for other, status in self.kept if other == tid), None)
            if status is not None:
                self.kept.remove((tid, status))
        try:
            if status is None:  # no other thread has to end for it
                _tid, status = os.waitpid(tid, abi.WALL)
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
        later = (index for index, (other, _status) in enumerate(self.kept) if other == tid)
        self.kept.insert(next(later, len(self.kept)), (tid, status))

    def keeps(self, tid: int) -> bool:
        """Return whether a status of a thread is kept that :meth:`next` has not returned yet."""
        return bool(self.kept) and any(other == tid for other, _status in self.kept)

    def has_moved(self, tid: int) -> bool:
        """Return whether a stopped thread has left its stop, which only SIGKILL can cause."""
        if self.keeps(tid):
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
    """Resume a thread from the stop before its end; do nothing if it is not in that stop.

    The report of the stop may have been kept, and the thread resumed.  If it was a leader, another
    thread that executes a program has its id then, and stops for the event of that.
    """
    at_exit = kernel.try_ptrace(abi.PTRACE_GETSIGINFO, tid, 0, _INFO_AT) == 0
    if at_exit and _INFO.code == _EXITING:
        kernel.try_ptrace(abi.PTRACE_CONT, tid, 0, 0)


_INFO = abi.SigInfo()
_INFO_AT = ctypes.addressof(_INFO)
_EXITING = abi.PTRACE_EVENT_EXIT << 8 | abi.SIGTRAP  # si_code of the stop


if compiled.speedups is not None:
    compiled.speedups.bind("Waits", Waits)
