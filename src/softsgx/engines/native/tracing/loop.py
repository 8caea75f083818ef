"""The tracer's loop: waits for stops of the program's threads and passes each to its handler.

The loop and all handlers run in one OS thread.  A stopped thread of the program stays stopped until
the loop, or the code that holds it, resumes it; its further stops are kept in ``pending``.

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

from softsgx import compiled
from softsgx.engines.native import abi
from softsgx.engines.native.abi import UserRegs
from softsgx.engines.native.faults.plain import PlainFaults
from softsgx.engines.native.faults.transitions import Transitions
from softsgx.engines.native.memory.store import NativeStore
from softsgx.engines.native.tracing.failures import kill
from softsgx.engines.native.tracing.fault_events import MOST_IN_A_ROW, FaultEvent
from softsgx.engines.native.tracing.filters import watch_devices
from softsgx.engines.native.tracing.lifecycle import Lifecycle
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread, Trap
from softsgx.engines.native.tracing.tasks import GROUP_STOPS, Tasks
from softsgx.engines.native.tracing.tracee import Stop
from softsgx.engines.native.tracing.waits import Waits, let_end
from softsgx.engines.native.vdso import state_jumps
from softsgx.runtime import InlineRuntime

__all__ = ["Loop"]

_NO_CALL = (1 << 64) - 1
_TWO_QWORDS = struct.Struct("<QQ")
_SIGCHLD_STOP = abi.SIGCHLD << 8 | 0x7F
_SECCOMP_STOP = abi.PTRACE_EVENT_SECCOMP << 16 | abi.SIGTRAP << 8 | 0x7F
_EXECVES = frozenset({abi.SYS_EXECVE, abi.SYS_EXECVEAT})

Handler = Callable[[ProgramThread], "int | None"]
"""Emulates a system call: returns its result or -ERESTARTSYS; ``None``: the kernel executes it."""


class Loop(Tasks):
    """See the module.

    Args:
        lifecycle: receives the begin and the end of threads, processes and address spaces.
        waits: receives stops and ends.
        transitions: handles signals and ENCLU.
        calls: handlers of system calls that stop, by number.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        waits: Waits,
        transitions: Transitions,
        calls: dict[int, Handler],
    ) -> None:
        super().__init__(lifecycle, waits, transitions.permits)
        self._transitions, self._calls = transitions, calls
        self._before_resume, self._background = lifecycle.before_resume, lifecycle.background
        self._plain: PlainFaults | None = None
        self._faults_first = False  # of the two kinds of events, in turn
        self._has_timed_work = True

    def serve_plain_faults(self, store: NativeStore, runtime: InlineRuntime) -> None:
        """Serve faults of :mod:`~softsgx.engines.native.faults.plain` on the short path."""
        self._plain = PlainFaults(
            self, self._waits, self._transitions, self._permits, store, runtime
        )

    def resolves_faults_of_waiting_threads(self) -> bool:
        """Return whether most faults are resolved without a stop, where they are events."""
        return self._plain is not None and not self._lifecycle.has_timed_work()

    def run(self) -> None:
        """Serve the program until its last thread is gone."""
        self._has_timed_work = self._lifecycle.has_timed_work()
        plain = None if self._has_timed_work else self._plain
        in_a_row = 0
        while self.are_any():
            until_ns = self._between()
            thread = self._next_held()
            if thread is not None:
                if thread.pending and self.threads.get(thread.tid) is thread:
                    self.guard(thread, thread.pending.pop(0))
                continue
            try:
                first = self._lifecycle.served_first()
                if first is not None:
                    event = self._next_fairly(first, plain, until_ns)
                elif plain is not None and not self._waits.kept:
                    event = plain.next()
                else:
                    event = self._waits.next(until_ns)
            except ChildProcessError:
                break
            if event is not None:
                self._event(*event)
            in_a_row += 1
            if in_a_row >= MOST_IN_A_ROW and not self._waits.kept:
                in_a_row = 0
                self._take_turns(plain)

    def _take_turns(self, plain: PlainFaults | None) -> None:
        """Let each thread that waits now be served before one that stops later.

        Without that, the threads whose stops wait(2) reports first can keep others from being
        served, and stops can keep faults of threads that wait from being served.
        """
        waits = self._waits
        waits.look_now()
        for _ in range(MOST_IN_A_ROW):
            fault = waits.fault_now()
            if fault is None:
                break
            self._resolve(fault, plain)
        waits.keep_all()

    def _resolve(self, fault: FaultEvent, plain: PlainFaults | None) -> None:
        """See to the fault of a thread that waits."""
        if plain is not None:
            plain.resolve(fault)
        else:
            self._waits.stop_at(fault)

    def _next_fairly(
        self, first: ProgramThread, plain: PlainFaults | None, until_ns: int | None
    ) -> tuple[int, int, int] | None:
        """As :meth:`Waits.next`, while threads stand back for ``first``: its stops come first.

        wait(2) reports the stops of some threads first, and they come before faults of threads
        that wait.  Those that stand back stop again and again, so others would not be served.
        """
        waits = self._waits
        event = waits.stop_of(first.tid)
        if event is not None:
            return event
        self._faults_first = not self._faults_first
        fault = waits.fault_now() if self._faults_first else None
        report = waits.next_or_fault(until_ns) if fault is None else fault
        if not isinstance(report, FaultEvent):
            return report
        self._resolve(report, plain)
        return None

    def _between(self) -> int | None:
        """As :meth:`Lifecycle.between`."""
        return self._lifecycle.between() if self._has_timed_work else None

    def _next_held(self) -> ProgramThread | None:
        """Return a held thread whose stop the loop must handle now."""
        return self.held.pop() if self.held else None

    def background(self) -> None:
        """As :meth:`Lifecycle.background`."""
        self._background()

    def resume_thread(self, thread: ProgramThread, number: int = 0) -> None:
        """Resume a stopped thread, delivering signal ``number``."""
        image = thread.image
        if thread.mid_call:
            image.current = None
            # Where calls may have to be made in its name, it stops at the end of this one.
            shared = thread.unstoppable and len(image.threads) > 2
            thread.in_call = shared or not image.uninvolved
            if not thread.in_call:
                self._before_resume()
            thread.running = True
            self._go(thread, number)
            return
        image.current = thread
        if thread.pause_ns:
            self._transitions.pauses.going(thread, number)
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
        if number and (trap or thread.process.guarded) and self._has_handler(thread, number, trap):
            self._into_handler(thread, number, trap)
            return
        if number and thread.survives_fault(number):
            kill(thread.process.pid)
        self._go(thread, number)

    def _go(self, thread: ProgramThread, number: int = 0) -> None:
        """Resume a thread; the deferred work for it has been done."""
        thread.resume(number)

    def _has_handler(self, thread: ProgramThread, number: int, trap: Trap | None) -> bool:
        """Return whether a signal has a handler to run.

        What is known of the signal of another thread or of a timer saves a look, which costs more
        than a stop.  :meth:`_into_handler` finds out if the program has changed that since.
        """
        handled = thread.process.handled
        if thread.pause_ns:
            return False  # the kernel keeps it pending
        if trap is None and number in handled:
            return True
        if not thread.handles(number):
            return False
        handled.add(number)
        return True

    def _into_handler(self, thread: ProgramThread, number: int, trap: Trap | None) -> None:
        """Deliver a signal to its handler in a process with enclaves.

        The signal frame describes the exception of the program, not the supervisor's stop.
        Handlers enter enclaves and execute CPUID, which trap here, so the loop unblocks fault
        signals in them: when a trap forces a blocked signal, the kernel resets its handler.
        """
        stop = thread.step(number)
        stepped = stop.signal == abi.SIGTRAP and not stop.event and not stop.syscall
        code = thread.siginfo().code if stepped else 0
        if code == abi.TRAP_TRACE:  # an instruction: the signal has no effect any more
            thread.process.handled.discard(number)
            self._go(thread)
            return
        if code != abi.SIGTRAP or thread.load().rdi != number:
            # The stack has no room for the frame, or the thread has stopped for another reason.
            thread.running = False
            thread.pending.append(stop)
            self.held.append(thread)
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
        self.held.append(thread)
        return True

    def _straighten(self, thread: ProgramThread, stop: Stop) -> Stop:
        """Move a stopped thread to where it is by the program's code; return why it is there."""
        if thread.mid_call:
            return stop
        if stop.signal == abi.SIGBUS:
            self._permits.report(thread)
            if thread.cpu.inside is not None and thread.siginfo().code == abi.BUS_ADRERR:
                return stop  # stubs do not touch enclave memory inside
        self._permits.stopped(thread)
        image = thread.image
        cpuid_stubs = image.cpuid_stubs
        if cpuid_stubs is None and image.path_stubs is None and not image.has_state_stubs:
            return stop
        rip = thread.load().rip
        if cpuid_stubs is not None and cpuid_stubs.has_entry(rip):
            cpuid_stubs.straighten(thread)
        if not 0 <= rip - image.vdso_base < image.vdso.end:
            return stop
        if image.has_state_stubs:
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
        if thread is None and tid in self.fresh:
            thread = self._fresh_event(tid, status)
            if thread is None:
                return
        if tid in self.unsupervised.processes:
            self._unsupervised(tid, status)
        elif thread is None:
            self._waits.keep_first(tid, status)
        elif not os.WIFSTOPPED(status):
            self._gone(thread, status)
        else:
            thread.running = thread.unstoppable = False
            stop = thread.stopped(status, fetched)
            passes = (status == _SECCOMP_STOP and self._passes_call(thread)) or (
                status == _SIGCHLD_STOP and self._passes(thread)
            )
            if not passes:
                self.guard(thread, stop)

    def _passes(self, thread: ProgramThread) -> bool:
        """Resume a thread that has stopped for SIGCHLD, if nothing else is to be done; else False.

        Most children of ordinary programs end with such a stop of their parents.
        """
        try:
            if not _is_plain(thread):
                return False
            self._permits.settle()
            self._background()
            self._before_resume()
            thread.running = True
            thread.resume(abi.SIGCHLD)
        except Exception as error:
            self.failed(thread.process.pid, thread.tid, error)
        return True

    def _passes_call(self, thread: ProgramThread) -> bool:
        """Serve a system call in an address space that is left alone; ``False``: it is not.

        Most stops of ordinary programs are calls that the kernel makes after a look.
        """
        image = thread.image
        try:
            if thread.again is not None or not _is_plain(thread):
                return False
            number = thread.regs.orig_rax
            if number == abi.SYS_SOFTSGX_EENTER:
                return False
            image.current = thread
            self._permits.settle()
            result = self._result(thread, number)
            if result is not None:
                self._answer(thread, result)
            elif number in _EXECVES or not (thread.at_call and image.uninvolved):
                self._make_call(thread)
            else:
                self._before_resume()
                thread.running = True
                thread.resume()
        except Exception as error:
            self.failed(thread.process.pid, thread.tid, error)
        finally:
            image.current = None
        return True

    def guard(self, thread: ProgramThread, stop: Stop) -> None:
        """Handle a stop of a thread; an exception ends its process."""
        image = thread.image
        image.current = thread
        try:
            if stop.event == abi.PTRACE_EVENT_EXIT:
                self._announced_end(thread)
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

    def _handle(self, thread: ProgramThread, stop: Stop) -> None:
        if not stop.event and not stop.syscall:
            self.resume_thread(thread, self._transitions.signal(thread, stop.signal))
        elif stop.event == abi.PTRACE_EVENT_SECCOMP:
            self._call(thread)
        elif stop.event == abi.PTRACE_EVENT_STOP:
            if stop.signal in GROUP_STOPS:
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
        regs, again = thread.load(), thread.again
        if again is not None:
            thread.again = None
            if again == _call_of(regs):
                self._make_call(thread)
                return
        number = regs.orig_rax
        if number == abi.SYS_SOFTSGX_EENTER:
            self._transitions.enter(thread)
            self.resume_thread(thread)
            return
        if thread.cpu.inside is not None:
            self.resume_thread(thread, self._transitions.call_inside(thread))
            return
        result = self._result(thread, number)
        if result is None:
            self._make_call(thread)
        else:
            self._answer(thread, result)

    def _result(self, thread: ProgramThread, number: int) -> int | None:
        """Return what a system call gives; ``None``: the kernel has to execute it."""
        handler = self._calls.get(number)
        result = None if handler is None else handler(thread)
        thread.user_memory = None
        return result

    def _answer(self, thread: ProgramThread, result: int) -> None:
        """Let a call of the thread return ``result``."""
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
            thread.again = _call_of(regs)
            regs.rip, regs.rax, regs.orig_rax = regs.rip - 2, regs.orig_rax, _NO_CALL
            thread.store()
        elif thread.load().orig_rax in _EXECVES:
            thread.in_call = thread.unstoppable = True
        self.resume_thread(thread)


def _is_plain(thread: ProgramThread) -> bool:
    """Return whether a stopped thread is where its program's code is, and nothing has to be done.

    Its address space is left alone, and it is in no stub out of which it would have to be moved.
    """
    image = thread.image
    if not image.uninvolved or thread.process.guarded:
        return False
    rip, stubs = thread.load().rip, image.cpuid_stubs
    if 0 <= rip - image.vdso_base < image.vdso.end:
        return False
    return stubs is None or not stubs.has_entry(rip)


def _call_of(regs: UserRegs) -> tuple[int, ...]:
    """Return what tells a system call from the others that a thread makes."""
    arguments = regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9
    return (regs.rip, regs.rsp, regs.orig_rax, *arguments)


if compiled.speedups is not None:
    compiled.speedups.give("Transitions", Transitions)
    compiled.speedups.give("kick_image", Loop.kick)
    compiled.speedups.give("partial", partial)
