"""A process of a simulated machine: memory, descriptors, threads that enter enclaves.

The driver sees a task.  A thread loads, stores and executes ENCLU on a logical processor; the
driver handles its faults, and a fault that it cannot handle becomes a :class:`Signal`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from errno import EACCES
from typing import TYPE_CHECKING, TypeVar

from softsgx.arch import PageType, Pfec, SecInfo, Status
from softsgx.driver import (
    MAP_FIXED,
    MAP_SHARED,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    AddPages,
    AddPagesFlags,
    Create,
    EnclaveFile,
    FaultResult,
    Init,
    Ioctl,
    Mm,
    ModifyTypes,
    Provision,
    ProvisionFile,
    RemovePages,
    RestrictPermissions,
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
from softsgx.image import EnclaveImage
from softsgx.layout import Structure
from softsgx.paging import Claim, Group
from softsgx.userland.enclave import LoadedEnclave, load_enclave
from softsgx.userland.memory import SoftMemory
from softsgx.userland.page_tables import MachineOrGuest, SoftPageTable

if TYPE_CHECKING:
    from softsgx.driver import Driver

__all__ = ["Signal", "SoftProcess", "SoftThread"]

T = TypeVar("T")
_CODE, _AEP = 0x40_0000, 0x40_1000
_FRAMES, _FRAMES_BYTES = 1 << 51, 1 << 36  # physical memory above any EPC; 64 GiB a process
_FAULTS_IN_A_ROW = 100_000
_PLACES = 0x10_0000_0000  # above the heap and its frames' addresses


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


class SoftProcess:
    """A process: a task to the driver, with memory, descriptors and threads.

    Args:
        machine: the machine or guest that it runs on.
        driver: it opens the devices of this driver.
        group: its EPC pages are charged to this group; the core's root when ``None``.
        name: in messages and schedules.
        may_provision: whether it may open ``/dev/sgx_provision``, which is a right of the file
            system on Linux.
        make_mm: makes its address space; an empty one when ``None``.

    Attributes:
        mm: its address space.
        memory: its ordinary memory.
        personality_read_implies_exec: settable.
        signal: a signal is pending; settable, or a function to ask.
    """

    def __init__(
        self,
        machine: MachineOrGuest,
        driver: Driver,
        *,
        group: Group | None = None,
        name: str = "",
        may_provision: bool = True,
        make_mm: Callable[[SoftProcess], Mm] | None = None,
    ) -> None:
        pid = driver.next_pid()
        self.name = name or f"process{pid}"
        self.machine, self.driver = machine, driver
        self.group: Group = driver.core.root if group is None else group
        self.ptes = SoftPageTable(machine)
        self.memory = SoftMemory(machine, self.ptes, _FRAMES + pid * _FRAMES_BYTES)
        self.mm = (
            Mm(driver.runtime, self.ptes, owner=self, name=self.name)
            if make_mm is None
            else make_mm(self)
        )
        self.may_provision = may_provision
        self.personality_read_implies_exec = False
        self._next_base = _PLACES
        self.signal: bool | Callable[[], bool] = False
        self._files: dict[int, EnclaveFile | ProvisionFile] = {}
        self._latch = driver.runtime.latch()

    # --- Task -----------------------------------------------------------------------------------

    def file(self, fd: int) -> EnclaveFile | ProvisionFile | None:
        """Return the open file of a descriptor."""
        return self._files.get(fd)

    def signal_pending(self) -> bool:
        """Return whether a signal is pending."""
        return self.signal if isinstance(self.signal, bool) else self.signal()

    @property
    def claim(self) -> None:
        """Return ``None``: its threads have claims."""
        return None

    # --- system calls ---------------------------------------------------------------------------

    def open(self) -> int:
        """Open ``/dev/sgx_enclave``; return the descriptor."""
        return self._descriptor(self.driver.open(self))

    def open_provision(self) -> int:
        """Open ``/dev/sgx_provision``; return the descriptor.

        Raises:
            OSError: EACCES: the process has no right to it.
        """
        if not self.may_provision:
            raise OSError(EACCES, "/dev/sgx_provision: the process may not open it")
        return self._descriptor(self.driver.open_provision(self))

    def _descriptor(self, file: EnclaveFile | ProvisionFile) -> int:
        with self._latch:
            fd = next(fd for fd in range(3, 1 << 20) if fd not in self._files)
            self._files[fd] = file
        return fd

    def enclave_file(self, fd: int) -> EnclaveFile:
        """Return the file of a descriptor that is ``/dev/sgx_enclave``."""
        file = self._files[fd]
        assert isinstance(file, EnclaveFile), f"descriptor {fd} is no enclave"
        return file

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        self._files.pop(fd).release()

    def ioctl(self, fd: int, cmd: int, args: Structure) -> None:
        """Make an ioctl whose structure lies in the process' memory; ``args`` receives the result.

        Raises:
            OSError: as :meth:`EnclaveFile.ioctl`; ``args`` is updated all the same.
        """
        with self.memory.mapped(args.pack()) as at:
            try:
                self.enclave_file(fd).ioctl(self, cmd, at)
            finally:
                after = type(args).unpack(self.memory.read(at, args.SIZE))
                for name in args.OFFSETS:
                    setattr(args, name, getattr(after, name))

    def create(self, fd: int, secs: bytes) -> None:
        """SGX_IOC_ENCLAVE_CREATE with a SECS of 4096 bytes."""
        with self.memory.mapped(secs) as src:
            self.ioctl(fd, Ioctl.ENCLAVE_CREATE, Create(src=src))

    def add_pages(
        self, fd: int, offset: int, data: bytes, flags: int, *, measure: bool = True
    ) -> AddPages:
        """SGX_IOC_ENCLAVE_ADD_PAGES of whole pages with SECINFO ``flags``."""
        mapped = self.memory.mapped
        with mapped(data) as src, mapped(SecInfo(flags=flags).pack()) as secinfo:
            args = AddPages(
                src=src,
                offset=offset,
                length=len(data),
                secinfo=secinfo,
                flags=int(AddPagesFlags.MEASURE) if measure else 0,
            )
            self.ioctl(fd, Ioctl.ENCLAVE_ADD_PAGES, args)
        return args

    def init(self, fd: int, sigstruct: bytes) -> None:
        """SGX_IOC_ENCLAVE_INIT with a SIGSTRUCT."""
        with self.memory.mapped(sigstruct) as at:
            self.ioctl(fd, Ioctl.ENCLAVE_INIT, Init(sigstruct=at))

    def provision(self, fd: int, provision_fd: int) -> None:
        """SGX_IOC_ENCLAVE_PROVISION."""
        self.ioctl(fd, Ioctl.ENCLAVE_PROVISION, Provision(fd=provision_fd))

    def restrict(self, fd: int, offset: int, length: int, permissions: int) -> RestrictPermissions:
        """SGX_IOC_ENCLAVE_RESTRICT_PERMISSIONS."""
        args = RestrictPermissions(offset=offset, length=length, permissions=permissions)
        self.ioctl(fd, Ioctl.ENCLAVE_RESTRICT_PERMISSIONS, args)
        return args

    def modify_types(self, fd: int, offset: int, length: int, page_type: int) -> ModifyTypes:
        """SGX_IOC_ENCLAVE_MODIFY_TYPES."""
        args = ModifyTypes(offset=offset, length=length, page_type=page_type)
        self.ioctl(fd, Ioctl.ENCLAVE_MODIFY_TYPES, args)
        return args

    def remove_pages(self, fd: int, offset: int, length: int) -> RemovePages:
        """SGX_IOC_ENCLAVE_REMOVE_PAGES."""
        args = RemovePages(offset=offset, length=length)
        self.ioctl(fd, Ioctl.ENCLAVE_REMOVE_PAGES, args)
        return args

    def mmap(
        self,
        fd: int,
        addr: int,
        length: int,
        prot: int = PROT_READ | PROT_WRITE | PROT_EXEC,
        flags: int = MAP_SHARED | MAP_FIXED,
    ) -> int:
        """Map an enclave."""
        return self.enclave_file(fd).mmap(self.mm, addr, length, prot, flags, task=self)

    def munmap(self, addr: int, length: int) -> None:
        """Unmap enclaves."""
        self.mm.munmap(addr, length)

    def mprotect(self, addr: int, length: int, prot: int) -> None:
        """Change the rights of mappings of enclaves."""
        self.mm.mprotect(addr, length, prot, task=self)

    def free_range(self, size: int) -> int:
        """Return the base of a free range of addresses, aligned to its size, a power of two."""
        base = -(-self._next_base // size) * size
        self._next_base = base + size
        return base

    def load(
        self,
        file: str | os.PathLike[str] | EnclaveImage,
        *,
        sigstruct: str | os.PathLike[str] | None = None,
        base: int | None = None,
        debug: bool | None = None,
    ) -> LoadedEnclave:
        """Create and initialise the enclave of a file; see :func:`.enclave.load_enclave`."""
        return load_enclave(self, file, sigstruct=sigstruct, base=base, debug=debug)

    def fork(self, *, name: str = "", fail: bool = False) -> SoftProcess:
        """Return a child process.

        Args:
            name: its name.
            fail: there is no memory to register it with the enclaves.
        """
        child = SoftProcess(
            self.machine,
            self.driver,
            group=self.group,
            name=name,
            may_provision=self.may_provision,
            make_mm=lambda child: self.mm.fork(
                child.ptes, owner=child, name=child.name, copy_entries=True, fail=fail
            ),
        )
        child._next_base = self._next_base
        self.memory.copy_to(child.memory)
        for fd, file in self._files.items():
            file.hold()
            child._files[fd] = file
        return child

    def exit(self) -> None:
        """End it: its address space, then its descriptors."""
        self.mm.exit()
        for fd in list(self._files):
            self.close(fd)

    def thread(self, cpu: int = 0) -> SoftThread:
        """Return a thread on a logical processor; no other thread may use that at the time."""
        return SoftThread(self, self.machine.cpus[cpu])


class SoftThread:
    """A thread of execution on one logical processor.

    When an instruction faults, the processor leaves the enclave, the kernel handles the fault, and
    the thread resumes and repeats the instruction, as on silicon.  The same happens when another
    processor's interrupt makes it leave.

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

    # --- Task: that of the process, except the claim
    # --------------------------------------------------

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
