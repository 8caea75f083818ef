"""ENCLU of the program: the machine executes the leaf, and the program gets its fault.

Deviation: signals of faults that a thread blocks are unblocked from EENTER to EEXIT, also in the
handler of another signal that interrupts it, since the ENCLU that leads back in traps.  In a
process with an enclave they are unblocked in all handlers, which may have an ENCLU themselves.

Source:
    SDM vol. 3D, "ENCLU", "EENTER"; arch/x86/mm/fault.c, vdso.rst for faults of EENTER and ERESUME.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from softsgx import hw
from softsgx.arch import Enclu, Pfec, Vector
from softsgx.driver import FaultResult
from softsgx.engines.native import abi
from softsgx.engines.native.faults.breakpoints import Breakpoints
from softsgx.engines.native.faults.exits import AsynchronousExits, block_signals_again
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.vdso.permits import Permits
from softsgx.engines.native.x86.insn import ENCLU
from softsgx.hw import READ, WRITE, Fault, LogicalProcessor, PageFault

if TYPE_CHECKING:
    from softsgx.engines.native.faults.pauses import SignalPauses

__all__ = ["EncluLeaves"]

_LOW_32 = 0xFFFF_FFFF
_EENTER, _ERESUME, _EEXIT = int(Enclu.EENTER), int(Enclu.ERESUME), int(Enclu.EEXIT)
_ENTRIES = frozenset({_EENTER, _ERESUME})
_WAITED = -1
#: Waits for one page, after which the thread executes the instruction again, as on hardware: it may
#: stand back for another thread, whose stops the loop has to handle first.
_MOST_WAITS = 2
_EPCM_CHANGES = frozenset(int(leaf) for leaf in (Enclu.EACCEPT, Enclu.EMODPE, Enclu.EACCEPTCOPY))


class EncluLeaves:
    """Does the leaves that threads ask for.

    Args:
        exits: delivers a leaf's exception.
        refused: called for a SIGBUS on a page of an enclave, with thread and address.
        permits: entries that do not stop.
        breakpoints: see there.
        pauses: of the signals of threads inside.
    """

    def __init__(
        self,
        exits: AsynchronousExits,
        refused: Callable[[ProgramThread, int], None],
        permits: Permits,
        breakpoints: Breakpoints,
        pauses: SignalPauses,
    ) -> None:
        self._exits, self._tell_refused, self._pauses = exits, refused, pauses
        self._permits, self._breakpoints = permits, breakpoints

    def execute(self, thread: ProgramThread) -> int:
        """Do the ENCLU at RIP; registers are loaded.

        Returns:
            The signal to deliver when the thread is resumed, 0 for none.

        Raises:
            PageFault: an operand of a leaf inside the enclave is not there, or not allowed.
        """
        cpu, regs = thread.cpu, thread.regs
        leaf = regs.rax & _LOW_32
        operand, at, inside = regs.rcx, regs.rip, cpu.inside
        if leaf in _ENTRIES:
            self._permits.entering(regs.rbx)
        waits = 0
        while True:
            if leaf == _ERESUME:
                cpu.regs.xsave = thread.machine_xstate()
            try:
                _execute(cpu, leaf)
                break
            except PageFault as fault:
                if cpu.inside is not None:
                    raise
                failed = self._entry_fault(thread, leaf, fault)
                if failed is None:
                    waits = 0
                elif failed != _WAITED:
                    return failed
                elif (waits := waits + 1) > _MOST_WAITS and _may_trap(thread):
                    thread.store()
                    return 0
            except Fault as fault:
                self._permits.settle()
                return self._exits.refused(thread, leaf, fault)
        if leaf == _ERESUME:
            thread.set_machine_xstate(cpu.regs.xsave)
        thread.store()
        if leaf in _ENTRIES:
            self._went_in(thread)
        elif leaf == _EEXIT:
            block_signals_again(thread)
            assert inside is not None, "EEXIT has succeeded outside an enclave"
            self._permits.left(thread, inside, at)
        elif leaf in _EPCM_CHANGES:
            thread.image.page_table.refresh(operand)
        return 0

    def resume(self, thread: ProgramThread) -> int:
        """At the AEP after an exit whose reason was removed: do the ENCLU there, if there is one.

        Returns:
            The signal to deliver when the thread is resumed, 0 for none.
        """
        image, regs = thread.image, thread.regs
        if regs.rip == image.aep or image.read(regs.rip, len(ENCLU)) == ENCLU:
            return self.execute(thread)
        return 0

    def _entry_fault(self, thread: ProgramThread, leaf: int, fault: PageFault) -> int | None:
        """EENTER or ERESUME needs a page that is not resident.

        Returns:
            As :meth:`execute`.  ``None``: try again; ``_WAITED``: the page may still be missing.
        """
        self._permits.settle()
        mm, result = thread.image.mm, FaultResult.SEGV
        if not fault.code & Pfec.SGX and mm.find(fault.address) is not None:
            access = WRITE if fault.code & Pfec.W else READ
            result = mm.fault(fault.address, access, thread)
            if result is FaultResult.NOPAGE:
                return None
            if result is FaultResult.RETRY:
                return _WAITED
            if result is not FaultResult.SEGV:
                self._tell_refused(thread, fault.address)
        if self._exits.fix_up(thread, leaf, Vector.PF, fault.code, fault.address):
            return 0
        thread.store()
        return self._exits.page_fault(thread, result, fault.code, fault.address)

    def _went_in(self, thread: ProgramThread) -> None:
        """A thread is inside now: signals of faults can stop it."""
        self._breakpoints.arm(thread)
        self._breakpoints.stopped(thread)
        self._pauses.went_in(thread)


def _may_trap(thread: ProgramThread) -> bool:
    """Return whether a thread may stop at its ENCLU: it blocks no signal of faults."""
    return not thread.sigmask() & abi.FAULT_SIGNALS


def _execute(cpu: LogicalProcessor, leaf: int) -> None:
    """ENCLU; the checks before any leaf cannot fail for the leaves that are done directly."""
    regs = cpu.regs
    if cpu.hw.tracer is None:
        if leaf == _EEXIT and cpu.inside is not None:
            cpu.enclu.eexit(regs.rbx)
            return
        if leaf == _EENTER and cpu.inside is None:
            cpu.enclu.eenter(regs.rbx, regs.rcx)
            return
    hw.enclu(cpu)
