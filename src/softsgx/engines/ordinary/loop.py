"""The recorder's loop: stops of the program's threads, and faults in its address spaces.

The recorder is one OS thread.  A thread of the program stops for system calls that change mappings
or make tasks, and for signals; the recorder never interrupts it.  A page fault is no stop: the
thread waits in the kernel until the recorder has answered.

Source:
    ptrace(2), userfaultfd(2), signalfd(2).
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass

from softsgx.engines.native import abi, libc
from softsgx.engines.native.tracing.failures import Failures, kill
from softsgx.engines.native.tracing.orphans import parent_of, tracees
from softsgx.engines.native.tracing.start import finish_exec
from softsgx.engines.native.tracing.tracee import Gone, Stop
from softsgx.engines.native.tracing.unsupervised import is_32_bit
from softsgx.engines.native.tracing.waits import Waits, let_end, stops_at_exit
from softsgx.engines.ordinary.calls import Calls
from softsgx.engines.ordinary.exits import Exits
from softsgx.engines.ordinary.intervals import Intervals
from softsgx.engines.ordinary.program import ProgramThread
from softsgx.engines.ordinary.space import AddressSpace, Hold, Snapshot
from softsgx.engines.ordinary.spaces import Spaces
from softsgx.ondemand import logger

__all__ = ["Loop"]

_LOG = logger(__name__)
_GROUP_STOPS = frozenset({abi.SIGSTOP, abi.SIGTSTP, abi.SIGTTIN, abi.SIGTTOU})
_BIRTHS = (abi.PTRACE_EVENT_FORK, abi.PTRACE_EVENT_VFORK, abi.PTRACE_EVENT_CLONE)
_SIGNAL_BYTES = 128
#: Another thread of the recorder's process that does not block SIGCHLD may take it: look again.
_LONGEST_WAIT_S = 0.1


@dataclass(slots=True)
class _Birth:
    """A task that was made and has not stopped for the first time yet.

    Attributes:
        thread: the task.
        parent: the thread that has made it.
        copied: the state that its copy of the address space begins with; ``None``: it shares the
            parent's.
        held: keeps the parent's address space from changing until that stop.
    """

    thread: ProgramThread
    parent: ProgramThread
    copied: Snapshot | None
    held: Hold | None


class Loop:
    """See the module.

    Args:
        waits: receives stops and ends; SIGCHLD is blocked.
        spaces: the address spaces of the program.
        calls: handles system calls.
        intervals: ends intervals, between stops and faults.

    Attributes:
        threads: threads of the program that have not ended, by id.
        statuses: exit status of each process that has ended, as wait(2) encodes it.
        failures: exceptions that are bugs of the recorder.
    """

    def __init__(
        self,
        waits: Waits,
        spaces: Spaces,
        calls: Calls,
        intervals: Intervals,
    ) -> None:
        self._waits, self._spaces, self._calls = waits, spaces, calls
        self._intervals = intervals
        self.threads: dict[int, ProgramThread] = {}
        self.statuses: dict[int, int] = {}
        self.failures = Failures()
        self._exits = Exits()
        self._early: dict[int, int] = {}
        self._born: dict[int, _Birth] = {}
        self._children = libc.child_signals()
        self._poll = select.epoll()
        self._poll.register(self._children, select.EPOLLIN)

    # --- the program ----------------------------------------------------------------------------

    def adopt(self, thread: ProgramThread) -> None:
        """Record a thread that is stopped at the end of its execve, and resume it.

        Raises:
            NotRun, SoftSgxError: it cannot be recorded.
        """
        self.threads[thread.tid] = thread
        if is_32_bit(thread):
            self._spaces.refuse_32_bit(thread.tid)
        else:
            self._enter(thread, self._spaces.of_program(thread))
        thread.resume()

    def run(self) -> None:
        """Serve the program until its last thread has ended."""
        clock, intervals = time.monotonic_ns, self._intervals
        self._stops()
        while self.threads or self._born:
            self._exits.release_zombies()
            timeout_s = intervals.between()
            ready = self._poll.poll(_LONGEST_WAIT_S if timeout_s is None else timeout_s)
            began_ns = clock()
            for descriptor, _events in ready:
                if descriptor == self._children:
                    os.read(self._children, _SIGNAL_BYTES)
                    self._stops()
                else:
                    self._spaces.serve(descriptor)
            if not ready:
                self._stops()
            intervals.spent(clock() - began_ns)

    def kill(self) -> None:
        """Kill every process, and wait until each has ended."""
        known = {*self._early, *self._born, *(thread.pid for thread in self.threads.values())}
        for pid in known:
            kill(pid)
        self._spaces.end_all()
        while self.threads or self._born:
            try:
                event = self._waits.next()
            except ChildProcessError:
                return
            if event is not None and os.WIFSTOPPED(event[1]):
                kill(event[0])
                let_end(event[0])
            elif event is not None:
                self.threads.pop(event[0], None)
                self._born.pop(event[0], None)

    def close(self) -> None:
        """Close the descriptors."""
        self._poll.close()
        os.close(self._children)

    # --- stops ----------------------------------------------------------------------------------

    def _stops(self) -> None:
        """Handle every stop and end that wait(2) reports now."""
        while True:
            try:
                event = self._waits.next(0)
            except ChildProcessError:  # every task was reaped, also those that have not stopped yet
                self.threads.clear()
                self._born.clear()
                return
            if event is None:
                return
            self._event(*event[:2])

    def _event(self, tid: int, status: int) -> None:
        thread = self.threads.get(tid)
        if thread is None:
            self._stranger(tid, status)
        elif not os.WIFSTOPPED(status):
            self._gone(thread, status)
        else:
            self._guard(thread, self._handle, thread.stopped(status))

    def _stranger(self, tid: int, status: int) -> None:
        """Handle a child that its parent's event has not reported yet, or a resident task."""
        if stops_at_exit(status):
            let_end(tid)
        elif tid in self._born:
            self._first_stop(tid, status)
        elif os.WIFSTOPPED(status) and not self._spaces.is_ours(tid):
            self._early[tid] = status

    def _guard(
        self, thread: ProgramThread, serve: Callable[[ProgramThread, Stop], None], stop: Stop
    ) -> None:
        try:
            serve(thread, stop)
        except Gone:
            return  # wait(2) reports its end
        except Exception as error:
            if not self._waits.has_moved(thread.tid):
                self.failures.end_process(thread.pid, error)

    def _handle(self, thread: ProgramThread, stop: Stop) -> None:
        if stop.syscall:
            at_end, thread.at_end = thread.at_end, None
            if at_end is not None:
                at_end(_signed(thread.load().rax))
            thread.resume()
        elif not stop.event:
            thread.resume(stop.signal)
        elif stop.event == abi.PTRACE_EVENT_SECCOMP:
            self._calls.entered(thread)
            thread.resume()
        elif stop.event == abi.PTRACE_EVENT_STOP and stop.signal in _GROUP_STOPS:
            thread.listen()
        elif stop.event in _BIRTHS:
            self._birth(thread, stop.event)
            thread.resume()
        elif stop.event == abi.PTRACE_EVENT_EXEC:
            self._executed(thread)
        elif stop.event == abi.PTRACE_EVENT_EXIT:
            if thread.space is not None and self._spaces.users(thread.space) > 1:
                self._exits.begin(thread, thread.space)
            if thread.holds is not None:  # it ends inside a call, which may be fork
                self._expect_unreported(thread)
            let_end(thread.tid)
        else:
            thread.resume()

    # --- new tasks, execve and ends -------------------------------------------------------------

    def _birth(self, parent: ProgramThread, event: int) -> None:
        tid = parent.event_message(event)
        try:
            pid = libc.leader(tid)
        except OSError:  # it has been killed and reaped
            parent.release()
            return
        if tid not in self.threads and tid not in self._born:  # else it was taken for an orphan
            self._expect(
                tid, pid, parent, shares=pid == parent.pid or _share_memory(tid, parent.tid)
            )

    def _expect(self, tid: int, pid: int, parent: ProgramThread, *, shares: bool) -> None:
        """Expect the first stop of a task that a thread has made.

        Args:
            tid: the task.
            pid: its process.
            parent: the thread.
            shares: whether the task has its address space, and no copy of it.
        """
        thread = ProgramThread(tid, pid, self._waits)
        thread.cleared_at = parent.cleared_by_child
        copied = None
        if parent.space is not None:
            thread.inject_at = parent.inject_at
            if shares:
                self._enter(thread, parent.space)
            else:
                copied = parent.space.snapshot()
        held, parent.holds = parent.holds, None
        self._born[tid] = _Birth(thread, parent, copied, held)
        status = self._early.pop(tid, None)
        if status is not None:
            self._first_stop(tid, status)

    def _first_stop(self, tid: int, status: int) -> None:
        birth = self._born.pop(tid)
        thread, copied = birth.thread, birth.copied
        if birth.held is not None:
            birth.held.release()
        if not os.WIFSTOPPED(status):
            self._gone(thread, status)
            return
        self.threads[tid] = thread

        def begin(thread: ProgramThread, stop: Stop) -> None:
            if copied is not None:
                self._enter(thread, self._spaces.of_fork(thread, birth.parent, copied))
            if stop.event == abi.PTRACE_EVENT_STOP and stop.signal not in _GROUP_STOPS:
                thread.resume()
            else:
                self._handle(thread, stop)

        self._guard(thread, begin, thread.stopped(status))

    def _executed(self, thread: ProgramThread) -> None:
        """Handle execve: the other threads have ended; the remaining one has the leader's id."""
        former, heir = thread.space, ProgramThread(thread.tid, thread.pid, self._waits)
        for other in [each for each in self.threads.values() if each.pid == thread.pid]:
            del self.threads[other.tid]
            self._leave(other)
        if former is not None and not self._spaces.users(former):
            heir.reaps = former.resident.tid
        self.threads[thread.tid] = heir
        finish_exec(thread)
        heir.in_call = False
        self.adopt(heir)

    def _gone(self, thread: ProgramThread, status: int) -> None:
        if self.threads.get(thread.tid) is thread:
            del self.threads[thread.tid]
        if thread.tid == thread.pid:
            self.statuses[thread.pid] = status
            self.failures.reaped(thread.pid)
        self._exits.ended(thread.tid)
        self._leave(thread)

    def _expect_unreported(self, parent: ProgramThread) -> None:
        """Expect the process that a thread has made, which ends before it reports it.

        The thread is at the event of its end, so its children are still children of its process.
        """
        resident = None if parent.space is None else parent.space.resident.tid
        for tid in tracees():
            known = tid in self.threads or tid in self._born or self._spaces.is_ours(tid)
            if not known and parent_of(tid) == parent.pid:
                shares = resident is not None and _share_memory(tid, resident)
                self._expect(tid, tid, parent, shares=shares)

    def _enter(self, thread: ProgramThread, space: AddressSpace | None) -> None:
        thread.space = space
        if space is not None and self._spaces.enter(space):
            self._poll.register(space.faults.descriptor, select.EPOLLIN)

    def _leave(self, thread: ProgramThread) -> None:
        """Remove a thread from its address space."""
        thread.release()
        space, thread.space = thread.space, None
        if space is not None:
            self._spaces.leave(space)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _share_memory(tid: int, other: int) -> bool:
    """Return whether two tasks share an address space."""
    return libc.syscall(abi.SYS_KCMP, tid, other, abi.KCMP_VM, 0, 0) == 0
