"""The tracer's loop: waits for stops of the program's threads and passes each to its handler.

The loop and all handlers run in one OS thread.  A stopped thread of the program stays stopped until
the loop, or the code that holds it, resumes it; its further stops are kept in ``pending``.

A thread ends in two steps.  It *dies* when it stops running code of the program: at the event of
its exit, or when a ptrace request or wait(2) reports the end, possibly while the loop serves
another thread.  Then it leaves its enclave, and the loop makes no more requests to it.  It is
*gone* when wait(2) has reaped it: the kernel has released its resources, and the loop, between two
stops, releases those that the supervisor holds for it.

An exception while a thread is served, or while it is stopped for another thread, ends the process
of that thread, and no other (see :mod:`.failures`).

Source:
    ptrace(2).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from functools import partial

from softsgx.engines.native import abi
from softsgx.engines.native.faults.transitions import Transitions
from softsgx.engines.native.tracing.failures import Failures, kill
from softsgx.engines.native.tracing.filters import watch_devices
from softsgx.engines.native.tracing.lifecycle import Lifecycle
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import Process, ProgramThread, Trap
from softsgx.engines.native.tracing.start import finish_exec
from softsgx.engines.native.tracing.tracee import Gone, Stop, Thread, decode_stop
from softsgx.engines.native.tracing.unsupervised import Unsupervised, is_32_bit
from softsgx.engines.native.tracing.waits import Waits, let_end
from softsgx.engines.native.vdso import state_jumps

__all__ = ["Loop"]

_NO_CALL = (1 << 64) - 1
_TWO_QWORDS = struct.Struct("<QQ")
_EXECVES = frozenset({abi.SYS_EXECVE, abi.SYS_EXECVEAT})
_GROUP_STOPS = frozenset({abi.SIGSTOP, abi.SIGTSTP, abi.SIGTTIN, abi.SIGTTOU})

Handler = Callable[[ProgramThread], "int | None"]
"""Emulates a system call: returns its result or -ERESTARTSYS; ``None``: the kernel executes it."""


class Loop:
    """See the module.

    Args:
        lifecycle: receives the begin and the end of threads, processes and address spaces.
        waits: receives stops and ends.
        transitions: handles signals and ENCLU.
        calls: handlers of system calls that stop, by number.

    Attributes:
        threads: living threads by id.
        statuses: exit status of each process that has ended, as wait(2) encodes it.
        failures: exceptions that are bugs of softsgx.
        unsupervised: threads of 32-bit programs.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        waits: Waits,
        transitions: Transitions,
        calls: dict[int, Handler],
    ) -> None:
        self._lifecycle, self._waits = lifecycle, waits
        self._transitions, self._calls = transitions, calls
        self.threads: dict[int, ProgramThread] = {}
        self.statuses: dict[int, int] = {}
        self.failures = Failures()
        self._before_resume, self._background = lifecycle.before_resume, lifecycle.background
        self._permits = transitions.permits
        self._later: list[ProgramThread] = []
        self._has_timed_work = True
        self._dying: dict[int, ProgramThread] = {}
        self.unsupervised = Unsupervised(waits, lifecycle.new_process)

    def add(self, thread: ProgramThread) -> None:
        """Add the first thread of a program, stopped."""
        self._know(thread)

    def _know(self, thread: ProgramThread) -> None:
        self.threads[thread.tid] = thread
        self._waits.places[thread.tid] = thread.place

    def executed(self, thread: Thread, process: Process) -> Callable[[], None]:
        """Adopt the program of ``thread``, stopped by its execve; return what resumes it."""
        if is_32_bit(thread):
            self.unsupervised.add(thread.tid, process)
            return partial(self.unsupervised.resume, thread.tid)
        return partial(self.resume_thread, self._lifecycle.exec_image(thread.tid, process))

    def run(self) -> None:
        """Serve the program until its last thread is gone."""
        self._has_timed_work = self._lifecycle.has_timed_work()
        while self.threads or self._dying or self.unsupervised.processes:
            until_ns = self._between()
            thread = self._next_held()
            if thread is not None:
                if thread.pending and self.threads.get(thread.tid) is thread:
                    self._guard(thread, thread.pending.pop(0))
                continue
            try:
                event = self._waits.next(until_ns)
            except ChildProcessError:
                break
            if event is not None:
                self._event(*event)

    def _between(self) -> int | None:
        """As :meth:`Lifecycle.between`."""
        return self._lifecycle.between() if self._has_timed_work else None

    def _next_held(self) -> ProgramThread | None:
        """Return a held thread whose stop the loop must handle now."""
        return self._later.pop() if self._later else None

    def resume_thread(self, thread: ProgramThread, number: int = 0) -> None:
        """Resume a stopped thread, delivering signal ``number``."""
        image = thread.image
        if thread.mid_call:  # the thread stops again at the end of the call
            image.current = None
            thread.running = thread.in_call = True
            self._go(thread, number)
            return
        image.current = thread
        if thread.borrowable:
            # The thread is stopped: ksgxd evicts now, before its next fault needs a page.
            self._background()
        if thread.kicked:
            thread.kicked = False
            if not number and not image.strict:  # in strict mode ERESUME waits for its turn
                number = self._transitions.resumed(thread)
        self._before_resume()
        image.flush()
        self._permits.going(thread)
        trap, thread.outgoing = thread.outgoing, None
        thread.running = True
        image.current = None
        if number and trap is not None:
            thread.set_siginfo(trap.info)
        if number and (trap or thread.process.guarded) and thread.handles(number):
            self._into_handler(thread, number, trap)
            return
        if number and thread.survives_fault(number):
            kill(thread.process.pid)
        self._go(thread, number)

    def _go(self, thread: ProgramThread, number: int = 0) -> None:
        """Resume a thread; the deferred work for it has been done."""
        thread.resume(number)

    def _into_handler(self, thread: ProgramThread, number: int, trap: Trap | None) -> None:
        """Deliver a signal to its handler in a process with enclaves.

        The signal frame describes the exception of the program, not the supervisor's stop.
        Handlers enter enclaves and execute CPUID, which trap here, so the loop unblocks fault
        signals in them: when a trap forces a blocked signal, the kernel resets its handler.
        """
        stop = thread.step(number)
        entered = stop.signal == abi.SIGTRAP and not stop.event and not stop.syscall
        if not entered or thread.load().rdi != number:
            # The stack has no room for the frame, or the thread has stopped for another reason.
            thread.running = False
            thread.pending.append(stop)
            self._later.append(thread)
            return
        mask = thread.sigmask()
        if mask & abi.FAULT_SIGNALS:
            thread.set_sigmask(mask & ~abi.FAULT_SIGNALS)
        if trap is not None:
            memory, frame = thread.image.memory_fd, thread.regs.rdx
            os.pwrite(memory, _TWO_QWORDS.pack(trap.error, trap.vector), frame + abi.UCONTEXT_ERR)
            if trap.address is not None:
                os.pwrite(memory, trap.address.to_bytes(8, "little"), frame + abi.UCONTEXT_CR2)
        self._go(thread)

    def hold(self, thread: ProgramThread) -> bool:
        """Stop a running thread; the loop handles the stop later.  ``False``: it has died."""
        if not thread.running:
            return True
        try:
            thread.interrupt()
            stop = self._straighten(thread, thread.behind(thread.wait()))
        except Exception as error:
            self.failed(thread.process.pid, thread.tid, error)
            return False
        thread.running = False
        thread.pending.append(stop)
        self._later.append(thread)
        return True

    def _straighten(self, thread: ProgramThread, stop: Stop) -> Stop:
        """Move a stopped thread to where it is by the program's code; return why it is there."""
        if stop.signal == abi.SIGBUS:
            self._permits.report(thread)
            if thread.cpu.inside is not None and thread.siginfo().code == abi.BUS_ADRERR:
                return stop  # stubs do not touch enclave memory inside
        self._permits.stopped(thread)
        image = thread.image
        cpuid_stubs = image.cpuid_stubs
        if cpuid_stubs is None and image.path_stubs is None and not image.state_stubs:
            return stop
        rip = thread.load().rip
        if cpuid_stubs is not None and rip in cpuid_stubs.entries:
            cpuid_stubs.straighten(thread)
        if not 0 <= rip - image.vdso_base < image.vdso.end:
            return stop
        if image.state_stubs:
            state_jumps.straighten(thread)
        if cpuid_stubs is not None:
            cpuid_stubs.straighten(thread)
        if image.path_stubs is not None and image.path_stubs.straighten(thread):
            return Stop(abi.SIGTRAP, abi.PTRACE_EVENT_STOP, False)  # the fault is not the program's
        return stop

    def kick(self, image: ProcessImage) -> None:
        """Make every thread of ``image`` that is inside an enclave leave it."""
        self._permits.settle()
        for thread in list(image.threads.values()):
            if thread.cpu.inside is not None and not self._transitions.stays_inside(thread):
                self._take_out(thread)

    def interrupt(self, thread: ProgramThread) -> bool:
        """Interrupt a thread that is inside; the program executes the code at its AEP.

        Returns:
            Whether it has left its enclave because of this call, and has not died.
        """
        left = self._take_out(thread)
        thread.kicked = False
        return left

    def _take_out(self, thread: ProgramThread) -> bool:
        if not self.hold(thread) or thread.cpu.inside is None:
            return False
        stop = thread.pending[0] if thread.pending else None
        try:
            if self._transitions.kicked(thread, stop):
                thread.pending = [Stop(abi.SIGTRAP, abi.PTRACE_EVENT_STOP, False)]
        except Exception as error:  # its process ends, so the thread leaves its enclave
            self.failed(thread.process.pid, thread.tid, error)
            return False
        return True

    # --- events ---------------------------------------------------------------------------------

    def _event(self, tid: int, status: int, fetched: int) -> None:
        thread = self.threads.get(tid) or self._dying.get(tid)
        if tid in self.unsupervised.processes:
            self._unsupervised(tid, status)
        elif thread is None:
            self._waits.keep_first(tid, status)
        elif not os.WIFSTOPPED(status):
            self._gone(thread, status)
        else:
            thread.running = thread.unstoppable = False
            self._guard(thread, thread.stopped(status, fetched))

    def _unsupervised(self, tid: int, status: int) -> None:
        process = self.unsupervised.processes[tid]
        if not os.WIFSTOPPED(status):
            del self.unsupervised.processes[tid]
            self._reaped(tid, process, status)
            return
        try:
            if self.unsupervised.stopped(tid, status) is not None:
                self.executed(Thread(tid, self._waits), process)()
        except Exception as error:
            self.failed(process.pid, tid, error)

    def _guard(self, thread: ProgramThread, stop: Stop) -> None:
        image = thread.image
        image.current = thread
        try:
            if stop.event == abi.PTRACE_EVENT_EXIT:
                self._die(thread)
                let_end(thread.tid)
                return
            if stop.event == abi.PTRACE_EVENT_STOP:
                stop = thread.behind(stop)
            stop = self._straighten(thread, stop)
            unwatched = image.watched and not (thread.watched or thread.mid_call)
            if unwatched or not self._transitions.only_crosses(thread, stop):
                self._permits.settle()
            if unwatched:
                watch_devices(thread)  # another process has opened a device and maps it here
            self._handle(thread, stop)
        except Exception as error:
            self.failed(thread.process.pid, thread.tid, error)
        finally:
            image.current = None

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

    def _handle(self, thread: ProgramThread, stop: Stop) -> None:
        if not stop.event and not stop.syscall:
            self.resume_thread(thread, self._transitions.signal(thread, stop.signal))
        elif stop.event == abi.PTRACE_EVENT_SECCOMP:
            self._call(thread)
        elif stop.event == abi.PTRACE_EVENT_STOP:
            if stop.signal in _GROUP_STOPS:
                thread.running = True
                thread.listen()
            else:
                self.resume_thread(thread)
        elif stop.event in (abi.PTRACE_EVENT_FORK, abi.PTRACE_EVENT_VFORK, abi.PTRACE_EVENT_CLONE):
            try:
                self._born(thread, stop.event)
            finally:
                thread.unstoppable = stop.event == abi.PTRACE_EVENT_VFORK
                self.resume_thread(thread)
        elif stop.event == abi.PTRACE_EVENT_EXEC:
            self._exec(thread)
        else:
            self.resume_thread(thread)

    def _call(self, thread: ProgramThread) -> None:
        if thread.again:
            thread.again = False
            self._make_call(thread)
            return
        number = thread.load().orig_rax
        if number == abi.SYS_SOFTSGX_EENTER:
            self._transitions.enter(thread)
            self.resume_thread(thread)
            return
        if thread.cpu.inside is not None:
            self.resume_thread(thread, self._transitions.call_inside(thread))
            return
        handler = self._calls.get(number)
        result = None if handler is None else handler(thread)
        thread.user_memory = None
        if result is None:
            self._make_call(thread)
            return
        if result == -abi.ERESTARTSYS:
            thread.restart_syscall()
        else:
            thread.skip_syscall(result)
        self.resume_thread(thread)

    def _make_call(self, thread: ProgramThread) -> None:
        """Let the kernel execute the call of this stop."""
        # Deferred work may make calls in the thread, which use up the stop.
        self._lifecycle.before_resume()
        thread.image.flush()
        if not thread.at_call:
            regs = thread.load()
            regs.rip, regs.rax, regs.orig_rax = regs.rip - 2, regs.orig_rax, _NO_CALL
            thread.store()
            thread.again = True
        elif thread.load().orig_rax in _EXECVES:
            thread.in_call = thread.unstoppable = True
        self.resume_thread(thread)

    # --- births and deaths ----------------------------------------------------------------------

    def _born(self, parent: ProgramThread, event: int) -> None:
        tid = parent.event_message()
        flags = _clone_flags(parent)
        status = self._waits.first_stop(tid)
        if status is None:
            return
        try:
            thread = self._child(tid, parent, event, flags)
        except Exception as error:
            self.failed(parent.process.pid if flags & abi.CLONE_THREAD else tid, tid, error)
            return
        stop = decode_stop(status)  # calls have been made in its name since
        if stop.event == abi.PTRACE_EVENT_STOP and stop.signal not in _GROUP_STOPS:
            self.resume_thread(thread)
        else:
            thread.pending.append(stop)
            self._later.append(thread)

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
        # The kernel copies filters.  What fork has copied may have been made before the filter was.
        thread.watched = shares and parent.watched
        if not shares:
            image.current = thread
            lifecycle.adopt_fork(thread)
        return thread

    def _exec(self, thread: ProgramThread) -> None:
        """Handle the event of execve: other threads have ended, this one has the leader's id."""
        process = thread.process
        known = [*self.threads.values(), *self._dying.values()]
        former = [other for other in known if other.process is process and other is not thread]
        for other in former:
            self._die(other)
            self._forget(other)
        self._die(thread)
        if is_32_bit(thread):
            finish_exec(thread)  # for another program the first calls in its name do that
        self._forget(thread)
        self.executed(thread, process)()

    def _note(self, gone: Gone) -> None:
        """Handle the end of a thread during a request to it."""
        thread = self.threads.get(gone.tid)
        if thread is not None:
            self._die(thread)

    def _die(self, thread: ProgramThread) -> None:
        """Do the first step of a thread's end: it runs no more code of the program."""
        if self.threads.get(thread.tid) is not thread:
            return
        del self.threads[thread.tid], self._waits.places[thread.tid]
        self._dying[thread.tid] = thread
        self._permits.ended(thread)
        self._ended(thread, self._lifecycle.thread_died)

    def _gone(self, thread: ProgramThread, status: int) -> None:
        """Do the second step: wait(2) has reaped it with this status."""
        self._reaped(thread.tid, thread.process, status)
        self._die(thread)
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
        try:
            tell(thread)
        except Exception as error:
            self.failures.note(f"thread {thread.tid} has ended: {error!r} in releasing it", error)

    def kill(self) -> None:
        """End every process, and wait until it is gone."""
        ignored = self.unsupervised.processes
        supervised = {thread.process.pid for thread in self.threads.values()}
        others = {process.pid for process in ignored.values()}
        for pid in supervised | others | set(self._waits.unreported):
            kill(pid)
        while self.threads or self._dying or ignored:
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
                if thread is not None:
                    self._gone(thread, status)
            else:
                kill(tid)  # it may be a child whose event has not arrived yet
                let_end(tid)


def _clone_flags(parent: ProgramThread) -> int:
    regs = parent.load()
    if regs.orig_rax == abi.SYS_CLONE:
        return regs.rdi
    if regs.orig_rax == abi.SYS_CLONE3:
        return int.from_bytes(parent.image.read(regs.rdi, 8), "little")
    return 0
