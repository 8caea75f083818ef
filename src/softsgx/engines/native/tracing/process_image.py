"""One address space of the program: its threads, vDSO, pager, and the driver's view of it.

Threads of one process share an image, and so does a vfork child until it executes a program.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from softsgx.driver import BadAddress, EnclaveFile, Mm
from softsgx.engines.native import abi, recording
from softsgx.engines.native.memory.foreign import ForeignMappings
from softsgx.engines.native.memory.memory_file import EnclaveMemory
from softsgx.engines.native.memory.page_table import EnclavePageTable, Pager
from softsgx.engines.native.memory.pagers import NoPager, make_pager
from softsgx.engines.native.memory.store import NativeStore
from softsgx.engines.native.syscalls.registry import Device, Registry
from softsgx.engines.native.tracing.image_memory import ImageMemory
from softsgx.engines.native.tracing.tracee import Gone, Thread
from softsgx.engines.native.vdso.code import CALL_WORDS, pack_calls
from softsgx.engines.native.vdso.cpuid_jumps import CpuidStubs
from softsgx.engines.native.vdso.elf import Vdso
from softsgx.engines.native.vdso.out_of_line import OutOfLineSlots
from softsgx.engines.native.vdso.path_calls import PathStubs
from softsgx.engines.native.vdso.permit_table import ExitStub, PermitTable
from softsgx.engines.native.vdso.state_jumps import StateStub
from softsgx.hw import EpcPage
from softsgx.ondemand import dataclass
from softsgx.runtime import Runtime

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.program import ProgramThread

__all__ = ["ImageServices", "ProcessImage"]

_ENCLU_BYTES = 3
#: In one table.
_MOST_CALLS = abi.PAGE // (8 * CALL_WORDS)
#: The most mappings of an enclave that are uncovered when it is entered.
_MOST_UNCOVERED = 16


@dataclass(frozen=True, slots=True)
class ImageServices:
    """Objects and callbacks that all address spaces of a run share.

    Attributes:
        pager: the name of the pager.
        strict: whether mappings of enclaves are covered for threads that are not inside.
        runtime: the driver's.
        registry: open devices.
        store: content of the EPC.
        page_at: returns the EPC page at an EPC address.
        hold: stops a running thread; returns whether it is stopped and has not died.
        kick: makes the threads of an address space that are inside an enclave leave it.
        failed: ends the processes of an address space in which calls cannot be made.
        ended: called when the driver has released an address space.
        installed: called when the driver has mapped a page of an enclave.
        recorder: records uses of pages of enclaves; ``None``: nothing does.
    """

    pager: str
    strict: bool
    runtime: Runtime
    registry: Registry
    store: NativeStore
    page_at: Callable[[int], EpcPage | None]
    hold: Callable[[ProgramThread], bool]
    kick: Callable[[ProcessImage], None]
    failed: Callable[[ProcessImage, Exception], None]
    ended: Callable[[ProcessImage], None]
    installed: Callable[[EpcPage], None]
    recorder: recording.Recorder | None = None


class ProcessImage:
    """See the module.

    Args:
        index: its number, a part of stand-in physical addresses.
        thread: the first thread in it, stopped; no system call of the program is under way.
        memory_fd: descriptor of ``/proc/PID/mem``; it reads and writes what a debugger may.
        vdso_base: address of our vDSO.
        vdso: our vDSO.
        services: objects and callbacks that address spaces share.
        parent: the address space that fork has copied.

    Attributes:
        cpuid_sites: addresses where a CPUID was replaced.
        threads: the threads that may run code in it again, by id.
        watched: whether calls of its threads that concern open devices have to stop.
        members: number of its threads that were not reaped yet.
        current: the thread whose stop is being handled.
        view: the device whose mappings are uncovered now, in a strict run.
        slots: slots for out-of-line execution.
        permits: the table of permits, ``None`` before it is made; permits_at: its address.
        has_room_for_permits: whether a table can be made.
        exit_stubs: the exit stubs in the order of their addresses.
        plain_exits: addresses of EEXITs that have no stub and always stop.
        loader: address of the dynamic loader; 0: the program has none.
        cpuid_stubs: the stubs that answer CPUID of the loader, ``None`` without any.
        path_stubs: the stubs that make calls with paths, ``None`` before the first such call.
        state_stubs: the stubs for extended state in the order of their addresses.
        plain_states: addresses of instructions on extended state that have no stub.

    Raises:
        Gone: the thread has ended.
        SoftSgxError: this machine forbids the pager of a recording.
    """

    def __init__(
        self,
        index: int,
        thread: Thread,
        memory_fd: int,
        vdso_base: int,
        vdso: Vdso,
        services: ImageServices,
        *,
        parent: ProcessImage | None = None,
    ) -> None:
        self.index, self.memory_fd = index, memory_fd
        self.vdso_base, self.vdso = vdso_base, vdso
        self.slots = OutOfLineSlots(memory_fd, vdso_base + vdso.slots)
        self.permits: PermitTable | None = None
        self.has_room_for_permits = True
        # In a fork child these are at the same addresses.
        self.permits_at: int = 0 if parent is None else parent.permits_at
        self.exit_stubs: list[ExitStub] = [] if parent is None else list(parent.exit_stubs)
        self.plain_exits: set[int] = set()
        self.loader: int = 0 if parent is None else parent.loader
        self.cpuid_stubs: CpuidStubs | None = None if parent is None else parent.cpuid_stubs
        copied = None if parent is None else parent.path_stubs
        self.path_stubs: PathStubs | None = None if copied is None else copied.copy()
        self.state_stubs: list[StateStub] = [] if parent is None else list(parent.state_stubs)
        self.plain_states: set[int] = set()
        self.registry, self.strict = services.registry, services.strict
        self.hold, self._failed = services.hold, services.failed
        self.threads: dict[int, ProgramThread] = {}
        self.members, self.watched = 0, False
        self.current: ProgramThread | None = None
        self.view: EnclaveFile | None = None
        self._deferred_calls: list[tuple[int, ...]] = []
        self._collecting = False
        self._uncovered: list[tuple[int, int]] = []
        self._used: dict[EnclaveFile, list[tuple[int, int]]] = {}
        self.cpuid_sites: set[int] = set() if parent is None else set(parent.cpuid_sites)
        known = () if parent is None else tuple(parent.foreign_mappings.ranges)
        self.foreign_mappings: ForeignMappings = ForeignMappings(self.inject, known)
        self._make_pager: Callable[[Thread], Pager] = partial(
            make_pager,
            services.pager,
            inject=self.inject,
            is_running=self.is_running,
            prot_at=self.usable_prot_at,
            failed=partial(services.failed, self),
            recorder=services.recorder,
        )
        # Most programs never map an enclave; recordings ask each pager for its uses.
        self.pager: Pager = NoPager() if services.recorder is None else self._make_pager(thread)
        make_table: Callable[..., EnclavePageTable] = EnclavePageTable
        if services.recorder is not None:
            make_table = partial(recording.RecordedPageTable, recorder=services.recorder)
        self.page_table: EnclavePageTable = make_table(
            index,
            services.store,
            services.page_at,
            self.pager,
            memory_at=self.memory_at,
            mapped_in=self.mapped_in,
            is_readable=self.can_read,
            kick_all=partial(services.kick, self),
            installed=services.installed,
        )
        ended, pid = partial(services.ended, self), thread.tid  # its first thread leads the process
        name = f"mm of {pid}"
        if parent is None:
            self.mm = Mm(services.runtime, self.page_table, ended=ended, name=name, pid=pid)
        else:
            self.mm = parent.mm.fork(self.page_table, ended=ended, name=name, pid=pid)

    @property
    def aep(self) -> int:
        """The asynchronous exit pointer of our vDSO."""
        return self.vdso_base + self.vdso.aep

    @property
    def eenter(self) -> int:
        """Address that counts as our vDSO's EENTER; the enclave gets the next one in RCX."""
        return self.vdso_base + self.vdso.eenter_after - _ENCLU_BYTES

    @property
    def memory(self) -> ImageMemory:
        """Ordinary memory, as system calls see it."""
        return ImageMemory(self.any_pid)

    def read(self, address: int, size: int) -> bytes:
        """Return up to ``size`` bytes, fewer or none where memory ends or an enclave begins."""
        if address >= abi.TASK_SIZE:  # a program may pass anything as a pointer
            return b""
        try:
            return os.pread(self.memory_fd, size, address)
        except OSError:
            return b""

    def read_string(self, address: int) -> bytes:
        """Return a path at ``address``, empty when it is not readable or too long."""
        found = b""
        while len(found) < abi.PAGE:
            part = self.read(address + len(found), 256 - (address + len(found)) % 256)
            end = part.find(0)
            if end >= 0:
                return found + part[:end]
            if not part:
                return b""
            found += part
        return b""

    def device_at(self, linaddr: int) -> Device | None:
        """Return the enclave device mapped at an address."""
        vma = self.mm.find(linaddr)
        return None if vma is None else self.registry.of_file(vma.file)

    def memory_at(self, linaddr: int) -> EnclaveMemory | None:
        """Return the memory file of the enclave mapped at an address."""
        vma = self.mm.find(linaddr)
        return None if vma is None else self.registry.of_file(vma.file).memory

    def mapped_in(self, start: int, end: int) -> list[tuple[int, int, EnclaveMemory]]:
        """Return (start, end, memory file) of the mappings of enclaves that overlap a range."""
        of_file = self.registry.of_file
        vmas = self.mm.vmas(start, end)
        return [(vma.start, vma.end, of_file(vma.file).memory) for vma in vmas]

    def prot_at(self, linaddr: int) -> int | None:
        """Return the rights the program asked for where an enclave is mapped."""
        vma = self.mm.find(linaddr)
        return None if vma is None else vma.prot

    def can_read(self, linaddr: int) -> bool:
        """Return whether the program may read ordinary memory at an address."""
        foreign = self.foreign_mappings.find(linaddr)
        return self.memory.can_read(linaddr) if foreign is None else bool(foreign.prot)

    def is_mapped(self, linaddr: int) -> bool:
        """Return whether anything is mapped at an address."""
        return self.mm.find(linaddr) is not None or self.memory.vma_info(linaddr) is not None

    def is_mapped_up_to(self, start: int, end: int) -> bool:
        """Return whether something is mapped everywhere in ``[start, end)``."""
        with open(f"/proc/{self.any_pid()}/maps") as maps:
            for line in maps:
                low, high = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
                if start >= end or start < low:
                    break
                start = max(start, high)
        return start >= end

    def is_present(self, linaddr: int) -> bool:
        """Return whether the processor's page tables have a present entry for ordinary memory."""
        pid = self.any_pid()
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
            word = os.pread(pagemap.fileno(), 8, linaddr // abi.PAGE * 8)
        if not int.from_bytes(word, "little") >> 63:
            return False
        with open(f"/proc/{pid}/maps") as maps:
            for line in maps:
                place, rights = line.split(maxsplit=2)[:2]
                start, end = (int(part, 16) for part in place.split("-"))
                if start <= linaddr < end:
                    return rights[:3] != "---"  # the kernel calls such entries present
        return False

    def mapped(self, start: int, end: int, prot: int) -> None:
        """Update the pager: a part of one enclave mapping is new, or has other rights."""
        device = self.device_at(start)
        assert device is not None, f"no enclave is mapped at {start:#x}"
        if isinstance(self.pager, NoPager):
            self._start_paging()
        self.pager.mapped(start, end, prot, device.memory.within(start, end))

    def _start_paging(self) -> None:
        """Make the pager; its descriptor is one of the program for a moment."""
        assert self.current is not None, "a mapping is new, and no thread has made it"
        for other in list(self.threads.values()):
            if other is not self.current and not (other.in_call or other.unstoppable):
                self.hold(other)  # it could find the descriptor, or pass it on by fork
        self.pager = self.page_table.pager = self._make_pager(self.current)

    # --- strict mode ----------------------------------------------------------------------------

    def is_covered(self, linaddr: int) -> bool:
        """Return whether an enclave is mapped there that no thread of the image may use now."""
        if not self.strict:
            return False
        vma = self.mm.find(linaddr)
        return vma is not None and not (
            vma.file is self.view and any(start <= linaddr < end for start, end in self._uncovered)
        )

    def usable_prot_at(self, linaddr: int) -> int | None:
        """Return the rights that the mapping of an enclave may have now."""
        if self.strict and self.is_covered(linaddr):
            return abi.PROT_NONE
        return self.prot_at(linaddr)

    def uncover(self, view: EnclaveFile | None) -> None:
        """Cover the mappings that are usable now, and uncover those of ``view``; no thread runs.

        Enclaves have many mappings and use few of them at a time, so only those used last are
        uncovered; :meth:`discover` uncovers others at their first use.
        """
        covered = self._mapped_parts(self.view, self._uncovered)
        self.view = view
        usable = []
        if view is not None:
            # A mapping may have become several since it was discovered.
            usable = self._mapped_parts(view, self._used.get(view, []))[:_MOST_UNCOVERED]
            self._used[view] = [(start, end) for start, end, _prot in usable]
        self._uncovered = [(start, end) for start, end, _prot in usable]
        with self._together():
            for start, end, _prot in covered:
                self.pager.reveal(start, end, abi.PROT_NONE)
            for start, end, prot in usable:
                self.pager.reveal(start, end, prot)

    def discover(self, linaddr: int) -> bool:
        """Uncover the mapping of its own enclave that a thread inside has hit; return whether."""
        vma = self.mm.find(linaddr)
        if vma is None or vma.file is not self.view or not self.is_covered(linaddr):
            return False
        self._uncovered.append((vma.start, vma.end))
        used = self._used.setdefault(vma.file, [])
        used.insert(0, (vma.start, vma.end))
        del used[_MOST_UNCOVERED:]
        self.pager.reveal(vma.start, vma.end, vma.prot)
        return True

    def _mapped_parts(
        self, file: EnclaveFile | None, ranges: list[tuple[int, int]]
    ) -> list[tuple[int, int, int]]:
        """Return (start, end, rights) of the mappings of ``file`` in ``ranges``, in their order."""
        return [
            (max(start, vma.start), min(end, vma.end), vma.prot)
            for start, end in ranges
            for vma in self.mm.vmas(start, end)
            if vma.file is file
        ]

    def lift(self, page: int) -> None:
        """Uncover one page, until :meth:`lower`."""
        vma = self.mm.find(page)
        if vma is not None and self.is_covered(page):
            self.pager.reveal(page, page + abi.PAGE, vma.prot)

    def lower(self, page: int) -> None:
        """Cover a page again, if it has to be."""
        if self.is_covered(page):
            self.pager.reveal(page, page + abi.PAGE, abi.PROT_NONE)

    # --- calls in the program's name ------------------------------------------------------------

    def inject(self, calls: list[tuple[int, ...]]) -> None:
        """Make system calls in the program's name; their results are ignored.

        Uses the current thread, or stops another one.  If all threads are in system calls that
        cannot be interrupted, the calls are made before any of them runs code of the program again.
        Without a living thread there is nothing to do.  A failure ends the processes that have this
        image.
        """
        self._deferred_calls += calls
        if self._collecting:
            return
        calls, self._deferred_calls = self._deferred_calls, []
        for thread in self._candidates():
            try:
                if thread is not self.current and not self.hold(thread):
                    continue
                if not thread.mid_call:
                    self._make(thread, calls)
                    return
            except Gone:
                continue
            except Exception as error:
                self._failed(self, error)
                return
        if self.threads:
            self._deferred_calls = calls

    def flush(self) -> None:
        """Make the deferred calls: the current thread is about to run code of the program."""
        self.pager.flush()
        if self._deferred_calls:
            self.inject([])

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Collect the calls that the ``with`` block injects, and make them together at its end."""
        assert not self._collecting, "calls are being collected already"
        self._collecting = True
        try:
            yield
        finally:
            self._collecting = False
        if self._deferred_calls:
            self.inject([])

    def _make(self, thread: ProgramThread, calls: list[tuple[int, ...]]) -> None:
        if len(calls) == 1:
            thread.syscall(*calls[0])
            return
        start, end = self.vdso_base + self.vdso.calls, self.vdso_base + self.vdso.called
        table = self.vdso_base + self.vdso.table
        for first in range(0, len(calls), _MOST_CALLS):
            some = calls[first : first + _MOST_CALLS]
            os.pwrite(self.memory_fd, pack_calls(some), table)
            thread.borrow(start, end, rbx=table, rbp=len(some))

    def _candidates(self) -> list[ProgramThread]:
        others = [
            thread
            for thread in self.threads.values()
            if thread is not self.current and not thread.unstoppable
        ]
        others.sort(key=lambda thread: thread.running)  # those that are stopped anyway come first
        return others if self.current is None else [self.current, *others]

    def is_running(self) -> bool:
        """Return whether any of its threads may be executing."""
        return any(thread.running for thread in self.threads.values())

    def any_pid(self) -> int:
        """Return the id of some thread that has this address space.

        Raises:
            BadAddress: there is none any more.
        """
        for thread in self.threads.values():
            return thread.tid
        raise BadAddress("the process has ended")
