"""Asynchronous exits: threads leave enclaves without EEXIT, and the program gets a signal or none.

Deviation: a page fault that the driver resolves does not leave the enclave, if its AEP is an ENCLU
and the enclave does not ask for AEX-Notify.  Exit and ERESUME would only copy state out and back.
Listeners receive both events, but an enclave that looks for exits in its SSA frame does not find
these.  When the thread's pages or an epoch need it to be outside, the supervisor kicks it, which is
a real exit.  An interrupt of a thread that would resume at once is treated in the same way.  When
the thread cannot resume, because a page that ERESUME needs is being evicted, the exit is a real
one, and the thread continues at the AEP.

Source:
    SDM vol. 3D, "Asynchronous Enclave Exit"; arch/x86/mm/fault.c, arch/x86/kernel/traps.c for what
    becomes of exceptions; vdso.rst for the fix-up.
"""

from __future__ import annotations

from softsgx import compiled
from softsgx.arch import PAGE_BYTES, AttributesFlags, Enclu, Tcs, Vector
from softsgx.driver import FaultResult
from softsgx.engines.native import abi
from softsgx.engines.native.faults.breakpoints import Breakpoints
from softsgx.engines.native.faults.exceptions import send, send_page_fault
from softsgx.engines.native.faults.pauses import begin_again
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.vdso import state_jumps
from softsgx.engines.native.x86.insn import ENCLU
from softsgx.hw import AsynchronousExit, Fault, LeafDone, aex
from softsgx.hw.optimised.entry import try_virtual_exit

__all__ = ["AsynchronousExits", "block_signals_again"]

_PAGE_MASK = -PAGE_BYTES
_AEP = Tcs.OFFSETS["aep"]
_NO_VECTOR = -1  # how events show an interrupt
_ERESUME = int(Enclu.ERESUME)
#: Linux does not look for a fix-up in the vDSO for these.
_NEVER_FIXED = frozenset({Vector.DB, Vector.BP, Vector.MC})
_NOTIFIES = int(AttributesFlags.AEXNOTIFY)


class AsynchronousExits:
    """See the module.

    Args:
        breakpoints: see there.

    Attributes:
        interrupt_vector: of interrupts from other processors.
    """

    interrupt_vector = 0xFD

    def __init__(self, breakpoints: Breakpoints) -> None:
        self._breakpoints = breakpoints

    def return_at_once(self, thread: ProgramThread) -> bool:
        """Return whether an exit now would be invisible, because the thread would resume at once.

        It is visible if the AEP has other code than ENCLU, which belongs to the program, and if the
        enclave asks for AEX-Notify, since ERESUME would then go to its handler.
        """
        cpu, image = thread.cpu, thread.image
        inside = cpu.inside
        assert inside is not None, "an asynchronous exit of a thread that is in no enclave"
        if thread.resumes is inside:
            return True
        if inside.enclave.flags & _NOTIFIES:
            return False
        aep = int.from_bytes(cpu.hw.store.read(inside.tcs, _AEP, 8), "little")
        if aep == image.aep:
            thread.resumes = inside  # TCS.AEP changes only when the TCS is entered again
            return True
        return image.read(aep, len(ENCLU)) == ENCLU

    def skip(self, thread: ProgramThread, vector: int) -> None:
        """Count and report an exit and an ERESUME that are skipped, since no state would differ."""
        cpu = thread.cpu
        tracer, inside = cpu.hw.tracer, cpu.inside
        assert inside is not None, "a mended fault of enclave code outside an enclave"
        crossings = inside.enclave.crossings
        crossings.aex += 1
        crossings.eresume += 1
        if tracer is not None:
            eid, tcs = inside.enclave.eid, inside.tcs_linaddr
            tracer(AsynchronousExit(cpu.index, eid, tcs, vector))
            tracer(LeafDone("eresume", cpu.index, tcs, eid, "SGX_SUCCESS"))

    def interrupt(self, thread: ProgramThread) -> bool:
        """Serve an interrupt of a thread inside that would resume at once: only counts change.

        The thread may be running.  ``False``: it must be stopped and leave; nothing has changed.
        """
        cpu, image = thread.cpu, thread.image
        assert cpu.inside is not None, "an interrupt of a thread that is in no enclave"
        if not self.return_at_once(thread) or not try_virtual_exit(cpu):
            return False
        if thread not in (image.current, image.faulting):  # else the fault at hand is its exit
            self.skip(thread, _NO_VECTOR)
        return True

    def leave(
        self,
        thread: ProgramThread,
        vector: int,
        code: int = 0,
        address: int = 0,
        *,
        comes_back: bool = False,
    ) -> None:
        """Asynchronous exit; registers are loaded, and stored afterwards.

        Args:
            thread: a stopped thread inside.
            vector: the exception, or an interrupt.
            code: its error code.
            address: of a page fault.
            comes_back: the reason was removed; the thread continues at the AEP, which resumes.
        """
        cpu = thread.cpu
        if thread.image.state_stubs:
            state_jumps.straighten(thread)  # a fault of paging in a stub comes as it is
        cpu.regs.xsave = thread.machine_xstate()
        aex(cpu, vector, code, address)
        thread.set_machine_xstate(cpu.regs.xsave)
        thread.store()
        if not comes_back and vector != self.interrupt_vector:
            block_signals_again(thread)  # in other cases an ENCLU that leads back may trap
        elif thread.pause_ns:
            begin_again(thread)

    # --- exceptions of the program --------------------------------------------------------------
    # Each returns the signal to deliver when the thread is resumed, 0 for none.

    def exception(self, thread: ProgramThread, vector: int, code: int = 0, address: int = 0) -> int:
        """Enclave code raised an exception: leave the enclave, then resolve or signal it."""
        self._breakpoints.exception(thread)
        self.leave(thread, vector, code, address)
        fixable = vector not in _NEVER_FIXED
        if fixable and self.fix_up(thread, _ERESUME, vector, code, address & _PAGE_MASK):
            return 0
        if vector == Vector.PF:
            return self.page_fault(thread, FaultResult.SEGV, code, address & _PAGE_MASK)
        return send(thread, vector, code)

    def refused(self, thread: ProgramThread, leaf: int, fault: Fault) -> int:
        """A leaf, or an instruction that the machine executes, raised #GP, #UD or another fault."""
        if thread.cpu.inside is not None:
            return self.exception(thread, fault.vector, fault.code)
        fixable = fault.vector not in _NEVER_FIXED
        if fixable and self.fix_up(thread, leaf, fault.vector, fault.code, 0):
            return 0
        thread.store()
        return send(thread, fault.vector, fault.code)

    def page_fault(
        self, thread: ProgramThread, result: FaultResult, error: int, address: int
    ) -> int:
        """Return the signal for a #PF that is not resolved; the thread is outside."""
        if result is FaultResult.SEGV:
            mapped = thread.image.is_mapped(address)
            code = abi.SEGV_ACCERR if mapped else abi.SEGV_MAPERR
            return send_page_fault(thread, error, address, code=code)
        return send_page_fault(thread, error, address, number=abi.SIGBUS, code=abi.BUS_ADRERR)

    def fix_up(
        self, thread: ProgramThread, leaf: int, vector: int, code: int, address: int
    ) -> bool:
        """Report an exception through our vDSO, if it is reported at the vDSO's ENCLU."""
        image, regs = thread.image, thread.regs
        if regs.rip not in (image.aep, image.eenter):
            return False
        regs.rip = image.vdso_base + image.vdso.fixup
        regs.rax, regs.rdi, regs.rsi, regs.rdx = leaf, vector, code, address
        thread.store()
        return True


def block_signals_again(thread: ProgramThread) -> None:
    """A thread has left its enclave: block the signals of faults again that it blocks outside."""
    if thread.blocked is not None:
        thread.set_sigmask(thread.blocked)
        thread.blocked, thread.pause_ns = None, 0


if compiled.speedups is not None:
    compiled.speedups.give("AsynchronousExits", AsynchronousExits)
