"""A thread of the program: tracee, logical processor and the driver's task in one."""

from __future__ import annotations

import os
from dataclasses import field
from typing import cast

from softsgx.driver import Mm
from softsgx.engines.native import abi
from softsgx.engines.native.abi import SigInfo
from softsgx.engines.native.tracing.image_memory import ImageMemory
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.registers import NativeRegisters
from softsgx.engines.native.tracing.tracee import Gone, Stop, Thread
from softsgx.engines.native.tracing.waits import Waits
from softsgx.engines.native.x86.areas import AreaLayouts
from softsgx.hw import EnclaveMode, LogicalProcessor, Registers
from softsgx.ondemand import dataclass
from softsgx.paging import Claim, Group

__all__ = ["Process", "ProgramThread", "Trap"]

_READ_IMPLIES_EXEC = 0x0040_0000


@dataclass(eq=False, slots=True)
class Process:
    """A thread group.

    Attributes:
        pid: its id.
        group: the limit group that its EPC is charged to.
        alive: how many threads it has.
        guarded: (base, size) of ELRANGEs with a filter: system calls of their code stop.
        guarded_descriptors: descriptors whose reads and writes stop.
        memory_descriptors: those that were opened as ``/proc/PID/mem``.
    """

    pid: int
    group: Group
    alive: int = 0
    guarded: set[tuple[int, int]] = field(default_factory=set)
    guarded_descriptors: set[int] = field(default_factory=set)
    memory_descriptors: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Trap:
    """The information for the handler of the signal of an exception.

    Attributes:
        info: the signal's information.
        vector: which exception, ``trapno`` of the signal frame.
        error: its error code, ``err`` of the frame.
        address: ``cr2`` of the frame; ``None``: the kernel's value stays.
    """

    info: SigInfo
    vector: int
    error: int
    address: int | None


@dataclass(eq=False)
class ProgramThread(Thread):
    """See the module.  It is the driver's :class:`~softsgx.driver.Task`.

    Attributes:
        process: its thread group.
        image: its address space.
        cpu: the logical processor it is.
        areas: XSAVE layouts of this machine and of the CPUID that the program sees.
        running: whether it may be executing; ``False`` while the supervisor keeps it stopped.
        pending: stops that arrived while the supervisor waited for something else.
        blocked: its signal mask before it entered an enclave, if the supervisor has changed it.
        watched: whether its calls that concern open devices stop.
        unstoppable: it is in vfork or execve and stops, even for an interrupt, only when its child
            has ended or executed a program, or the other threads of its process have ended.
        again: the next seccomp stop is the repetition of a call that the kernel shall execute.
        spurious: how often the fault at (RIP, address) was repeated without a reason.
        illegal_at: RIP and exception to report when it executes the illegal instruction of our
            vDSO.
        resumes: its stay in an enclave whose AEP is the ENCLU of our vDSO.
        kicked: whether an interrupt has taken it out of its enclave, and it has not run since.
        breakpoints: number of its set of breakpoints, 0 for none.
        outgoing: the information of the signal that is delivered, instead of the kernel's.
        claim: the pages that one instruction of it needs together.
    """

    tid: int
    waits: Waits
    process: Process
    image: ProcessImage
    cpu: LogicalProcessor
    areas: AreaLayouts
    running: bool = False
    pending: list[Stop] = field(default_factory=list)
    blocked: int | None = None
    watched: bool = False
    unstoppable: bool = False
    again: bool = False
    illegal_at: tuple[int, Trap] | None = None
    resumes: EnclaveMode | None = None
    kicked: bool = False
    breakpoints: int = 0
    user_memory: ImageMemory | None = None
    spurious: tuple[int, tuple[int, int]] = (0, (0, 0))
    outgoing: Trap | None = None
    claim: Claim = field(default_factory=Claim)
    _own_tid: int = 0

    def __post_init__(self) -> None:
        regs = NativeRegisters()
        super().__init__(self.tid, self.waits, regs)
        # Thread and processor have one set of registers: nothing is copied at a transition.
        regs.xcr0 = self.cpu.hw.config.xcr0
        self.cpu.regs = cast(Registers, regs)
        self.inject_at = self.image.vdso_base + self.image.vdso.inject

    # --- the processor --------------------------------------------------------------------------

    def machine_xstate(self) -> bytes:
        """Return the XSAVE area in the layout that CPUID describes."""
        return self.areas.described(self.xstate())

    def set_machine_xstate(self, area: bytes) -> None:
        """Replace the XSAVE area by one in the layout that CPUID describes."""
        self.set_xstate(area if self.areas.same else self.areas.real(area, self.xstate()))

    # --- the driver's task ----------------------------------------------------------------------

    @property
    def mm(self) -> Mm:
        """Its address space."""
        return self.image.mm

    @property
    def memory(self) -> ImageMemory:
        """Ordinary memory; the same object for one system call."""
        if self.user_memory is None:
            self.user_memory = self.image.memory
        return self.user_memory

    @property
    def group(self) -> Group:
        """The limit group that its EPC is charged to."""
        return self.process.group

    @property
    def personality_read_implies_exec(self) -> bool:
        """Whether every readable mapping becomes executable."""
        try:
            with open(f"/proc/{self.tid}/personality") as file:
                return bool(int(file.read(), 16) & _READ_IMPLIES_EXEC)
        except OSError:
            return False

    def file(self, fd: int) -> object | None:
        """Return the driver's file behind a descriptor, or any object for another open one."""
        device = self.image.registry.of_descriptor(self.tid, fd)
        if device is not None:
            return device.file
        return object() if os.path.lexists(f"/proc/{self.tid}/fd/{fd}") else None

    def handles(self, number: int) -> bool:
        """Return whether signal ``number``, delivered now, has a handler to run."""
        if self.sigmask() >> number - 1 & 1:
            return False
        return bool(int(self._status("SigCgt")[0], 16) >> number - 1 & 1)

    def survives_fault(self, number: int) -> bool:
        """Return whether it would repeat its fault, since signal ``number`` has no effect on it.

        The kernel does not apply the default action of a signal to the first process of a PID
        namespace; for the signal of a fault only if the process is traced.  Without the supervisor
        the fault would end it.
        """
        if not abi.FAULT_SIGNALS >> number - 1 & 1:
            return False
        made_by_fault = self.siginfo().code > 0
        return made_by_fault and self._status("NSpid")[-1] == "1" and not self.handles(number)

    def _status(self, name: str) -> list[str]:
        """Return the words of a line of ``/proc/PID/status``; none where it has no such line."""
        with open(f"/proc/{self.tid}/status") as file:
            for line in file:
                if line.startswith(f"{name}:"):
                    return line.split()[1:]
        return [""]

    @property
    def own_tid(self) -> int:
        """Its id as its own gettid() returns it, in its PID namespace."""
        if not self._own_tid:
            self._own_tid = int(self._status("NSpid")[-1] or self.tid)
        return self._own_tid

    def signal_pending(self) -> bool:
        """Return whether a signal is pending that it does not block."""
        waiting = self.waiting_signals()
        if not waiting:
            return False
        try:
            blocked = self.sigmask()
        except Gone:
            return True  # SIGKILL cannot be blocked
        return any(not blocked >> number - 1 & 1 for number in waiting)
