"""Signals of faults of enclave code: the exception that the processor would raise, and its effect.

Deviation: enclave code that jumps out of its ELRANGE executes what is there, where hardware raises
#GP.

Source:
    SDM vol. 3D, "Access Control Requirements", "Illegal Instructions"; arch/x86/mm/fault.c,
    arch/x86/kernel/traps.c for the vectors behind signals.
"""

from __future__ import annotations

from collections.abc import Callable

from softsgx.arch import PAGE_BYTES, Enclu, Pfec, Vector
from softsgx.driver import FaultResult
from softsgx.engines.native import abi
from softsgx.engines.native.abi import SigInfo
from softsgx.engines.native.faults import extended
from softsgx.engines.native.faults.abort import AbortPage
from softsgx.engines.native.faults.enclu import EncluLeaves
from softsgx.engines.native.faults.exits import AsynchronousExits
from softsgx.engines.native.faults.faulting_instruction import (
    LONGEST,
    access_at,
    again,
    code_at,
    float_vector,
    pfec,
    repeat,
    resolved,
    trap_vector,
)
from softsgx.engines.native.faults.non_enclave import NonEnclaveFaults
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.vdso.permits import Permits
from softsgx.engines.native.vdso.state_jumps import StateJumps
from softsgx.engines.native.x86.insn import ENCLU, is_illegal_inside
from softsgx.engines.native.x86.state import StateInsn
from softsgx.hw import EXECUTE, READ, WRITE, Fault, PageFault, check_access

__all__ = ["EnclaveFaults"]

_PAGE_MASK = -PAGE_BYTES
_READ_WRITE, _ALL = READ | WRITE, READ | WRITE | EXECUTE
_ERESUME = int(Enclu.ERESUME)
_U, _W, _SGX = int(Pfec.U), int(Pfec.W), int(Pfec.SGX)
#: Signals of faults whose meaning depends on the instruction; of SIGSEGV those of no page fault.
_BY_CODE = frozenset({abi.SIGILL, abi.SIGSEGV, abi.SIGFPE})


class EnclaveFaults:
    """Each method returns the signal to deliver when the thread is resumed, 0 for none.

    Args:
        exits: how threads leave with an exception.
        leaves: does ENCLU.
        permits: crossings that do not stop.
        non_enclave: faults on memory that is not the enclave's.
        abort_page: executes an instruction that may not use a page that it touches.
        refused: called for a SIGBUS on a page of an enclave, with thread and address.
        state_jumps: instructions on extended state that do not stop.
    """

    def __init__(
        self,
        exits: AsynchronousExits,
        leaves: EncluLeaves,
        permits: Permits,
        non_enclave: NonEnclaveFaults,
        abort_page: AbortPage,
        refused: Callable[[ProgramThread, int], None],
        state_jumps: StateJumps,
    ) -> None:
        self._exits, self._leaves, self._permits = exits, leaves, permits
        self._state_jumps = state_jumps
        self._non_enclave = non_enclave
        self._abort_page, self._tell_refused = abort_page, refused

    def signal(self, thread: ProgramThread, number: int, info: SigInfo) -> int:
        """Enclave code was stopped by the signal of a fault; registers are loaded."""
        regs = thread.regs
        vector: int
        page_fault = number == abi.SIGSEGV and info.code in (1, 2)
        if number == abi.SIGILL or info.code == abi.TRAP_HWBKPT:
            state = extended.replaced(thread)
            if state is not None:
                return self._extended_state(thread, state)
        code = code_at(thread, regs.rip)
        if code is None:
            # Whether it was a marked ENCLU is not known any more either.
            if number in _BY_CODE and not page_fault and again(thread):
                return 0
            code = b""
        if code[: len(ENCLU)] == ENCLU and number in (abi.SIGILL, abi.SIGSEGV):
            return self.enclu(thread)
        match number:
            case abi.SIGSEGV if page_fault:
                return self.page_fault(thread, info.addr, info.code)
            case abi.SIGSEGV if _was_jump(thread):
                return 0
            case abi.SIGSEGV:
                # An instruction that needs privileges of the kernel raises #UD inside.
                vector = Vector.UD if is_illegal_inside(code) else Vector.GP
            case abi.SIGBUS:
                vector = Vector.AC
            case abi.SIGILL:
                vector = Vector.UD
            case abi.SIGFPE:
                vector = Vector.DE if info.code == abi.FPE_INTDIV else float_vector(code)
            case _ if info.code == abi.TRAP_HWBKPT:
                vector = Vector.UD
            case _:
                vector = trap_vector(info)
        return self._exits.exception(thread, vector)

    def enclu(self, thread: ProgramThread) -> int:
        """Enclave code executes ENCLU; registers are loaded."""
        at = thread.regs.rip
        number = self._enclu_once(thread)
        if not number and thread.regs.rip == at:  # a page fault that the driver has resolved
            number = self.resumed(thread)
        return number

    def resumed(self, thread: ProgramThread) -> int:
        """The thread is about to continue in its enclave: do the ENCLU there, which would trap."""
        inside = thread.cpu.inside is not None
        if inside and thread.image.page_table.traps_at(thread.regs.rip):
            return self._enclu_once(thread)
        return 0

    def _enclu_once(self, thread: ProgramThread) -> int:
        try:
            return self._leaves.execute(thread)
        except PageFault as fault:
            return self._operand_fault(thread, fault)

    def _extended_state(self, thread: ProgramThread, insn: StateInsn) -> int:
        """Enclave code executes an instruction that depends on XCR0, which is its XFRM."""
        how = extended.out_of_line(thread, insn)
        self._state_jumps.stopped_at(thread, insn)
        if how is not None:
            thread.execute_out_of_line(how)
        else:
            try:
                extended.execute_by_model(thread, insn)
            except PageFault as fault:
                self._permits.settle()
                return self._operand_fault(thread, fault)
            except Fault as fault:
                self._permits.settle()
                return self._exits.refused(thread, 0, fault)
        return 0

    def _operand_fault(self, thread: ProgramThread, fault: PageFault) -> int:
        """The machine executes an instruction of the enclave, and an operand raises #PF."""
        if fault.code & _SGX:
            return self._exits.exception(thread, Vector.PF, fault.code, fault.address)
        access = WRITE if fault.code & _W else READ
        return self._ordinary_fault(thread, fault.address, access, fault.code)

    def page_fault(self, thread: ProgramThread, address: int, signal_code: int) -> int:
        """A page fault of enclave code; registers need not be loaded."""
        image = thread.image
        if image.strict and image.discover(address):
            return 0
        if image.page_table.entry(address) is None:
            prot = image.prot_at(address)
            if (
                prot == _READ_WRITE
                or (prot == _ALL and not 0 <= address - thread.load().rip < LONGEST)
            ) and self._exits.return_at_once(thread):
                # Load or store, the mapping allows it: no need to decode the instruction.
                result = image.mm.fault(address, READ, thread)
                return self.faulted(thread, address, signal_code, result)
        return self._by_instruction(thread, address, signal_code)

    def faulted(
        self, thread: ProgramThread, address: int, signal_code: int, result: FaultResult
    ) -> int:
        """The driver has handled a fault of enclave code in a mapping that allows any access."""
        if result is FaultResult.NOPAGE or result is FaultResult.RETRY:
            if thread.cpu.inside is None:  # kicked meanwhile
                return self._mended(thread, _U, address)
            resolved(thread)
            self._exits.skip(thread, Vector.PF)  # its TCS is in use, and the same
            return 0
        return self._by_instruction(thread, address, signal_code)

    def _by_instruction(self, thread: ProgramThread, address: int, signal_code: int) -> int:
        thread.load()
        access = access_at(thread, address)
        if access is None:
            if again(thread):
                return 0
            access = READ
        return self._page_fault(thread, address, access, signal_code)

    def _page_fault(
        self, thread: ProgramThread, address: int, access: int, signal_code: int
    ) -> int:
        image, inside = thread.image, thread.cpu.inside
        assert inside is not None, "a fault of enclave code outside an enclave"
        kind = pfec(access)
        entry = image.page_table.entry(address)
        foreign = image.foreign_mappings.find(address)
        if foreign is not None and not inside.enclave.covers(address):
            return self._non_enclave.foreign(thread, address, access, foreign)
        if foreign is not None and not access & ~foreign.prot:
            return self._exits.exception(thread, Vector.PF, kind | Pfec.P | Pfec.SGX, address)
        ordinary = entry is None or access & ~entry[1]
        if ordinary:
            if foreign is not None:
                present = foreign.prot != abi.PROT_NONE
            elif image.mm.find(address) is None:
                present = signal_code == abi.SEGV_ACCERR and image.is_present(address)
            else:
                present = entry is not None and entry[1] != abi.PROT_NONE
            return self._ordinary_fault(thread, address, access, kind | present)
        assert entry is not None, "no fault here is without an entry"
        if inside.enclave.covers(address):
            page = thread.cpu.hw.page_at(entry[0])
            refused = check_access(inside.secs, page, address, access)
            if refused is not None:
                return self._exits.exception(thread, Vector.PF, refused.code, address)
            if image.page_table.is_poisoned(address):
                return self._exits.exception(thread, Vector.MC)
        elif image.is_covered(address) or access & ~image.page_table.rights(address):
            return self._aborted_inside(thread, address, access)
        if repeat(thread, address, access):
            return 0
        return self._exits.exception(thread, Vector.PF, kind | Pfec.P, address)

    def _aborted_inside(self, thread: ProgramThread, address: int, access: int) -> int:
        """Enclave code has touched a page of another enclave."""
        if access == EXECUTE:
            return self._exits.exception(thread, Vector.GP)
        number = self._abort_page.execute(thread, address)
        return self.signal(thread, number, thread.siginfo()) if number else 0

    def _ordinary_fault(self, thread: ProgramThread, address: int, access: int, code: int) -> int:
        """Page tables refuse the access: leave the enclave and let the driver handle the fault."""
        image = thread.image
        known = image.mm.find(address) is not None
        result = image.mm.fault(address, access, thread) if known else FaultResult.SEGV
        if result in (FaultResult.NOPAGE, FaultResult.RETRY):
            return self._mended(thread, code, address)
        if result is not FaultResult.SEGV:
            self._tell_refused(thread, address)
        if thread.cpu.inside is not None:
            self._exits.leave(thread, Vector.PF, code, address)
        if self._exits.fix_up(thread, _ERESUME, Vector.PF, code, address & _PAGE_MASK):
            return 0
        return self._exits.page_fault(thread, result, code, address & _PAGE_MASK)

    def _mended(self, thread: ProgramThread, code: int, address: int) -> int:
        """The driver has resolved a fault of enclave code: continue after its exit."""
        resolved(thread)
        if thread.cpu.inside is not None:  # else kicked meanwhile
            if self._exits.return_at_once(thread):
                self._exits.skip(thread, Vector.PF)
                return 0
            thread.load()
            self._exits.leave(thread, Vector.PF, code, address, comes_back=True)
        return self._leaves.resume(thread)


def _was_jump(thread: ProgramThread) -> bool:
    """Whether an instruction has trapped because it was being put back in place of a jump."""
    memory = thread.image.page_table.memory_at(thread.regs.rip)
    return memory is not None and thread.regs.rip in memory.former_jumps
