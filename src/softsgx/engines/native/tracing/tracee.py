"""A thread of the program under ptrace: registers, signals, system calls made in its name.

The module does not depend on SGX.  The thread must be in a ptrace stop for every method; all calls
come from the one OS thread that is the tracer.

Source:
    ptrace(2); Linux kernel/ptrace.c, kernel/seccomp.c for the order of stops.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from errno import ESRCH
from functools import cache

from softsgx.engines.native import abi, kernel
from softsgx.engines.native.abi import SigInfo, UserRegs
from softsgx.engines.native.tracing.waits import Waits, let_end, stops_at_exit
from softsgx.engines.native.vdso.out_of_line import OutOfLine
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


class Gone(Exception):
    """The thread runs no more code of the program; wait(2) reports, or will report, its end.

    Attributes:
        tid: its id.
    """

    def __init__(self, tid: int) -> None:
        super().__init__(f"thread {tid} is gone")
        self.tid = tid


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


class Thread:
    """One thread of the program.

    Args:
        tid: its id.
        waits: receives its stops.
        regs: receives its registers; by default an object of its own.

    Attributes:
        tid: its id.
        regs: its general registers, valid between :meth:`load` and the next resume.
        place: where a wait may put its registers and its signal information.
        inject_at: address of a ``syscall; int3`` in its memory, 0 while there is none.
        at_call: whether it is at a seccomp stop whose call can still be made or skipped.
        in_call: whether it is in the kernel and stops before it runs code of the program again.
        mid_call: whether it is stopped in the middle of a system call that continues when it is
            resumed, as at the events of fork and execve: no call can be made in its name.
    """

    def __init__(self, tid: int, waits: Waits, regs: UserRegs | None = None) -> None:
        self.tid, self.waits = tid, waits
        self.regs = UserRegs() if regs is None else regs
        self._regs_at = ctypes.addressof(self.regs)
        self._info = SigInfo()
        self._info_at = ctypes.addressof(self._info)
        self.place = self._regs_at, self._info_at, self.regs, self._info
        self.inject_at = 0
        self.at_call = self.in_call = self.mid_call = False
        self._at_signal = self._borrowed = False
        self._kept: SigInfo | None = None
        # The instruction to execute out of line at the next resume, and the one of the last resume.
        self._next: OutOfLine | None = None
        self._elsewhere: OutOfLine | None = None
        self._loaded = self._changed = False
        self._fetched = 0  # by the wait; what load and siginfo need not ask for
        self._new_xstate: bytes | None = None
        self._real_xstate: bytes | None = None

    # --- registers ------------------------------------------------------------------------------

    def load(self) -> UserRegs:
        """Fetch the registers; changes that are not in the thread yet are kept."""
        if self._loaded:
            return self.regs
        fetched = self._fetched & kernel.REGISTERS
        if not fetched and _ptrace(abi.PTRACE_GETREGS, self.tid, 0, self._regs_at) < 0:
            raise Gone(self.tid)
        self._loaded = True
        if self._elsewhere is not None:
            self._changed |= self._elsewhere.leave(self.regs)
            self._elsewhere = None
        return self.regs

    def store(self) -> None:
        """Set the thread's registers to ``regs``, at the latest when it is resumed."""
        self._changed = True
        self._next = self._elsewhere = None

    def execute_out_of_line(self, how: OutOfLine) -> None:
        """Make the thread execute the instruction at RIP out of line when it is resumed.

        :meth:`store` before that cancels it.
        """
        self.store()
        self._next = how

    def flush(self) -> None:
        """Store all changed state in the thread now."""
        if self._changed:
            self._changed, regs_at = False, self._regs_at
            how, self._next = self._next, None
            if how is not None:
                ctypes.memmove(_ELSEWHERE_AT, regs_at, _REGS_BYTES)
                how.enter(_ELSEWHERE)
                self._elsewhere, regs_at = how, _ELSEWHERE_AT
            if _ptrace(abi.PTRACE_SETREGS, self.tid, 0, regs_at) < 0:
                raise Gone(self.tid)
        if self._new_xstate is not None:
            area, self._new_xstate, self._real_xstate = self._new_xstate, None, None
            self._write_xstate(area)

    def xstate(self) -> bytes:
        """Return the XSAVE area, non-compacted form, as large as this machine makes it."""
        if self._new_xstate is not None:
            return self._new_xstate
        if self._real_xstate is not None:
            return self._real_xstate
        buffer = _XSTATE
        vector = abi.IoVec(ctypes.addressof(buffer), len(buffer))
        self._request(abi.PTRACE_GETREGSET, abi.NT_X86_XSTATE, ctypes.addressof(vector))
        self._real_xstate = buffer.raw[: vector.length]
        return self._real_xstate

    def set_xstate(self, area: bytes) -> None:
        """Replace the XSAVE area, at the latest when it is resumed.

        Args:
            area: as large as the result of :meth:`xstate`.
        """
        self._new_xstate = None if area == self._real_xstate else area

    def _write_xstate(self, area: bytes) -> None:
        buffer = ctypes.create_string_buffer(area, len(area))
        vector = abi.IoVec(ctypes.addressof(buffer), len(area))
        self._request(abi.PTRACE_SETREGSET, abi.NT_X86_XSTATE, ctypes.addressof(vector))

    def set_breakpoints(self, addresses: Sequence[int]) -> None:
        """Set hardware breakpoints: SIGTRAP, TRAP_HWBKPT, before one of at most 4 instructions.

        They replace the earlier ones; execve removes them.

        Raises:
            OSError: the kernel refuses them.
        """
        enabled = sum(1 << 2 * place for place in range(len(addresses)))
        for place, value in ((7, 0), *enumerate(addresses), (7, enabled)):
            self._request(abi.PTRACE_POKEUSER, abi.DEBUG_REGISTERS + 8 * place, value)

    # --- signals --------------------------------------------------------------------------------

    def siginfo(self) -> SigInfo:
        """Return the signal information of this signal stop; reused by the next call."""
        if self._kept is not None:
            return self._kept
        if not self._fetched & kernel.INFORMATION:
            if _ptrace(abi.PTRACE_GETSIGINFO, self.tid, 0, self._info_at) < 0:
                raise Gone(self.tid)
            self._fetched |= kernel.INFORMATION
        return self._info

    def set_siginfo(self, info: SigInfo) -> None:
        """Replace the signal information that the handler receives."""
        self._kept = None
        self._fetched &= ~kernel.INFORMATION
        self._request(abi.PTRACE_SETSIGINFO, 0, ctypes.addressof(info))

    def sigmask(self) -> int:
        """Return the blocked signals; bit n-1 is signal n."""
        if _ptrace(abi.PTRACE_GETSIGMASK, self.tid, 8, _WORD_AT) < 0:
            raise Gone(self.tid)
        return _WORD.value

    def set_sigmask(self, mask: int) -> None:
        """Replace the blocked signals."""
        buffer = ctypes.c_uint64(mask)
        self._request(abi.PTRACE_SETSIGMASK, 8, ctypes.addressof(buffer))

    def waiting_signals(self) -> list[int]:
        """Return the numbers of pending signals; only some of them if there are many."""
        found = []
        for shared in (0, 1):
            _PEEK[0], _PEEK[1] = 0, shared | _PEEKED << 32
            count = _ptrace(
                abi.PTRACE_PEEKSIGINFO, self.tid, ctypes.addressof(_PEEK), ctypes.addressof(_INFOS)
            )
            found += [_INFOS[index].signo for index in range(count)]
        return found

    def fault_waits(self) -> bool:
        """Return whether the signal of a fault is pending that has not stopped the thread yet."""
        _PEEK[0], _PEEK[1] = 0, _PEEKED << 32
        count = _ptrace(
            abi.PTRACE_PEEKSIGINFO, self.tid, ctypes.addressof(_PEEK), ctypes.addressof(_INFOS)
        )
        return any(
            info.code > 0 and abi.FAULT_SIGNALS >> info.signo - 1 & 1
            for info in _INFOS[: max(count, 0)]
        )

    def event_message(self) -> int:
        """Return the result of PTRACE_GETEVENTMSG: a new thread's id, an exit status."""
        buffer = ctypes.c_uint64()
        self._request(abi.PTRACE_GETEVENTMSG, 0, ctypes.addressof(buffer))
        return buffer.value

    @property
    def at_signal(self) -> bool:
        """Whether it is at a signal stop: the signal can be delivered, replaced or dropped."""
        return self._at_signal

    @property
    def borrowable(self) -> bool:
        """Whether :meth:`borrow` has no side effect on what the kernel does next.

        At other stops the kernel is about to execute a system call, or to return from one.
        """
        return self._at_signal or (self.at_call and self.load().orig_rax == _MINUS_ONE)

    # --- resuming -------------------------------------------------------------------------------

    def resume(self, signal: int = 0, *, step: bool = False) -> None:
        """Resume it until its next stop; deliver ``signal`` first.

        With ``step`` it stops by SIGTRAP after one instruction, at the latest.
        """
        if self._changed or self._new_xstate is not None or self._kept is not None:
            self._prepare(signal)
        request = abi.PTRACE_SYSCALL if self.in_call else abi.PTRACE_CONT
        if step:
            request = abi.PTRACE_SINGLESTEP
        if _ptrace(request, self.tid, 0, signal) < 0:
            raise Gone(self.tid)

    def _prepare(self, signal: int) -> None:
        self.flush()
        if signal and self._kept is not None and self._kept.signo == signal:
            self.set_siginfo(self._kept)

    def step(self, signal: int = 0) -> Stop:
        """Execute one instruction, or deliver a signal, and wait for the stop after it.

        Args:
            signal: delivered first; the thread stops at the first instruction of its handler.

        Raises:
            Gone: the thread died instead.
        """
        self._prepare(signal)
        self._request(abi.PTRACE_SINGLESTEP, 0, signal)
        return self.wait()

    def listen(self) -> None:
        """Leave it in its group stop; wait(2) still reports its end."""
        self.flush()
        self.in_call = True
        if self._borrowed:  # it has left the stop: stop it again before it executes an instruction
            self.interrupt()
            self.resume()
        else:
            self._request(abi.PTRACE_LISTEN, 0, 0)

    def interrupt(self) -> None:
        """Ask a running thread to stop."""
        self._request(abi.PTRACE_INTERRUPT, 0, 0)

    def wait(self) -> Stop:
        """Block until this thread stops.

        Raises:
            Gone: it ends instead.
        """
        try:
            status = self.waits.of(self.tid)
        except ChildProcessError:
            raise Gone(self.tid) from None
        if not os.WIFSTOPPED(status):
            self.waits.keep(self.tid, status)
            raise Gone(self.tid)
        if stops_at_exit(status):
            let_end(self.tid)
            raise Gone(self.tid)
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
        return stop

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
        self._request(abi.PTRACE_SYSCALL, 0, 0)
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
        stops_again = self._run_to(end)
        result = _signed(regs.rax)
        ctypes.memmove(self._regs_at, ctypes.addressof(saved), _REGS_BYTES)
        self._loaded = True
        self.store()
        self._next = out_of_line
        self.set_sigmask(mask)
        self._kept, self._at_signal, self._borrowed = kept, at_signal, True
        if stops_again:
            os.kill(self.tid, abi.SIGSTOP)
        return result

    def _run_to(self, end: int) -> bool:
        """Run borrowed code; return whether a SIGSTOP arrived meanwhile and must be sent again."""
        stopped_by_signal = False
        self.resume()
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

    def _request(self, request: int, address: int, data: int) -> None:
        result = _ptrace(request, self.tid, address, data)
        if result == -ESRCH:
            raise Gone(self.tid)
        if result < 0:
            raise OSError(-result, f"ptrace: {os.strerror(-result)}")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_ptrace = kernel.try_ptrace
_PEEKED = 16
_PEEK = (ctypes.c_uint64 * 2)()
_INFOS = (SigInfo * _PEEKED)()
_WORD = ctypes.c_uint64()
_ELSEWHERE = UserRegs()
_ELSEWHERE_AT = ctypes.addressof(_ELSEWHERE)
_WORD_AT = ctypes.addressof(_WORD)
_XSTATE = ctypes.create_string_buffer(16384)
