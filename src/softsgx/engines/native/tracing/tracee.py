"""A thread of the program under ptrace: its stops, resuming it, system calls made in its name.

The module does not depend on SGX.  The thread must be in a ptrace stop for every method; all calls
come from the one OS thread that is the tracer.  What is read and set at a stop: :mod:`.stopped`.

Source:
    ptrace(2); Linux kernel/ptrace.c, kernel/seccomp.c for the order of stops.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

from softsgx.engines.native import abi, kernel, libc
from softsgx.engines.native.abi import SigInfo, UserRegs
from softsgx.engines.native.tracing.stopped import Gone, StoppedThread
from softsgx.engines.native.tracing.waits import let_end, stops_at_exit
from softsgx.errors import SoftSgxError
from softsgx.ondemand import dataclass

__all__ = ["Gone", "Stop", "Thread", "decode_stop"]

_MINUS_ONE = (1 << 64) - 1
_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
_ALL_BUT_TRAP = _MINUS_ONE ^ 1 << abi.SIGTRAP - 1
_REGS_BYTES = ctypes.sizeof(UserRegs)
_MID_CALL = frozenset(
    {
        abi.PTRACE_EVENT_FORK,
        abi.PTRACE_EVENT_VFORK,
        abi.PTRACE_EVENT_CLONE,
        abi.PTRACE_EVENT_EXEC,
        abi.PTRACE_EVENT_EXIT,
    }
)


@dataclass(slots=True, frozen=True)
class Stop:
    """Why a thread stopped: a signal, or an event (0 for none), or the end of a system call."""

    signal: int
    event: int
    syscall: bool


@cache
def decode_stop(status: int) -> Stop:
    """Decode a status of wait(2) that reports a stop."""
    signal = status >> 8 & 0xFF
    return Stop(signal & 0x7F, status >> 16, signal == abi.SIGTRAP | 0x80)


_INTERRUPTED = Stop(abi.SIGTRAP, abi.PTRACE_EVENT_STOP, False)
_FAULTED = Stop(abi.SIGBUS, 0, False)
_ALL_BUT_BUS = _MINUS_ONE ^ 1 << abi.SIGBUS - 1


class Thread(StoppedThread):
    """One thread of the program; arguments and attributes are those of the base class."""

    # --- resuming -------------------------------------------------------------------------------

    def resume(self, signal: int = 0, *, step: bool = False) -> None:
        """Resume it until its next stop; deliver ``signal`` first.

        With ``step`` it stops by SIGTRAP after one instruction, at the latest.
        """
        if self._changed or self._new_xstate is not None or self._kept is not None:
            self._prepare(signal)
        if self.waits.kept or self._ended:
            self._check_place()
        request = abi.PTRACE_SYSCALL if self.in_call else abi.PTRACE_CONT
        if step:
            request = abi.PTRACE_SINGLESTEP
        if _ptrace(request, self.tid, 0, signal) < 0:
            raise Gone(self.tid)

    def _prepare(self, signal: int) -> None:
        self.flush()
        if signal:
            self._receive_signal()
            if self._kept is not None and self._kept.signo == signal:
                self.set_siginfo(self._kept)

    def set_siginfo(self, info: SigInfo) -> None:
        """Replace the signal information that the handler receives."""
        self._receive_signal()
        self._kept = None
        self._fetched &= ~kernel.INFORMATION
        self._change(abi.PTRACE_SETSIGINFO, 0, ctypes.addressof(info))

    def step(self, signal: int = 0) -> Stop:
        """Execute one instruction, or deliver a signal, and wait for the stop after it.

        Args:
            signal: delivered first; the thread stops at the first instruction of its handler.

        Raises:
            Gone: the thread died instead.
        """
        self._prepare(signal)
        self._change(abi.PTRACE_SINGLESTEP, 0, signal)
        return self.wait()

    def listen(self) -> None:
        """Leave it in its group stop; wait(2) still reports its end."""
        self.flush()
        self.in_call = True
        if self._borrowed:  # it has left the stop: stop it again before it executes an instruction
            self.interrupt()
            self.resume()
        else:
            self._change(abi.PTRACE_LISTEN, 0, 0)

    def interrupt(self) -> None:
        """Ask a running thread to stop."""
        self._request(abi.PTRACE_INTERRUPT, 0, 0)

    def wait(self, *, executes: bool = False) -> Stop:
        """Block until this thread stops.

        Args:
            executes: whether it may execute a program.  Otherwise a program in its place is that of
                another thread, which has taken over its id.

        Raises:
            Gone: it ends instead.
        """
        self._ended = True  # until it is known that it has stopped
        try:
            status = self.waits.of(self.tid)
        except ChildProcessError:
            raise Gone(self.tid) from None
        replaced = status >> 16 == abi.PTRACE_EVENT_EXEC and not executes
        if replaced or not os.WIFSTOPPED(status):
            self.waits.keep(self.tid, status)
            raise Gone(self.tid)
        if stops_at_exit(status):
            let_end(self.tid)
            raise Gone(self.tid)
        self._ended = False
        return self.stopped(status)

    def behind(self, stop: Stop) -> Stop:
        """Return the stop of a pending fault if ``stop`` is an interrupt before it; else ``stop``.

        The kernel reports an interrupt first, with the registers of the fault.  If the supervisor
        changed them at that stop, the kernel would deliver the signal of the fault elsewhere.

        Raises:
            Gone: the thread died instead.
        """
        grouped = False
        while stop.event == abi.PTRACE_EVENT_STOP and self.fault_waits():
            grouped = stop.signal != abi.SIGTRAP
            self.resume()  # the kernel delivers the signal before the thread executes anything
            stop = self.wait()
        if grouped:
            self.interrupt()  # the kernel reports the group stop again, after the signal
        return stop

    def stopped(self, status: int, fetched: int = 0) -> Stop:
        """Record a stop that wait(2) has reported, and what was fetched with it."""
        stop = decode_stop(status)
        self._loaded, self._fetched, self._real_xstate = False, fetched, None
        self._at_signal = stop.event == 0 and not stop.syscall
        self._borrowed = False
        self._kept = None
        self.at_call = stop.event == abi.PTRACE_EVENT_SECCOMP
        self.mid_call = stop.event in _MID_CALL
        if stop.event in (0, abi.PTRACE_EVENT_STOP):
            self.in_call = False  # such stops come after the end of the call
        self._at_fault = False
        address = self.waits.asked.pop(self.tid, None) if self.waits.asked else None
        if address is not None and stop == _INTERRUPTED:
            stop = _FAULTED
            self._kept = SigInfo(signo=abi.SIGBUS, code=abi.BUS_ADRERR, addr=address)
            self._at_signal = self._at_fault = True
        return stop

    def _receive_signal(self) -> None:
        """At a stop that stands for SIGBUS: make it a stop by SIGBUS, where signals are delivered.

        The kernel merges a SIGBUS that a process sends to the thread meanwhile with this one, as it
        does with two of them.
        """
        if not self._at_fault:
            return
        self.flush()
        kept, mask = self._kept, self.sigmask()
        self.set_sigmask(_ALL_BUT_BUS)
        libc.syscall(abi.SYS_TKILL, self.tid, abi.SIGBUS)
        stop = None
        while stop is None or stop.event or stop.signal != abi.SIGBUS:
            if _ptrace(abi.PTRACE_CONT, self.tid, 0, 0) < 0:
                raise Gone(self.tid)
            stop = self.wait()  # an interrupt comes first
        self.set_sigmask(mask)
        self._kept = kept

    def skip_syscall(self, result: int) -> None:
        """At a seccomp stop with registers loaded: skip the call, and return ``result`` from it.

        The thread stays stopped.
        """
        self.regs.orig_rax = _MINUS_ONE
        self.regs.rax = result & _MINUS_ONE
        self.store()

    def restart_syscall(self) -> None:
        """At a seccomp stop with registers loaded: end the call with ERESTARTSYS.

        When the thread is resumed, the kernel restarts the call, or fails it with EINTR if it
        delivers a signal to a handler without SA_RESTART.
        """
        number = self.regs.orig_rax
        # A skipped call cannot be restarted: the thread makes a call that changes nothing instead.
        self.finish_syscall(abi.SYS_GETPID)
        self.regs.orig_rax, self.regs.rax = number, -abi.ERESTARTSYS & _MINUS_ONE
        self.store()
        # The kernel restarts the call only for a thread with a signal or an interrupt, and another
        # thread may have taken the signal.
        self.interrupt()

    def finish_syscall(self, number: int | None = None, *arguments: int) -> int:
        """At a seccomp stop with registers loaded: make the call, or another in its place.

        If the stop's own call has been made already, another one is injected.

        The argument registers have the program's values afterwards: compilers rely on that.

        Returns:
            The result; the thread is stopped after the call, registers loaded.
        """
        regs = self.regs
        kept = regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9
        if not self.at_call:
            made = regs.orig_rax if number is None else number
            return self.syscall(made, *(kept if number is None else arguments))
        if number is not None:
            regs.orig_rax = number
            self._set_arguments(arguments)
            self.store()
        self.flush()
        self._change(abi.PTRACE_SYSCALL, 0, 0)
        stop = self.wait()
        while not stop.syscall:
            # Only a fatal or group event can come before the end of the call.
            self._request(abi.PTRACE_SYSCALL, 0, 0)
            stop = self.wait()
        self.load()
        result = _signed(regs.rax)
        if number is not None:
            regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9 = kept
            self.store()
        return result

    def syscall(self, number: int, *arguments: int) -> int:
        """Make a system call in the thread's name; its registers are the same afterwards.

        The thread must not be in the middle of a system call.  It is at a signal stop, at the end
        of a call, at a seccomp stop whose call has been skipped, or at a new thread's first stop.

        Returns:
            The result; ``-errno`` for a failure.

        Raises:
            Gone: the thread died during the call.
        """
        assert self.inject_at, f"thread {self.tid} has no place to inject calls into yet"
        six = (*arguments, 0, 0, 0, 0, 0)[:5] + (arguments[5:] or (abi.OUR_CALL,))
        values = dict(zip(_ARGUMENTS, six, strict=True))
        return self.borrow(self.inject_at, self.inject_at + 3, rax=number, **values)

    def borrow(self, start: int, end: int, **registers: int) -> int:
        """Run code of our vDSO in the thread; otherwise as :meth:`syscall`.

        Args:
            start: address of its first instruction.
            end: address after the int3 that ends it.
            registers: its initial registers.

        Returns:
            RAX at its end, signed.
        """
        assert not self.mid_call, f"thread {self.tid} is borrowed in the middle of a system call"
        saved = UserRegs()
        if not self._loaded:
            self.load()
        out_of_line = self._next or self._elsewhere
        ctypes.memmove(ctypes.addressof(saved), self._regs_at, _REGS_BYTES)
        # The kernel drops the signal information of the stop; its handlers still need it.
        kept, at_signal = self._kept, self._at_signal
        if at_signal and kept is None:
            kept = SigInfo.from_buffer_copy(self.siginfo())
        self._kept, self.in_call = None, False
        mask = self.sigmask()
        # Not SIGTRAP: the kernel resets the handler of a blocked signal that it must force.
        self.set_sigmask(_ALL_BUT_TRAP)
        regs = self.regs
        regs.rip, regs.orig_rax = start, _MINUS_ONE
        for name, value in registers.items():
            setattr(regs, name, value & _MINUS_ONE)
        self.store()
        self.resume()
        stops_again = self._run_to(end)
        result = _signed(regs.rax)
        self._give_back(bytes(saved), mask, stops_again=stops_again)
        self._next, self._kept, self._at_signal = out_of_line, kept, at_signal
        return result

    def end_borrowed(self, saved: bytes, end: int, mask: int) -> None:
        """As the end of :meth:`borrow`, which other code has begun: it runs code of our vDSO.

        Args:
            saved: its registers; it was in no signal stop.
            end: as there.
            mask: its blocked signals.
        """
        self._kept, self._changed, self.in_call = None, False, False
        self._give_back(saved, mask, stops_again=self._run_to(end))
        self._kept, self._at_signal = None, False

    def _give_back(self, saved: bytes, mask: int, *, stops_again: bool) -> None:
        ctypes.memmove(self._regs_at, saved, _REGS_BYTES)
        self._loaded = True
        self.store()
        self.set_sigmask(mask)
        self._borrowed = True
        self._at_fault = False  # it has stopped by a signal since
        if stops_again:
            os.kill(self.tid, abi.SIGSTOP)

    def _run_to(self, end: int) -> bool:
        """Wait for the end of borrowed code.

        Returns:
            Whether a SIGSTOP arrived meanwhile and must be sent again.
        """
        stopped_by_signal = False
        while True:
            stop = self.wait()
            if stop.event == 0 and stop.signal == abi.SIGTRAP:
                self.load()
                if self.regs.rip == end:
                    return stopped_by_signal
            # Blocked signals do not stop it, so its own code has raised this one.
            if stop.event == 0 and stop.signal in (abi.SIGSEGV, abi.SIGBUS):
                raise SoftSgxError(
                    f"vDSO at {end:#x}: not mapped; let the program not unmap or protect it"
                )
            stopped_by_signal |= stop.event == 0 and stop.signal == abi.SIGSTOP
            self.resume()

    def _set_arguments(self, arguments: tuple[int, ...]) -> None:
        six = [argument & _MINUS_ONE for argument in (*arguments, 0, 0, 0, 0, 0, 0)[:6]]
        regs = self.regs
        regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9 = six


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_ptrace = kernel.try_ptrace
