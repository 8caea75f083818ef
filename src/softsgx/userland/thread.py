"""A thread of a simulated process: it enters enclaves and executes instructions in them.

When an instruction faults, the processor leaves the enclave, the kernel handles the fault, and the
thread resumes and repeats the instruction, as on silicon.  The same happens when another
processor's interrupt makes it leave.  A fault that the driver cannot handle becomes a
:class:`Signal`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from softsgx.arch import PageType, Pfec, SecInfo, Status
from softsgx.driver import (
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    EnclaveFile,
    FaultResult,
    Mm,
    ProvisionFile,
)
from softsgx.hw import (
    EnclaveMode,
    Fault,
    LogicalProcessor,
    PageFault,
    access,
    deliver,
    interrupt,
)
from softsgx.paging import Claim, Group
from softsgx.userland.memory import SoftMemory

if TYPE_CHECKING:
    from softsgx.userland.process import SoftProcess

__all__ = ["Signal", "SoftThread"]

T = TypeVar("T")
_CODE, _AEP = 0x40_0000, 0x40_1000  # addresses outside any enclave: of the code, of its AEP
_FAULTS_IN_A_ROW = 100_000


class Signal(Exception):
    """A thread was sent a signal for a fault; it is outside any enclave then.

    Attributes:
        name: ``SIGSEGV`` or ``SIGBUS``, or ``SIGKILL`` when the kernel has no memory.
        vector: the exception's vector.
        code: its error code.
        address: the address of a page fault, else 0.
    """

    def __init__(self, name: str, fault: Fault) -> None:
        super().__init__(f"{name}: {fault}")
        self.name, self.vector, self.code = name, fault.vector, fault.code
        self.address = fault.address if isinstance(fault, PageFault) else 0


class SoftThread:
    """A thread of execution on one logical processor.

    Threads that share a processor must not run at the same time.

    Attributes:
        process: its process.
        cpu: its processor.
        tcs: the TCS it has entered, 0 outside.
        exits: asynchronous exits it has resumed from.
        claim: pages that its current instruction needs together.
    """

    def __init__(self, process: SoftProcess, cpu: LogicalProcessor) -> None:
        self.process, self.cpu = process, cpu
        self.tcs = 0
        self.exits = 0
        self.claim = Claim()
        self._mode: EnclaveMode | None = None

    # --- Task: that of the process, except the claim --------------------------------------------

    @property
    def mm(self) -> Mm:
        """Its address space."""
        return self.process.mm

    @property
    def memory(self) -> SoftMemory:
        """The ordinary memory of that address space."""
        return self.process.memory

    @property
    def group(self) -> Group:
        """The group that its EPC pages are charged to."""
        return self.process.group

    @property
    def personality_read_implies_exec(self) -> bool:
        """Whether its personality has READ_IMPLIES_EXEC."""
        return self.process.personality_read_implies_exec

    def file(self, fd: int) -> EnclaveFile | ProvisionFile | None:
        """Return the open file of a descriptor."""
        return self.process.file(fd)

    def signal_pending(self) -> bool:
        """Return whether a signal is pending."""
        return self.process.signal_pending()

    @property
    def inside(self) -> bool:
        """Whether it is between entry and exit, interrupted or not."""
        return self.tcs != 0

    # --- enclave transitions --------------------------------------------------------------------

    def enter(self, tcs: int) -> None:
        """EENTER.

        Raises:
            Signal: it cannot be entered.
        """
        assert not self.tcs, "the thread is inside already"
        self._schedule()
        self.cpu.regs.rip = _CODE
        try:
            self._until_done(lambda: self.cpu.enclu.eenter(tcs, _AEP))
        finally:
            self._retire()
        self.tcs, self._mode = tcs, self.cpu.inside

    def exit(self) -> None:
        """EEXIT.

        Raises:
            Signal: it was outside, and cannot be resumed.
        """
        self.run(lambda cpu: cpu.enclu.eexit(_CODE))
        self.tcs, self._mode = 0, None

    def abandon(self) -> None:
        """Stay outside after a signal; the SSA frame of the interrupted entry stays in use."""
        self.tcs, self._mode = 0, None

    def _schedule(self) -> None:
        """Make this the current thread of the processor."""
        cpu = self.cpu
        if cpu.space is not self.process.ptes:
            interrupt(cpu)
            with cpu.busy:
                cpu.flush_tlb()
                cpu.space, cpu.cpl = self.process.ptes, 3
                # A kernel enables every component that the processor has.
                cpu.regs.xcr0 = self.process.driver.core.hw.config.xcr0

    def _resume(self) -> EnclaveMode:
        """Make the processor be in the enclave: ERESUME after an asynchronous exit."""
        cpu = self.cpu
        while True:
            self._schedule()
            mode = cpu.inside
            if mode is not None and mode is self._mode:
                return mode
            self.exits += 1
            cpu.regs.rip = _AEP
            self._until_done(lambda: cpu.enclu.eresume(self.tcs, _AEP))
            self._mode = cpu.inside

    # --- instructions ---------------------------------------------------------------------------

    def load(self, addr: int, size: int = 8) -> bytes:
        """Load bytes; inside an enclave or not."""
        return self.run(lambda cpu: access.load(cpu, addr, size), again=True)

    def store(self, addr: int, data: bytes) -> None:
        """Store bytes; inside an enclave or not."""
        self.run(lambda cpu: access.store(cpu, addr, data), again=True)

    def fetch(self, addr: int, size: int = 1) -> bytes:
        """Fetch code."""
        return self.run(lambda cpu: access.fetch(cpu, addr, size), again=True)

    def eaccept(self, page: int, flags: int, scratch: int) -> Status:
        """EACCEPT of a page with SECINFO ``flags``, which is put at ``scratch`` in the enclave."""
        self.store(scratch, SecInfo(flags=flags).pack())
        return self.run(lambda cpu: cpu.enclu.eaccept(scratch, page))

    def eacceptcopy(self, page: int, source: int, rights: int, scratch: int) -> Status:
        """EACCEPTCOPY of a page from another one of the enclave."""
        self.store(scratch, SecInfo.of(PageType.REG, rights).pack())
        return self.run(lambda cpu: cpu.enclu.eacceptcopy(scratch, page, source))

    def emodpe(self, page: int, rights: int, scratch: int) -> None:
        """EMODPE: extend a page's rights."""
        self.store(scratch, SecInfo.of(PageType.REG, rights).pack())
        self.run(lambda cpu: cpu.enclu.emodpe(scratch, page))

    def run(self, instruction: Callable[[LogicalProcessor], T], *, again: bool = False) -> T:
        """Execute an instruction to its end.

        Args:
            instruction: executes on the processor.
            again: whether it may be repeated after it was executed outside.

        Raises:
            Signal: a fault that the kernel cannot handle.
        """
        try:
            return self._repeat(instruction, again=again)
        finally:
            self._retire()

    def _retire(self) -> None:
        """An instruction has completed, or a signal is sent for it: its pages may leave."""
        if self.claim.loads:
            self.process.driver.core.claims.release(self.claim)

    def _repeat(self, instruction: Callable[[LogicalProcessor], T], *, again: bool) -> T:
        cpu = self.cpu
        in_a_row = 0
        while True:
            self._schedule()
            mode = self._resume() if self.tcs else None
            try:
                result = instruction(cpu)
            except Fault as fault:
                # An interrupt made it execute outside, so its result is void.
                if cpu.inside is mode:
                    self._fault(fault)
            else:
                # A leaf that works inside only cannot have succeeded outside.
                if cpu.inside is mode or not again:
                    return result
            in_a_row = self._patience(in_a_row)

    def _until_done(self, leaf: Callable[[], None]) -> None:
        """Execute an instruction that needs no enclave mode."""
        in_a_row = 0
        while True:
            try:
                leaf()
            except Fault as fault:
                self._fault(fault)
            else:
                return
            in_a_row = self._patience(in_a_row)

    def _patience(self, in_a_row: int) -> int:
        assert in_a_row < _FAULTS_IN_A_ROW, "one instruction faults again and again"
        if in_a_row:
            # A timer interrupt would let other threads run.
            self.process.driver.runtime.yield_now()
        return in_a_row + 1

    def _fault(self, fault: Fault) -> None:
        """Deliver a fault to the processor, then to the kernel."""
        deliver(self.cpu, fault)
        if not isinstance(fault, PageFault) or fault.code & Pfec.SGX:
            raise Signal("SIGSEGV", fault)
        kind = PROT_READ
        if fault.code & Pfec.W:
            kind = PROT_WRITE
        elif fault.code & Pfec.I:
            kind = PROT_EXEC
        match self.process.mm.fault(fault.address, kind, self):
            case FaultResult.NOPAGE | FaultResult.RETRY:
                return
            case FaultResult.SIGBUS:
                raise Signal("SIGBUS", fault)
            case FaultResult.OOM:
                raise Signal("SIGKILL", fault)
            case FaultResult.SEGV:
                raise Signal("SIGSEGV", fault)
