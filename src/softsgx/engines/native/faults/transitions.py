"""Handlers of stops by system calls, signals and kicks: threads enter and leave enclaves there.

A thread of the program is a logical processor of the machine.  The machine executes leaves and
asynchronous exits on its registers; in between, enclave code runs on the real processor.

Deviation: a SYSCALL inside an enclave stops after it has overwritten RCX and R11, so the frame in
the SSA has the new values.

Source:
    SDM vol. 3D, "Asynchronous Enclave Exit", "EENTER"; arch/x86/kernel/traps.c.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from softsgx.arch import Enclu, Vector
from softsgx.engines.native import abi
from softsgx.engines.native.abi import SigInfo, UserRegs
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.tracing.tracee import Stop
from softsgx.engines.native.vdso.code import KEPT_R11
from softsgx.engines.native.vdso.cpuid_jumps import CpuidAnswers
from softsgx.engines.native.vdso.permits import Permits
from softsgx.engines.native.x86.insn import ENCLU
from softsgx.hw import WRITE

if TYPE_CHECKING:
    from softsgx.engines.native.faults.abort import AbortPage
    from softsgx.engines.native.faults.breakpoints import Breakpoints
    from softsgx.engines.native.faults.enclave import EnclaveFaults
    from softsgx.engines.native.faults.enclu import EncluLeaves
    from softsgx.engines.native.faults.exits import AsynchronousExits
    from softsgx.engines.native.faults.non_enclave import NonEnclaveFaults
    from softsgx.engines.native.faults.pauses import SignalPauses
    from softsgx.engines.native.vdso.state_jumps import StateJumps

__all__ = ["Transitions"]

_CPUID = b"\x0f\xa2"
_LOW_32 = 0xFFFF_FFFF
_NO_CALL = (1 << 64) - 1
_SYSCALL_BYTES = 2
_EENTER, _ERESUME, _EEXIT = int(Enclu.EENTER), int(Enclu.ERESUME), int(Enclu.EEXIT)
_CROSSING_SIGNALS = frozenset({abi.SIGILL, abi.SIGSEGV, abi.SIGTRAP})


class Transitions:
    """Handlers of stops.  Each returns the signal to deliver at the resumption, 0 for none.

    Args:
        cpuid: what CPUID gives.
        make_abort_page: makes what executes an instruction that may not use a page it touches.
        refused: called for a SIGBUS on a page of an enclave, with thread and address.
        permits: crossings that do not stop.
        make_breakpoints: makes what keeps hardware breakpoints of threads inside enclaves.
        state_jumps: instructions on extended state that do not stop.
        make_pauses: makes what keeps signals from threads inside for a time.
    """

    def __init__(
        self,
        cpuid: CpuidAnswers,
        make_abort_page: Callable[[], AbortPage],
        refused: Callable[[ProgramThread, int], None],
        permits: Permits,
        make_breakpoints: Callable[[], Breakpoints],
        state_jumps: StateJumps,
        make_pauses: Callable[[], SignalPauses],
    ) -> None:
        self._cpuid = cpuid
        self.permits, self._refused, self._state_jumps = permits, refused, state_jumps
        self._make_abort_page, self._make_breakpoints = make_abort_page, make_breakpoints
        self._make_pauses = make_pauses

    # --- made at their first use: most programs have no enclaves --------------------------------

    @cached_property
    def exits(self) -> AsynchronousExits:
        """Asynchronous exits."""
        from softsgx.engines.native.faults.exits import AsynchronousExits

        return AsynchronousExits(self._breakpoints)

    @cached_property
    def enclave(self) -> EnclaveFaults:
        """Faults of enclave code."""
        from softsgx.engines.native.faults.enclave import EnclaveFaults

        return EnclaveFaults(
            *(self.exits, self._leaves, self.permits, self._non_enclave, self._abort_page),
            *(self._refused, self._state_jumps),
        )

    @cached_property
    def _leaves(self) -> EncluLeaves:
        from softsgx.engines.native.faults.enclu import EncluLeaves

        return EncluLeaves(self.exits, self._refused, self.permits, self._breakpoints, self.pauses)

    @cached_property
    def _non_enclave(self) -> NonEnclaveFaults:
        from softsgx.engines.native.faults.non_enclave import NonEnclaveFaults

        return NonEnclaveFaults(self._abort_page, self._refused)

    @cached_property
    def _abort_page(self) -> AbortPage:
        return self._make_abort_page()

    @cached_property
    def _breakpoints(self) -> Breakpoints:
        return self._make_breakpoints()

    @cached_property
    def pauses(self) -> SignalPauses:
        """Pauses of signals."""
        return self._make_pauses()

    # --- stops ----------------------------------------------------------------------------------

    def enter(self, thread: ProgramThread) -> int:
        """Our vDSO executes EENTER: the seccomp stop of its special call, registers loaded."""
        image, regs = thread.image, thread.regs
        regs.orig_rax = _NO_CALL
        regs.rax, regs.rcx = _EENTER, image.aep
        regs.r11 = int.from_bytes(image.read(regs.rsp + KEPT_R11, 8), "little")
        regs.rip = image.eenter
        outside = thread.cpu.inside is None
        number = self._leaves.execute(thread)
        if outside and thread.cpu.inside is not None:
            self.permits.entered(thread)
        elif not number and regs.rip == image.eenter:  # it waits for a page: make the call again
            regs.rip = image.vdso_base + image.vdso.eenter_after - _SYSCALL_BYTES
            regs.rax = abi.SYS_SOFTSGX_EENTER
            thread.store()
        return self._at_call(thread, number)

    def is_entry(self, thread: ProgramThread, stop: Stop) -> bool:
        """Return whether a thread outside is stopped in front of an EENTER or ERESUME."""
        if thread.cpu.inside is not None:
            return False
        if stop.event == abi.PTRACE_EVENT_SECCOMP:
            return thread.load().orig_rax == abi.SYS_SOFTSGX_EENTER
        if stop.event or stop.signal not in (abi.SIGILL, abi.SIGSEGV, abi.SIGBUS):
            return False
        regs = thread.load()
        is_enclu = thread.image.read(regs.rip, len(ENCLU)) == ENCLU
        return is_enclu and regs.rax & _LOW_32 in (_EENTER, _ERESUME)

    def only_crosses(self, thread: ProgramThread, stop: Stop) -> bool:
        """Return whether a stop is an EENTER or an EEXIT, or an instruction on extended state.

        If such a stop does more than that, the code that does it settles all permits before.
        """
        if stop.event == abi.PTRACE_EVENT_SECCOMP:
            return thread.cpu.inside is None and thread.load().orig_rax == abi.SYS_SOFTSGX_EENTER
        if stop.event or stop.signal not in _CROSSING_SIGNALS:
            return False
        regs, page_table = thread.load(), thread.image.page_table
        leaf = regs.rax & _LOW_32
        if thread.cpu.inside is None:
            return leaf == _EENTER and thread.image.read(regs.rip, len(ENCLU)) == ENCLU
        if page_table.is_marked(regs.rip) or thread.image.read(regs.rip, len(ENCLU)) == ENCLU:
            return leaf == _EEXIT
        code = thread.siginfo().code
        if code <= 0 or (stop.signal != abi.SIGILL and code != abi.TRAP_HWBKPT):
            return False
        from softsgx.engines.native.faults.extended import replaced

        return replaced(thread) is not None

    def call_inside(self, thread: ProgramThread) -> int:
        """Enclave code made a system call: #UD, at the seccomp stop, registers loaded."""
        _take_call_back(thread.regs)
        return self._at_call(thread, self.exits.exception(thread, Vector.UD))

    def _at_call(self, thread: ProgramThread, number: int) -> int:
        """Signals can be delivered at signal stops only: at a seccomp stop, make the next one."""
        if number:
            image, regs = thread.image, thread.regs
            assert thread.outgoing is not None, f"signal {number} at a system call of no exception"
            thread.illegal_at = regs.rip, thread.outgoing
            thread.outgoing, regs.rip = None, image.vdso_base + image.vdso.illegal
            thread.store()
        return 0

    def signal(self, thread: ProgramThread, number: int) -> int:
        """A signal is about to be delivered."""
        inside = thread.cpu.inside is not None
        if inside and thread.breakpoints:
            self._breakpoints.stopped(thread)
        info = thread.siginfo()
        if number == abi.SIGBUS and inside and info.code == abi.BUS_ADRERR:
            return self.enclave.page_fault(thread, info.addr, info.code)
        if not abi.FAULT_SIGNALS >> number - 1 & 1 or info.code <= 0:  # sent by a process
            if inside:
                thread.load()
                self.pauses.interrupted(thread)
                self.exits.leave(thread, self.exits.interrupt_vector)
            elif thread.went_in:
                self.pauses.before_return(thread, number)
            return number
        if number == abi.SIGILL:
            # By far the most frequent stop.
            regs = thread.load()
            if thread.image.read(regs.rip, len(ENCLU)) == ENCLU:
                if not inside:
                    return self._enclu_outside(thread)
                thread.image.page_table.mark(regs.rip)
                return self.enclave.enclu(thread)
            if inside and thread.image.page_table.is_marked(regs.rip):
                # Another thread trapped there too, and was served first.
                return self.enclave.enclu(thread)
        elif number == abi.SIGSEGV and inside:
            regs = thread.load()
            image = thread.image
            if image.page_table.is_marked(regs.rip):
                return self.enclave.enclu(thread)
            # Where SGX is on but not in use, ENCLU raises #GP.
            if info.code == abi.SI_KERNEL and image.read(regs.rip, len(ENCLU)) == ENCLU:
                image.page_table.mark(regs.rip)
                return self.enclave.enclu(thread)
        thread.load()
        if inside:
            return self.enclave.signal(thread, number, info)
        return self._outside(thread, number, info)

    def kicked(self, thread: ProgramThread, stop: Stop | None) -> bool:
        """An inter-processor interrupt: the thread is stopped, and inside.

        Hardware takes an interrupt before an instruction or after it, so a fault or a system call
        that has stopped the thread has not happened yet: ERESUME executes the instruction again.
        A trap comes after its instruction and before the interrupt: it is the reason of the exit.

        Args:
            thread: the one that leaves its enclave.
            stop: a stop of it that is not handled yet.

        Returns:
            Whether the exit replaces ``stop``.
        """
        regs, vector, over = thread.load(), self.exits.interrupt_vector, stop is not None
        self._breakpoints.stopped(thread)
        if stop is not None and stop.event == abi.PTRACE_EVENT_SECCOMP:
            _take_call_back(regs)
        elif stop is not None and not stop.event and not stop.syscall:
            info = thread.siginfo()
            raised = bool(abi.FAULT_SIGNALS >> stop.signal - 1 & 1) and info.code > 0
            over = raised and (stop.signal != abi.SIGTRAP or info.code == abi.TRAP_HWBKPT)
            if raised and not over:
                from softsgx.engines.native.faults.faulting_instruction import trap_vector

                vector = trap_vector(info)
        self.exits.leave(thread, vector)
        thread.kicked = True
        return over

    def resumed(self, thread: ProgramThread) -> int:
        """Execute the ENCLU at the AEP of a kicked thread that is resumed, before it can trap.

        The thread blocks its signals again, and the kernel resets the handler of a blocked signal
        that a trap forces.
        """
        thread.load()
        return self._leaves.resume(thread)

    def stays_inside(self, thread: ProgramThread) -> bool:
        """As :meth:`AsynchronousExits.interrupt`."""
        return self.exits.interrupt(thread)

    def _enclu_outside(self, thread: ProgramThread) -> int:
        """Code of the program executes ENCLU; if it leads to another one, execute that, too."""
        outside, enclu, leaf = thread.cpu.inside is None, thread.regs.rip, thread.regs.rax & _LOW_32
        number = self._leaves.execute(thread)
        if thread.pause_ns and thread.cpu.inside is None:
            self.pauses.end(thread)  # it was for this ERESUME
        if leaf == _EENTER and outside and thread.cpu.inside is not None:
            self.permits.entered(thread, enclu)
        if not number and not thread.image.strict:  # where a thread inside waits for its turn
            number = self.enclave.resumed(thread)
        return number

    def _outside(self, thread: ProgramThread, number: int, info: SigInfo) -> int:
        image, regs = thread.image, thread.regs
        if number == abi.SIGTRAP:
            if regs.rip - 1 in image.cpuid_sites:
                self._emulate_cpuid(thread, regs.rip + 1)
                return 0
            ours = info.code == abi.TRAP_HWBKPT and self._breakpoints.has(regs.rip)
            return 0 if ours else number
        if number == abi.SIGILL and regs.rip == image.vdso_base + image.vdso.illegal:
            assert thread.illegal_at is not None, "a thread is at our illegal instruction by itself"
            regs.rip, thread.outgoing = thread.illegal_at
            thread.illegal_at = None
            thread.store()
            return int(thread.outgoing.info.signo)
        code = image.read(regs.rip, len(ENCLU))
        if code == ENCLU and number in (abi.SIGILL, abi.SIGSEGV, abi.SIGBUS):
            if number != abi.SIGILL and info.code in (1, 2):
                _let_stub_store(thread, info.addr)
            return self._enclu_outside(thread)
        if number == abi.SIGSEGV and info.code == abi.SI_KERNEL and code[:2] == _CPUID:
            self._emulate_cpuid(thread, regs.rip + 2)
            return 0
        if number in (abi.SIGSEGV, abi.SIGBUS) and info.code in (1, 2):
            return self._non_enclave.fault(thread, number, info.addr)
        return number

    def _emulate_cpuid(self, thread: ProgramThread, then: int) -> None:
        regs = thread.regs
        self._cpuid.executed(thread.image, then - len(_CPUID))
        regs.rax, regs.rbx, regs.rcx, regs.rdx = self._cpuid(regs.rax & _LOW_32, regs.rcx & _LOW_32)
        regs.rip = then
        thread.store()


def _let_stub_store(thread: ProgramThread, address: int) -> None:
    """A stub has faulted at URSP or URBP, and its thread was moved in front of its ENCLU.

    EENTER by the machine needs no page table of the program, so without this the stub would fault
    at each entry, where the pager has not shown the page in this process or watches it.
    """
    if thread.image.page_table.is_shown(address):
        from softsgx.engines.native.faults.faulting_instruction import repeat

        repeat(thread, address, WRITE)


def _take_call_back(regs: UserRegs) -> None:
    """Set the registers of a seccomp stop to those before the system call's instruction."""
    regs.rax, regs.orig_rax = regs.orig_rax, _NO_CALL
    regs.rip -= _SYSCALL_BYTES  # as long as INT 80H, too
