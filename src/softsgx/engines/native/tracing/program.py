"""A thread of the program: tracee, logical processor and the driver's task in one."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from softsgx.driver import Mm
from softsgx.engines.native import abi
from softsgx.engines.native.abi import SigInfo
from softsgx.engines.native.tracing.fault_fields import FaultingThread
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.registers import NativeRegisters
from softsgx.engines.native.tracing.tracee import Gone, Stop, Thread
from softsgx.engines.native.tracing.waits import Waits
from softsgx.engines.native.x86.areas import AreaLayouts
from softsgx.hw import LogicalProcessor, Registers
from softsgx.ondemand import dataclass
from softsgx.paging import Claim, Group

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.image_memory import ImageMemory

__all__ = ["Process", "ProgramThread", "Trap"]

_READ_IMPLIES_EXEC = 0x0040_0000


class Process:
    """A thread group.

    Args:
        pid: its id.
        group: the limit group that its EPC is charged to, from its first thread to its last.
        parent: the process that has made it, if a process of the program has.

    Attributes:
        alive: how many threads it has.
        guarded: (base, size) of ELRANGEs with a filter: system calls of their code stop.
        handled: signals that had a handler when one of them was last delivered.
        guarded_descriptors: descriptors whose reads and writes stop.
        memory_descriptors: those that were opened as ``/proc/PID/mem``.
        ended_in_fork: whether a thread of it has ended inside fork, or may have.
    """

    __slots__ = (
        "alive",
        "ended_in_fork",
        "group",
        "guarded",
        "guarded_descriptors",
        "handled",
        "memory_descriptors",
        "pid",
    )

    def __init__(self, pid: int, group: Group, parent: Process | None = None) -> None:
        self.pid, self.group, self.alive = pid, group, 0
        self.ended_in_fork = False
        self.guarded: set[tuple[int, int]] = set()
        self.guarded_descriptors: set[int] = set()
        self.handled: set[int] = set()
        self.memory_descriptors: set[int] = set()
        if parent is not None:
            self.guarded |= parent.guarded
            self.guarded_descriptors |= parent.guarded_descriptors
            self.memory_descriptors |= parent.memory_descriptors


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


class ProgramThread(FaultingThread, Thread):
    """See the module.  It is the driver's :class:`~softsgx.driver.Task`.

    Args:
        tid: its id.
        waits: receives its stops.
        process: its thread group.
        image: its address space.
        cpu: the logical processor it is.
        areas: XSAVE layouts of this machine and of the CPUID that the program sees.

    Attributes:
        process, image, cpu, areas: as given.
        group: the limit group that its EPC is charged to, always that of its process.
        running: whether it may be executing; ``False`` while the supervisor keeps it stopped.
        pending: stops that arrived while the supervisor waited for something else.
        blocked: its signal mask before it entered an enclave, if the supervisor has changed it.
        watched: whether its calls that concern open devices stop.
        unstoppable: it is in vfork or execve and stops, even for an interrupt, only when its child
            has ended or executed a program, or the other threads of its process have ended.
        announces_end: whether it stops before it ends.
        again: a call that the thread repeats, so that the kernel executes it.  If it stops, it does
            so next, unless a handler of a signal makes calls before.
        spurious: how often the fault at (RIP, address) was repeated without a reason.
        illegal_at: RIP and exception to report when it executes the illegal instruction of our
            vDSO.
        resumes: its stay in an enclave whose AEP is the ENCLU of our vDSO.
        kicked: whether an interrupt has taken it out of its enclave, and it has not run since.
        breakpoints: number of its set of breakpoints, 0 for none.
        outgoing: the information of the signal that is delivered, instead of the kernel's.
        went_in: its registers when it went into its enclave, if it had stopped for that.
        held_up: how many signals in a row have found it there.
        pause_ns: how long its signals pause; 0: they do not.
        paused_until_ns: when that ends, on the clock of the waits.
        ran_ns: its processor time when the pause began.
        claim: the pages that one instruction of it needs together.
    """

    # As each thread begins: most threads of short programs end so.
    announces_end = kicked = False
    again: tuple[int, ...] | None = None
    illegal_at: tuple[int, Trap] | None = None
    _own_tid = 0
    went_in = b""
    held_up = pause_ns = paused_until_ns = ran_ns = 0
    user_memory: ImageMemory | None = None
    outgoing: Trap | None = None

    def __init__(
        self,
        tid: int,
        waits: Waits,
        process: Process,
        image: ProcessImage,
        cpu: LogicalProcessor,
        areas: AreaLayouts,
    ) -> None:
        regs = NativeRegisters()
        super().__init__(tid, waits, regs)
        self.running = self.watched = self.unstoppable = False
        self.blocked = self.resumes = None
        self.breakpoints, self.spurious = 0, (0, (0, 0))
        self.process, self.image, self.cpu, self.areas = process, image, cpu, areas
        self.group = process.group  # asked for at each fault
        self.pending: list[Stop] = []
        self.claim = Claim()
        # Thread and processor have one set of registers: nothing is copied at a transition.
        regs.xcr0 = areas.xcr0
        cpu.regs = cast(Registers, regs)
        self.inject_at = image.vdso_base + image.vdso.inject

    # --- stops ----------------------------------------------------------------------------------

    def announce_end(self) -> None:
        """Make the stopped thread stop before it ends."""
        if not self.announces_end:
            self.announces_end = True
            self._set_options(abi.TRACE_OPTIONS | abi.PTRACE_O_TRACEEXIT)

    def end_silently(self) -> None:
        """Undo :meth:`announce_end`."""
        if self.announces_end:
            self.announces_end = False
            self._set_options(abi.TRACE_OPTIONS)

    def _set_options(self, options: int) -> None:
        with suppress(Gone):  # it has been killed
            self._request(abi.PTRACE_SETOPTIONS, 0, options)

    def stop_after_call(self) -> None:
        """If it is in vfork, make it stop before it runs code of the program again."""
        if self.unstoppable and not self.in_call:
            self.in_call = True
            with suppress(Gone):
                self.interrupt()

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
