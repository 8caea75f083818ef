"""What a tracer reads and sets of a thread that is stopped under ptrace: registers, signals.

The module does not depend on SGX.  All requests come from the one OS thread that is the tracer.

Source:
    ptrace(2).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from errno import ESRCH
from typing import TYPE_CHECKING

from softsgx.engines.native import abi, kernel
from softsgx.engines.native.abi import SigInfo, UserRegs
from softsgx.engines.native.tracing.waits import Waits

if TYPE_CHECKING:
    from softsgx.engines.native.vdso.out_of_line import OutOfLine

__all__ = ["Gone", "StoppedThread"]

_MINUS_ONE = (1 << 64) - 1
_REGS_BYTES = ctypes.sizeof(UserRegs)


class Gone(Exception):
    """The thread runs no more code of the program; wait(2) reports, or will report, its end.

    Attributes:
        tid: its id.
    """

    def __init__(self, tid: int) -> None:
        super().__init__(f"thread {tid} is gone")
        self.tid = tid


class StoppedThread:
    """A thread of the program while it is stopped.

    Args:
        tid: its id.
        waits: receives its stops.
        regs: receives its registers; by default an object of its own.

    Attributes:
        tid: its id.
        regs: its general registers, valid between :meth:`load` and the next resume.
        place: where a wait may put its registers and its signal information.
        info: its signal information, valid once fetched; info_at: the address of that.
        inject_at: address of a ``syscall; int3`` in its memory, 0 while there is none.
        at_call: whether it is at a seccomp stop whose call can still be made or skipped.
        in_call: whether it is in the kernel and stops before it runs code of the program again.
        mid_call: whether it is stopped in the middle of a system call that continues when it is
            resumed, as at the events of fork and execve: no call can be made in its name.
    """

    # As each thread begins: most threads of short programs end so.
    inject_at = 0
    at_call = in_call = mid_call = False
    _at_signal = _borrowed = False
    _at_fault = False  # at a stop that stands for the signal of a fault
    _kept: SigInfo | None = None
    #: The instruction to execute out of line at the next resume, and the one of the last resume.
    _next: OutOfLine | None = None
    _elsewhere: OutOfLine | None = None
    _loaded = _changed = False
    _fetched = 0  # by the wait; what load and siginfo need not ask for
    _ended = False  # a wait for its stop has found that it ends
    _new_xstate: bytes | None = None
    _real_xstate: bytes | None = None

    def __init__(self, tid: int, waits: Waits, regs: UserRegs | None = None) -> None:
        self.tid, self.waits = tid, waits
        self.regs = UserRegs() if regs is None else regs
        self._regs_at = ctypes.addressof(self.regs)
        self.info = SigInfo()
        self.info_at = ctypes.addressof(self.info)
        self.place = self._regs_at, self.info_at, self.regs, self.info

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
            self._check_place()
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
        self._change(abi.PTRACE_SETREGSET, abi.NT_X86_XSTATE, ctypes.addressof(vector))

    def set_breakpoints(self, addresses: Sequence[int]) -> None:
        """Set hardware breakpoints: SIGTRAP, TRAP_HWBKPT, before one of at most 4 instructions.

        They replace the earlier ones; execve removes them.

        Raises:
            OSError: the kernel refuses them.
        """
        enabled = sum(1 << 2 * place for place in range(len(addresses)))
        for place, value in ((7, 0), *enumerate(addresses), (7, enabled)):
            self._change(abi.PTRACE_POKEUSER, abi.DEBUG_REGISTERS + 8 * place, value)

    # --- signals --------------------------------------------------------------------------------

    def siginfo(self) -> SigInfo:
        """Return the signal information of this signal stop; reused by the next call."""
        if self._kept is not None:
            return self._kept
        if not self._fetched & kernel.INFORMATION:
            if _ptrace(abi.PTRACE_GETSIGINFO, self.tid, 0, self.info_at) < 0:
                raise Gone(self.tid)
            self._fetched |= kernel.INFORMATION
        return self.info

    def sigmask(self) -> int:
        """Return the blocked signals; bit n-1 is signal n."""
        if _ptrace(abi.PTRACE_GETSIGMASK, self.tid, 8, _WORD_AT) < 0:
            raise Gone(self.tid)
        return _WORD.value

    def set_sigmask(self, mask: int) -> None:
        """Replace the blocked signals."""
        buffer = ctypes.c_uint64(mask)
        self._change(abi.PTRACE_SETSIGMASK, 8, ctypes.addressof(buffer))

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

    def event_message(self, event: int) -> int:
        """Return the message of ``event``, which has stopped it: PTRACE_GETEVENTMSG.

        At fork, vfork and clone that is the id of the thread that it has made; at execve, the id
        that it had before.

        Raises:
            Gone: it was killed there.  At the event of its end, the message is its exit status.
        """
        self._request(abi.PTRACE_GETEVENTMSG, 0, _WORD_AT)
        message = _WORD.value
        self._request(abi.PTRACE_GETSIGINFO, 0, self.info_at)
        if self.info.code != event << 8 | abi.SIGTRAP:
            raise Gone(self.tid)
        return message

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

    # --- requests -------------------------------------------------------------------------------

    def _change(self, request: int, address: int, data: int) -> None:
        self._check_place()
        self._request(request, address, data)

    def _check_place(self) -> None:
        """Make sure that a request reaches this thread, and no program in its place.

        When another thread of its process executes a program, this one ends; if it is the leader,
        its id is the other thread's from then on.  A leader of several threads stops before its
        end: its id remains its own until a wait has received that stop, or a request to it, made
        before, has resumed it there.  The wait was for another thread, and keeps what it received
        for the loop; or it was for this one, and has found no other stop of it.

        Raises:
            Gone: it would not.
        """
        if self._ended or self.waits.keeps(self.tid):
            raise Gone(self.tid)

    def _request(self, request: int, address: int, data: int) -> None:
        result = _ptrace(request, self.tid, address, data)
        if result == -ESRCH:
            raise Gone(self.tid)
        if result < 0:
            raise OSError(-result, f"ptrace: {os.strerror(-result)}")


_ptrace = kernel.try_ptrace
_PEEKED = 16
_PEEK = (ctypes.c_uint64 * 2)()
_INFOS = (SigInfo * _PEEKED)()
_WORD = ctypes.c_uint64()
_ELSEWHERE = UserRegs()
_ELSEWHERE_AT = ctypes.addressof(_ELSEWHERE)
_WORD_AT = ctypes.addressof(_WORD)
_XSTATE = ctypes.create_string_buffer(16384)
