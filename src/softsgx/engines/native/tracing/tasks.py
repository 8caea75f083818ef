"""The threads and processes of the program: how they begin, execute programs and end.

A thread ends in two steps.  It *dies* when it stops running code of the program: at the event of
its exit, or when a ptrace request or wait(2) reports the end, possibly while the loop serves
another thread.  Then it leaves its enclave, and the loop makes no more requests to it.  It is
*gone* when wait(2) has reaped it: the kernel has released its resources, and the loop, between two
stops, releases those that the supervisor holds for it.

Most children of shells do nothing that concerns the supervisor before they end or execute a
program.  A child of fork in an address space that is left alone is *fresh* until it stops: only its
process and what fork has copied are kept of it, and its objects are made at its next stop.

Source:
    ptrace(2), fork(2), execve(2).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from softsgx.engines.native import abi, kernel
from softsgx.engines.native.tracing.failures import Failures, kill
from softsgx.engines.native.tracing.lifecycle import Lifecycle
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import Process, ProgramThread
from softsgx.engines.native.tracing.start import finish_exec
from softsgx.engines.native.tracing.tracee import Gone, Thread, decode_stop
from softsgx.engines.native.tracing.unsupervised import Unsupervised, is_32_bit
from softsgx.engines.native.tracing.waits import Waits, let_end
from softsgx.engines.native.vdso.permits import Permits

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.fresh import FreshChild

__all__ = ["GROUP_STOPS", "Tasks"]

GROUP_STOPS = frozenset({abi.SIGSTOP, abi.SIGTSTP, abi.SIGTTIN, abi.SIGTTOU})
"""The signals that stop all threads of a process."""


class Tasks:
    """See the module.

    Args:
        lifecycle: receives the begin and the end of threads, processes and address spaces.
        waits: receives stops and ends.
        permits: crossings that do not stop.

    Attributes:
        threads: living threads by id, other than those of fresh children.
        fresh: fresh children by id.
        held: stopped threads whose stops the loop has to handle before it waits for others.
        statuses: exit status of each process that has ended, as wait(2) encodes it.
        failures: exceptions that are bugs of softsgx.
        unsupervised: threads of 32-bit programs.
    """

    def __init__(self, lifecycle: Lifecycle, waits: Waits, permits: Permits) -> None:
        self._lifecycle, self._waits, self._permits = lifecycle, waits, permits
        self.threads: dict[int, ProgramThread] = {}
        self.fresh: dict[int, FreshChild] = {}
        self.statuses: dict[int, int] = {}
        self.failures = Failures()
        self.held: list[ProgramThread] = []
        self._dying: dict[int, ProgramThread] = {}
        self.unsupervised = Unsupervised(waits, lifecycle.new_process)

    def resume_thread(self, thread: ProgramThread, number: int = 0) -> None:
        """Resume a stopped thread, delivering signal ``number``."""
        raise NotImplementedError

    def are_any(self) -> bool:
        """Return whether the program has a thread that wait(2) has not reaped."""
        return bool(self.threads or self._dying or self.fresh or self.unsupervised.processes)

    def find(self, pid: int) -> ProgramThread | None:
        """Return a thread with this id, or of the process with this id."""
        if pid in self.fresh:
            return self._grow(pid)
        for thread in self.threads.values():
            if pid in (thread.tid, thread.process.pid):
                return thread
        return None

    # --- births ---------------------------------------------------------------------------------

    def add(self, thread: ProgramThread) -> None:
        """Add the first thread of a program, stopped."""
        self._know(thread)

    def _know(self, thread: ProgramThread) -> None:
        self.threads[thread.tid] = thread
        self._waits.places[thread.tid] = thread.place

    def _born(self, parent: ProgramThread, event: int) -> None:
        tid = parent.event_message(event)
        if tid not in self.threads and tid not in self.fresh:  # else it was taken for an orphan
            self._begin(tid, parent, event, _clone_flags(parent))

    def _begin(self, tid: int, parent: ProgramThread, event: int, flags: int) -> None:
        """Adopt and resume the thread that ``parent`` has made."""
        status = self._waits.first_stop(tid)
        if status is None:
            return
        stop = decode_stop(status)
        begins = stop.event == abi.PTRACE_EVENT_STOP and stop.signal not in GROUP_STOPS
        try:
            if begins and self._is_fresh(tid, parent, event, flags):
                return
            thread = self._child(tid, parent, event, flags)
        except Exception as error:
            self.failed(parent.process.pid if flags & abi.CLONE_THREAD else tid, tid, error)
            return
        if begins:
            self.resume_thread(thread)
        else:
            thread.pending.append(stop)
            self.held.append(thread)

    def _child(self, tid: int, parent: ProgramThread, event: int, flags: int) -> ProgramThread:
        """Add the thread that ``parent`` has made; it is stopped before its first step."""
        lifecycle = self._lifecycle
        if flags & abi.CLONE_THREAD:
            process, shares = parent.process, True
        else:
            process = lifecycle.new_process(tid, parent.process)
            shares = bool(flags & abi.CLONE_VM) or event == abi.PTRACE_EVENT_VFORK
        image = parent.image if shares else lifecycle.fork_image(tid, parent.image)
        thread = lifecycle.new_thread(tid, process, image)
        self._know(thread)
        thread.announces_end = parent.announces_end
        if flags & abi.CLONE_THREAD:  # the kernel reports the end of a leader after that of others
            parent.announce_end()
            thread.announce_end()
        if shares:
            for other in image.threads.values():
                other.stop_after_call()
        # The kernel copies filters.  What fork has copied may have been made before the filter was.
        thread.watched = shares and parent.watched
        if not shares:
            image.current = thread
            lifecycle.adopt_fork(thread)
        return thread

    def _is_fresh(self, tid: int, parent: ProgramThread, event: int, flags: int) -> bool:
        """Resume a child that ``parent`` has made if the child can be fresh; return whether."""
        if event != abi.PTRACE_EVENT_FORK or flags & abi.CLONE_VM or parent.announces_end:
            return False
        child = self._lifecycle.fork_fresh(tid, parent)
        if child is None:
            return False
        self.fresh[tid] = child
        self._lifecycle.before_resume()
        kernel.try_ptrace(abi.PTRACE_CONT, tid, 0, 0)  # or it has been killed
        return True

    def _grow(self, tid: int) -> ProgramThread:
        """Make the objects of a fresh child, which may be running, or has ended."""
        child, lifecycle = self.fresh.pop(tid), self._lifecycle
        image = lifecycle.fork_image(tid, child.copied)
        thread = lifecycle.new_thread(tid, child.process, image)
        self._know(thread)
        thread.running = True
        return thread

    def _fresh_event(self, tid: int, status: int) -> ProgramThread | None:
        """Handle a stop or an end of a fresh child: return its thread, if there is more to do."""
        ends = os.WIFEXITED(status) and not (self._waits.unreported or self._waits.kept)
        if not ends:  # one that was killed may have been inside fork
            return self._grow(tid)
        process = self.fresh.pop(tid).process
        self._reaped(tid, process, status)
        self._released(tid, partial(self._lifecycle.fresh_ended, tid))
        return None

    # --- execve ---------------------------------------------------------------------------------

    def executed(self, thread: Thread, process: Process) -> Callable[[], None]:
        """Adopt the program of ``thread``, stopped by its execve; return what resumes it."""
        if is_32_bit(thread):
            self.unsupervised.add(thread.tid, process)
            return partial(self.unsupervised.resume, thread.tid)
        return partial(self.resume_thread, self._lifecycle.exec_image(thread.tid, process))

    def _exec(self, thread: ProgramThread) -> None:
        """Handle the event of execve: other threads have ended, this one has the leader's id."""
        process = thread.process
        known = [*self.threads.values(), *self._dying.values()]
        former = [other for other in known if other.process is process and other is not thread]
        if thread.announces_end:  # it has had other threads; they have been killed
            self._adopt_orphans(thread, killed=True)
        for other in former:
            self._die(other)
            self._forget(other)
        self._die(thread)
        if thread.image.may_be_uninvolved:
            thread.end_silently()
        if is_32_bit(thread):
            finish_exec(thread)  # for another program the first calls in its name do that
        self._forget(thread)
        try:
            self.executed(thread, process)()
        except Exception:
            kill(process.pid)  # the loop knows no thread of it that it could serve
            raise

    # --- ends -----------------------------------------------------------------------------------

    def failed(self, pid: int, tid: int, error: Exception) -> None:
        """End the process of a thread that could not be served, unless the thread had ended."""
        if isinstance(error, Gone):
            self._note(error)
        elif isinstance(error, OSError | struct.error) and self._waits.has_moved(tid):
            self._note(Gone(tid))  # the thread ended after the stop that was being handled
        else:
            self.failures.end_process(pid, error)

    def image_failed(self, image: ProcessImage, error: Exception) -> None:
        """End the processes of an address space in which calls have failed."""
        for thread in list(image.threads.values()):
            if thread.running:  # it has left its stop because we resumed it, not by its end
                self.failures.end_process(thread.process.pid, error)
            else:
                self.failed(thread.process.pid, thread.tid, error)

    def _note(self, gone: Gone) -> None:
        """Handle the end of a thread during a request to it."""
        thread = self.threads.get(gone.tid)
        if thread is not None:
            thread.process.ended_in_fork = True  # nothing has told in which system call it was
            self._die(thread)

    def _die(self, thread: ProgramThread) -> None:
        """Do the first step of a thread's end: it runs no more code of the program."""
        if self.threads.get(thread.tid) is not thread:
            return
        del self.threads[thread.tid], self._waits.places[thread.tid]
        self._waits.asked.pop(thread.tid, None)
        self._dying[thread.tid] = thread
        self._permits.ended(thread)
        self._ended(thread, self._lifecycle.thread_died)

    def _announced_end(self, thread: ProgramThread) -> None:
        """Do the first step at the event of a thread's end; the child of a fork may be left."""
        from softsgx.engines.native.tracing.orphans import FORKS

        try:
            inside_fork = thread.load().orig_rax in FORKS
        except Gone:  # it was let go already
            inside_fork = True
        thread.process.ended_in_fork |= inside_fork
        self._die(thread)

    def _gone(self, thread: ProgramThread, status: int) -> None:
        """Do the second step: wait(2) has reaped it with this status."""
        self._reaped(thread.tid, thread.process, status)
        self._die(thread)
        if thread.tid == thread.process.pid:
            killed = os.WIFSIGNALED(status) or thread.process.ended_in_fork
            if killed or self._waits.unreported or self._waits.kept:
                self._adopt_orphans(thread, killed=killed)
        self._forget(thread)

    def _reaped(self, tid: int, process: Process, status: int) -> None:
        if tid == process.pid:
            self.statuses[tid] = status
            self.failures.reaped(tid)

    def _forget(self, thread: ProgramThread) -> None:
        if self._dying.get(thread.tid) is thread:
            del self._dying[thread.tid]
            self._ended(thread, self._lifecycle.thread_gone)

    def _ended(self, thread: ProgramThread, tell: Callable[[ProgramThread], None]) -> None:
        """Report the end of a thread to ``tell``; an exception there ends no process."""
        self._released(thread.tid, partial(tell, thread))

    def _released(self, tid: int, release: Callable[[], None]) -> None:
        try:
            release()
        except Exception as error:
            self.failures.note(f"thread {tid} has ended: {error!r} in releasing it", error)

    def kill(self) -> None:
        """End every process, and wait until it is gone."""
        ignored = self.unsupervised.processes
        supervised = {thread.process.pid for thread in self.threads.values()}
        others = {process.pid for process in ignored.values()}
        for pid in supervised | others | self.fresh.keys() | set(self._waits.unreported):
            kill(pid)
        while self.are_any():
            try:
                event = self._waits.next()
            except ChildProcessError:
                return
            if event is None:
                continue
            tid, status, _fetched = event
            thread = self.threads.get(tid) or self._dying.get(tid)
            if not os.WIFSTOPPED(status):
                ignored.pop(tid, None)
                self.fresh.pop(tid, None)
                if thread is not None:
                    self._gone(thread, status)
            else:
                kill(tid)  # it may be a child whose event has not arrived yet
                let_end(tid)

    # --- children that no event reports ---------------------------------------------------------

    def _adopt_orphans(self, parent: ProgramThread, *, killed: bool) -> None:
        """Adopt the children of a process whose threads have ended without reporting them.

        Args:
            parent: one of these threads; the loop still knows its address space.
            killed: whether such a child may exist that has not stopped yet.
        """
        from softsgx.engines.native.tracing.orphans import has_copy_of, shares_memory

        for tid in self._orphans_of(parent.process, killed=killed):
            try:
                if has_copy_of(tid, parent.image.vdso_base):
                    flags = abi.CLONE_VM if shares_memory(tid, parent) else 0
                    self._begin(tid, parent, abi.PTRACE_EVENT_FORK, flags)
            except Exception as error:
                self.failed(tid, tid, error)

    def _adopt_32_bit_orphans(self, tid: int, process: Process, *, killed: bool) -> None:
        """As :meth:`_adopt_orphans`, when a thread of a 32-bit program has ended."""
        from softsgx.engines.native.tracing.orphans import executes_32_bit

        if tid != process.pid:  # nothing tells in which call it was
            process.ended_in_fork = True
            return
        killed |= process.ended_in_fork
        if killed or self._waits.unreported or self._waits.kept:
            for orphan in self._orphans_of(process, killed=killed):
                if executes_32_bit(orphan):
                    self.unsupervised.adopt(orphan, process)

    def _orphans_of(self, process: Process, *, killed: bool) -> list[int]:
        """Return the ids of processes that no event reports, now that ``process`` has ended."""
        from softsgx.engines.native.tracing.orphans import orphans

        unsupervised = self.unsupervised.processes
        known = self.threads.keys() | self._dying.keys() | unsupervised.keys() | self.fresh.keys()
        living = {thread.process.pid for thread in self.threads.values()} | self.fresh.keys()
        living |= {other.pid for other in unsupervised.values()}
        living.discard(process.pid)
        return orphans(self._waits, known, living, killed=killed)

    def _unsupervised(self, tid: int, status: int) -> None:
        process = self.unsupervised.processes[tid]
        if not os.WIFSTOPPED(status):
            del self.unsupervised.processes[tid]
            self._reaped(tid, process, status)
            self._adopt_32_bit_orphans(tid, process, killed=os.WIFSIGNALED(status))
            return
        try:
            if self.unsupervised.stopped(tid, status) is not None:
                self.executed(Thread(tid, self._waits), process)()
        except Exception as error:
            self.failed(process.pid, tid, error)


def _clone_flags(parent: ProgramThread) -> int:
    regs = parent.load()
    if regs.orig_rax == abi.SYS_CLONE:
        return regs.rdi
    if regs.orig_rax == abi.SYS_CLONE3:
        return int.from_bytes(parent.image.read(regs.rdi, 8), "little")
    return 0
