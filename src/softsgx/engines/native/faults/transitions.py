"""ENCLU, faults and signals: how threads go into enclaves and come out.

A thread of the program is a logical processor of the machine.  Its registers go to the machine for
a leaf or an asynchronous exit and come back; in between, enclave code runs on the real processor.

Deviation: a page fault that the driver resolves does not leave the enclave, if its AEP is an ENCLU
and the enclave does not ask for AEX-Notify.  The thread is stopped in any case; when its pages or
an epoch need it to be out, it is kicked, which is a real exit.  Else exit and ERESUME would only
copy state out and back, and listeners are told of both: an enclave that looks for exits in its SSA
frame does not find those.  The same goes for an interrupt whose thread would resume at once; when
it could not, because a page that ERESUME needs is on its way out, the exit is a real one, and
execution goes on at the AEP.

Deviation: signals of faults that a thread blocks are unblocked from EENTER to EEXIT, also in the
handler of another signal that interrupts it, since the ENCLU that leads back in traps.  In a
process with an enclave they are unblocked in all handlers, which may have an ENCLU themselves.

Deviation: a SYSCALL inside an enclave is found out after it has overwritten RCX and R11, so the
frame in the SSA has those.

Deviation: enclave code that jumps out of its ELRANGE executes what is there, where hardware raises
#GP.

Source:
    SDM vol. 3D, "Asynchronous Enclave Exit", "EENTER"; arch/x86/mm/fault.c, arch/x86/kernel/traps.c
    for what becomes of exceptions; vdso.rst for the fix-up.
"""

from __future__ import annotations

from collections.abc import Callable

from softsgx.arch import PAGE_BYTES, AttributesFlags, Enclu, Pfec, Tcs, Vector
from softsgx.driver import FaultResult
from softsgx.engines.native import abi
from softsgx.engines.native.abi import SigInfo, UserRegs
from softsgx.engines.native.faults import extended
from softsgx.engines.native.faults.abort import AbortPage
from softsgx.engines.native.faults.breakpoints import Breakpoints
from softsgx.engines.native.faults.exceptions import send, send_page_fault
from softsgx.engines.native.faults.faulting_instruction import (
    LONGEST,
    access_at,
    again,
    code_at,
    float_vector,
    pfec,
    repeat,
)
from softsgx.engines.native.faults.non_enclave import NonEnclaveFaults
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.tracing.tracee import Stop
from softsgx.engines.native.vdso.code import KEPT_R11
from softsgx.engines.native.vdso.permits import Permits
from softsgx.engines.native.x86.cpuid import CpuidLeaf
from softsgx.engines.native.x86.insn import is_illegal_inside
from softsgx.engines.native.x86.state import StateInsn
from softsgx.hw import (
    EXECUTE,
    READ,
    WRITE,
    AsynchronousExit,
    Fault,
    LeafDone,
    LogicalProcessor,
    PageFault,
    aex,
    check_access,
    enclu,
)
from softsgx.hw.optimised import try_virtual_exit

__all__ = ["Transitions"]

_ENCLU = b"\x0f\x01\xd7"
_CPUID = b"\x0f\xa2"
_LOW_32 = 0xFFFF_FFFF
_NO_CALL = (1 << 64) - 1
_PAGE_MASK = -PAGE_BYTES
_ENCLU_BYTES = 3
_AEP = Tcs.OFFSETS["aep"]
_NO_VECTOR = -1  # how events show an interrupt
_SYSCALL_BYTES = 2
_READ_WRITE, _ALL = READ | WRITE, READ | WRITE | EXECUTE

_INTERRUPT = 0xFD
#: Signals of faults whose meaning depends on the instruction; of SIGSEGV those of no page fault.
_BY_CODE = frozenset({abi.SIGILL, abi.SIGSEGV, abi.SIGFPE})

_EENTER, _ERESUME, _EEXIT = int(Enclu.EENTER), int(Enclu.ERESUME), int(Enclu.EEXIT)
_ENTRIES = frozenset({_EENTER, _ERESUME})
_NOTIFIES = int(AttributesFlags.AEXNOTIFY)
_EPCM_CHANGES = frozenset(int(leaf) for leaf in (Enclu.EACCEPT, Enclu.EMODPE, Enclu.EACCEPTCOPY))


class Transitions:
    """Handlers of stops.  Each returns the signal to deliver when the thread goes on, 0 for none.

    Args:
        cpuid: what CPUID (leaf, sub-leaf) gives.
        abort_page: executes what may not have a page it touches.
        refused: is told of SIGBUS for a page of an enclave: who gets it, and where.
        permits: entries that do not stop.
        breakpoints: see there.
    """

    def __init__(
        self,
        cpuid: Callable[[int, int], CpuidLeaf],
        abort_page: AbortPage,
        refused: Callable[[ProgramThread, int], None],
        permits: Permits,
        breakpoints: Breakpoints,
    ) -> None:
        self._cpuid, self._abort_page, self._tell_refused = cpuid, abort_page, refused
        self._non_enclave = NonEnclaveFaults(abort_page, refused)
        self.permits, self._breakpoints = permits, breakpoints

    # --- stops ----------------------------------------------------------------------------------

    def enter(self, thread: ProgramThread) -> int:
        """Our vDSO asks for EENTER: the seccomp stop of its magic call, registers loaded."""
        image, regs = thread.image, thread.regs
        regs.orig_rax = _NO_CALL
        regs.rax, regs.rcx = _EENTER, image.aep
        regs.r11 = int.from_bytes(image.read(regs.rsp + KEPT_R11, 8), "little")
        regs.rip = image.eenter
        tcs, outside = regs.rbx, thread.cpu.inside is None
        number = self._enclu(thread, 0)
        if outside and thread.cpu.inside is not None:
            self.permits.entered(thread, tcs)
        return number

    def call_inside(self, thread: ProgramThread) -> int:
        """Enclave code made a system call: #UD, at the seccomp stop, registers loaded."""
        image, regs = thread.image, thread.regs
        _take_call_back(regs)
        number = self._exception(thread, Vector.UD)
        if number:
            # Signals can be delivered at signal stops only: make the next one.
            thread.illegal_at, regs.rip = regs.rip, image.vdso_base + image.vdso.illegal
            thread.store()
        return 0

    def signal(self, thread: ProgramThread, number: int) -> int:
        """A signal is about to be delivered."""
        inside = thread.cpu.inside is not None
        if inside:
            self._breakpoints.stopped(thread)
        if number == abi.SIGILL:
            # By far the most frequent stop; the bytes tell more than the signal's information.
            regs = thread.load()
            if thread.image.read(regs.rip, _ENCLU_BYTES) == _ENCLU:
                if inside:
                    thread.image.page_table.mark(regs.rip)
                return self._enclu(thread, number)
            if inside and thread.image.page_table.is_marked(regs.rip):
                # Another thread trapped there too, and was served first.
                return self._enclu(thread, number)
        elif number == abi.SIGSEGV and inside:
            regs = thread.load()
            if thread.image.page_table.is_marked(regs.rip):
                return self._enclu(thread, number)
        info = thread.siginfo()
        if number == abi.SIGBUS and inside and info.code == abi.BUS_ADRERR:
            return self._inside_fault(thread, info.addr, info.code)
        if not abi.FAULT_SIGNALS >> number - 1 & 1 or info.code <= 0:
            if inside:
                thread.load()
                self.leave(thread, _INTERRUPT)
            return number
        thread.load()
        return self._inside(thread, number, info) if inside else self._outside(thread, number, info)

    def kicked(self, thread: ProgramThread, stop: Stop | None) -> bool:
        """An inter-processor interrupt: the thread is stopped, and inside.

        Hardware takes an interrupt before an instruction or after it, so a fault or a system call
        that has stopped the thread has not happened yet: ERESUME executes the instruction again.
        A trap comes after its instruction and before the interrupt: it is the reason of the exit.

        Args:
            thread: the one that leaves its enclave.
            stop: what has stopped it and is not handled yet.

        Returns:
            Whether ``stop`` is over with that.
        """
        regs, vector, over = thread.load(), _INTERRUPT, stop is not None
        self._breakpoints.stopped(thread)
        if stop is not None and stop.event == abi.PTRACE_EVENT_SECCOMP:
            _take_call_back(regs)
        elif stop is not None and not stop.event and not stop.syscall:
            info = thread.siginfo()
            raised = bool(abi.FAULT_SIGNALS >> stop.signal - 1 & 1) and info.code > 0
            over = raised and (stop.signal != abi.SIGTRAP or info.code == abi.TRAP_HWBKPT)
            if raised and not over:
                vector = _trap_vector(info)
        self.leave(thread, vector)
        thread.kicked = True
        return over

    def resumed(self, thread: ProgramThread) -> int:
        """A thread that was kicked goes on at its AEP: do the ENCLU there before it can trap.

        Its signals are blocked again, and the kernel resets what a trap forces on a blocked one.
        """
        thread.load()
        return self._resume_enclave(thread)

    def stays_inside(self, thread: ProgramThread) -> bool:
        """Take an interrupt of a thread inside that resumes at once: no more moves than counts.

        The thread may be running.  ``False``: it must be stopped and leave; nothing has changed.
        """
        cpu, image = thread.cpu, thread.image
        inside = cpu.inside
        assert inside is not None, "an interrupt that makes nobody leave"
        if not self._returns_at_once(thread) or not try_virtual_exit(cpu):
            return False
        if thread is not image.current:  # else the fault at hand is its exit
            self._tell_exit(thread, _NO_VECTOR)
        return True

    def _returns_at_once(self, thread: ProgramThread) -> bool:
        """Return whether nothing could tell an exit now from none: it leads straight back.

        Not so where the AEP has other code than ENCLU, which belongs to the program, nor where the
        enclave asks to be notified, since ERESUME would go to its handler.
        """
        cpu, image = thread.cpu, thread.image
        inside = cpu.inside
        assert inside is not None, "an exit from nowhere"
        if inside.enclave.flags & _NOTIFIES:
            return False
        aep = int.from_bytes(cpu.hw.store.read(inside.tcs, _AEP, 8), "little")
        return aep == image.aep or image.read(aep, _ENCLU_BYTES) == _ENCLU

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
            comes_back: the reason is gone; the thread goes on at the AEP, which leads back in.
        """
        cpu = thread.cpu
        cpu.regs.xsave = thread.machine_xstate()
        aex(cpu, vector, code, address)
        thread.set_machine_xstate(cpu.regs.xsave)
        thread.store()
        if not comes_back and vector != _INTERRUPT:  # else an ENCLU that leads back may trap
            self._went_out(thread)

    # --- signals --------------------------------------------------------------------------------

    def _outside(self, thread: ProgramThread, number: int, info: SigInfo) -> int:
        image, regs = thread.image, thread.regs
        if number == abi.SIGTRAP:
            if regs.rip - 1 in image.cpuid_sites:
                self._emulate_cpuid(thread, regs.rip + 1)
                return 0
            ours = info.code == abi.TRAP_HWBKPT and self._breakpoints.has(regs.rip)
            return 0 if ours else number
        if number == abi.SIGILL and regs.rip == image.vdso_base + image.vdso.illegal:
            regs.rip = thread.illegal_at
            thread.store()
            return send(thread, Vector.UD)
        code = image.read(regs.rip, _ENCLU_BYTES)
        if code == _ENCLU and number in (abi.SIGILL, abi.SIGSEGV, abi.SIGBUS):
            return self._enclu(thread, number)
        if number == abi.SIGSEGV and info.code == abi.SI_KERNEL and code[:2] == _CPUID:
            self._emulate_cpuid(thread, regs.rip + 2)
            return 0
        if number in (abi.SIGSEGV, abi.SIGBUS) and info.code in (1, 2):
            return self._non_enclave.fault(thread, number, info.addr)
        return number

    def _inside(self, thread: ProgramThread, number: int, info: SigInfo) -> int:
        regs = thread.regs
        vector: int
        page_fault = number == abi.SIGSEGV and info.code in (1, 2)
        code = code_at(thread, regs.rip)
        if code is None:
            # Not even whether it was an ENCLU that we had marked can be told now.
            if number in _BY_CODE and not page_fault and again(thread):
                return 0
            code = b""
        if code[:3] == _ENCLU and number in (abi.SIGILL, abi.SIGSEGV):
            return self._enclu(thread, number)
        state = extended.replaced(thread) if number == abi.SIGILL else None
        if state is not None:
            return self._extended_state(thread, state)
        match number:
            case abi.SIGSEGV if page_fault:
                return self._inside_fault(thread, info.addr, info.code)
            case abi.SIGSEGV:
                # What needs privileges that no enclave can have is #UD inside.
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
                vector = _trap_vector(info)
        return self._exception(thread, vector)

    def _extended_state(self, thread: ProgramThread, insn: StateInsn) -> int:
        """Enclave code executes an instruction that depends on XCR0, which is its XFRM."""
        try:
            extended.execute(thread, insn)
        except PageFault as fault:
            return self._operand_fault(thread, fault, WRITE if fault.code & Pfec.W else READ)
        except Fault as fault:
            return self._refused(thread, 0, fault)
        return 0

    def _inside_fault(self, thread: ProgramThread, address: int, signal_code: int) -> int:
        """A page fault of enclave code; registers need not be loaded."""
        image = thread.image
        if image.strict and image.discover(address):
            return 0
        if image.page_table.entry(address) is None:
            prot = image.prot_at(address)
            if self._returns_at_once(thread) and (
                prot == _READ_WRITE
                or (prot == _ALL and not 0 <= address - thread.load().rip < LONGEST)
            ):
                # Load or store, the mapping allows it: no need to decode the instruction.
                result = image.mm.fault(address, READ, thread)
                if result is FaultResult.NOPAGE or result is FaultResult.RETRY:
                    return self._fault_is_mended(thread, int(Pfec.U), address)
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
            return self._exception(thread, Vector.PF, kind | Pfec.P | Pfec.SGX, address)
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
                return self._exception(thread, Vector.PF, refused.code, address)
        elif image.is_covered(address) or access & ~image.page_table.rights(address):
            return self._aborted_inside(thread, address, access)
        if repeat(thread, address):
            return 0
        return self._exception(thread, Vector.PF, kind | Pfec.P, address)

    def _aborted_inside(self, thread: ProgramThread, address: int, access: int) -> int:
        """Enclave code has touched a page of another enclave."""
        if access == EXECUTE:
            return self._exception(thread, Vector.GP)
        number = self._abort_page.execute(thread, address)
        return self._inside(thread, number, thread.siginfo()) if number else 0

    def _ordinary_fault(self, thread: ProgramThread, address: int, access: int, code: int) -> int:
        """Paging itself refused: out of the enclave, and let the driver see to it."""
        image = thread.image
        known = image.mm.find(address) is not None
        result = image.mm.fault(address, access, thread) if known else FaultResult.SEGV
        if result in (FaultResult.NOPAGE, FaultResult.RETRY):
            return self._fault_is_mended(thread, code, address)
        if result is not FaultResult.SEGV:
            self._tell_refused(thread, address)
        if thread.cpu.inside is not None:
            self.leave(thread, Vector.PF, code, address)
        if self._fix_up(thread, _ERESUME, Vector.PF, code, address & _PAGE_MASK):
            return 0
        return self._page_fault_ends(thread, result, code, address & _PAGE_MASK)

    def _page_fault_ends(
        self, thread: ProgramThread, result: FaultResult, error: int, address: int
    ) -> int:
        """Return the signal for a #PF that nothing has mended."""
        if result is FaultResult.SEGV:
            mapped = thread.image.is_mapped(address)
            code = abi.SEGV_ACCERR if mapped else abi.SEGV_MAPERR
            return send_page_fault(thread, error, address, code=code)
        return send_page_fault(thread, error, address, number=abi.SIGBUS, code=abi.BUS_ADRERR)

    def _fault_is_mended(self, thread: ProgramThread, code: int, address: int) -> int:
        """The driver has resolved a fault of enclave code: go on behind the exit it has caused."""
        if thread.cpu.inside is not None:  # else kicked meanwhile
            if self._returns_at_once(thread):
                self._tell_exit(thread, Vector.PF)
                return 0
            thread.load()
            self.leave(thread, Vector.PF, code, address, comes_back=True)
        return self._resume_enclave(thread)

    def _tell_exit(self, thread: ProgramThread, vector: int) -> None:
        """Count and report the exit and the resumption that were not worth doing."""
        cpu = thread.cpu
        tracer, inside = cpu.hw.tracer, cpu.inside
        assert inside is not None, "a mended fault of enclave code outside an enclave"
        crossings = inside.enclave.crossings
        crossings.aex += 1
        crossings.eresume += 1
        if tracer is not None:
            eid, tcs = inside.enclave.eid, inside.tcs_linaddr
            tracer(AsynchronousExit(cpu.number, eid, tcs, vector))
            tracer(LeafDone("eresume", cpu.number, tcs, eid, "SGX_SUCCESS"))

    def _exception(
        self, thread: ProgramThread, vector: int, code: int = 0, address: int = 0
    ) -> int:
        """Enclave code raised an exception: out, and on to whoever handles it."""
        self._breakpoints.exception(thread)
        self.leave(thread, vector, code, address)
        fixable = vector not in (Vector.DB, Vector.BP)
        if fixable and self._fix_up(thread, _ERESUME, vector, code, address & _PAGE_MASK):
            return 0
        if vector == Vector.PF:
            return self._page_fault_ends(thread, FaultResult.SEGV, code, address & _PAGE_MASK)
        return send(thread, vector, code)

    def _fix_up(
        self, thread: ProgramThread, leaf: int, vector: int, code: int, address: int
    ) -> bool:
        """Report an exception through our vDSO, if that is where it is seen to have happened."""
        image, regs = thread.image, thread.regs
        if regs.rip not in (image.aep, image.eenter):
            return False
        regs.rip = image.vdso_base + image.vdso.fixup
        regs.rax, regs.rdi, regs.rsi, regs.rdx = leaf, vector, code, address
        thread.store()
        return True

    # --- ENCLU ----------------------------------------------------------------------------------

    def _resume_enclave(self, thread: ProgramThread) -> int:
        """At the AEP after an exit whose reason is gone: do the ENCLU there, if there is one."""
        image, regs = thread.image, thread.regs
        if regs.rip == image.aep or image.read(regs.rip, _ENCLU_BYTES) == _ENCLU:
            return self._enclu(thread, 0)
        return 0

    def _enclu(self, thread: ProgramThread, number: int) -> int:
        """Do the ENCLU at RIP; ``number`` is the signal it trapped with."""
        cpu, regs = thread.cpu, thread.regs
        leaf = regs.rax & _LOW_32
        operand = regs.rcx
        while True:
            if leaf == _ERESUME:
                cpu.regs.xsave = thread.machine_xstate()
            try:
                _execute(cpu, leaf)
                break
            except PageFault as fault:
                if cpu.inside is not None:
                    access = WRITE if fault.code & Pfec.W else READ
                    return self._operand_fault(thread, fault, access)
                failed = self._entry_fault(thread, leaf, fault)
                if failed is not None:
                    return failed
            except Fault as fault:
                return self._refused(thread, leaf, fault)
        if leaf == _ERESUME:
            thread.set_machine_xstate(cpu.regs.xsave)
        thread.store()
        if leaf in _ENTRIES:
            self._went_in(thread)
        elif leaf == _EEXIT:
            self._went_out(thread)
            self.permits.left(thread)
        elif leaf in _EPCM_CHANGES:
            thread.image.page_table.refresh(operand)
        return 0

    def _operand_fault(self, thread: ProgramThread, fault: PageFault, access: int) -> int:
        """An operand of a leaf inside the enclave is not there, or not allowed."""
        if fault.code & Pfec.SGX:
            return self._exception(thread, Vector.PF, fault.code, fault.address)
        return self._ordinary_fault(thread, fault.address, access, fault.code)

    def _entry_fault(self, thread: ProgramThread, leaf: int, fault: PageFault) -> int | None:
        """EENTER or ERESUME met a page that is not there; ``None`` to try again."""
        mm, result = thread.image.mm, FaultResult.SEGV
        if not fault.code & Pfec.SGX and mm.find(fault.address) is not None:
            access = WRITE if fault.code & Pfec.W else READ
            result = mm.fault(fault.address, access, thread)
            if result in (FaultResult.NOPAGE, FaultResult.RETRY):
                return None
            if result is not FaultResult.SEGV:
                self._tell_refused(thread, fault.address)
        if self._fix_up(thread, leaf, Vector.PF, fault.code, fault.address):
            return 0
        thread.store()
        return self._page_fault_ends(thread, result, fault.code, fault.address)

    def _refused(self, thread: ProgramThread, leaf: int, fault: Fault) -> int:
        """A leaf raised #GP, #UD or the like."""
        if thread.cpu.inside is not None:
            return self._exception(thread, fault.vector, fault.code)
        if self._fix_up(thread, leaf, fault.vector, fault.code, 0):
            return 0
        thread.store()
        return send(thread, fault.vector, fault.code)

    def _went_in(self, thread: ProgramThread) -> None:
        """Fault signals must reach us: the kernel resets what it forces on a blocked one."""
        self._breakpoints.arm(thread)
        self._breakpoints.stopped(thread)
        mask = thread.sigmask()
        if mask & abi.FAULT_SIGNALS:
            thread.blocked = mask
            thread.set_sigmask(mask & ~abi.FAULT_SIGNALS)

    def _went_out(self, thread: ProgramThread) -> None:
        if thread.blocked is not None:
            thread.set_sigmask(thread.blocked)
            thread.blocked = None

    # --- details --------------------------------------------------------------------------------

    def _emulate_cpuid(self, thread: ProgramThread, then: int) -> None:
        regs = thread.regs
        regs.rax, regs.rbx, regs.rcx, regs.rdx = self._cpuid(regs.rax & _LOW_32, regs.rcx & _LOW_32)
        regs.rip = then
        thread.store()


def _take_call_back(regs: UserRegs) -> None:
    """At the seccomp stop of a system call: be in front of the instruction that makes it."""
    regs.rax, regs.orig_rax = regs.orig_rax, _NO_CALL
    regs.rip -= _SYSCALL_BYTES  # as long as INT 80H, too


def _trap_vector(info: SigInfo) -> int:
    """Return the exception behind a SIGTRAP that the kernel has sent."""
    return Vector.BP if info.code == abi.SI_KERNEL else Vector.DB


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
    enclu(cpu)
