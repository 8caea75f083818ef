"""One address space of the program: its threads, vDSO, pager, and the driver's view of it.

Threads of one process share an image, and so does a vfork child until it executes a program.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING

from softsgx import compiled
from softsgx.driver import EnclaveFile, Mm
from softsgx.engines.native import abi, recording
from softsgx.engines.native.mappings import mapping_at, mappings
from softsgx.engines.native.memory.memory_file import EnclaveMemory
from softsgx.engines.native.memory.page_table import EnclavePageTable, Pager
from softsgx.engines.native.memory.pagers import NoPager, make_pager
from softsgx.engines.native.memory.plain_table import FAST_PAGE_TABLE
from softsgx.engines.native.syscalls.registry import Device
from softsgx.engines.native.tracing.fresh import CopiedImage
from softsgx.engines.native.tracing.image_memory import ImageMemory
from softsgx.engines.native.tracing.image_services import ImageServices
from softsgx.engines.native.tracing.image_threads import ThreadsOfImage
from softsgx.engines.native.tracing.tracee import Thread
from softsgx.engines.native.vdso.cpuid_jumps import CpuidStubs
from softsgx.engines.native.vdso.elf import Vdso
from softsgx.engines.native.vdso.path_calls import PathStubs
from softsgx.engines.native.vdso.permit_code import STUB_BYTES
from softsgx.engines.native.vdso.stubs import MOST_STATE_STUBS, STATE_STUB_BYTES, Stubs
from softsgx.engines.native.x86.rewrite import Places

if TYPE_CHECKING:
    from softsgx.engines.native.memory.foreign import ForeignMappings
    from softsgx.engines.native.vdso.crossing_sites import ExitSite
    from softsgx.engines.native.vdso.host_jumps import EntrySite
    from softsgx.engines.native.vdso.out_of_line import OutOfLineSlots
    from softsgx.engines.native.vdso.state_jumps import EnclaveSite

__all__ = ["ProcessImage"]

_ENCLU_BYTES = 3
#: What is made at its first use, and copied by fork.
_COPIED = frozenset({"exit_stubs", "entry_stubs", "state_stubs", "foreign_mappings", "mm"})
#: The most mappings of an enclave that are uncovered when it is entered.
_MOST_UNCOVERED = 16


class ProcessImage(ThreadsOfImage):
    """See the module.

    Args:
        index: its number, a part of stand-in physical addresses.
        pid: the process that begins in it.
        vdso_base: address of our vDSO.
        vdso: our vDSO.
        services: objects and callbacks that address spaces share.
        parent: the address space that fork has copied.
        memory_fd: descriptor of ``/proc/PID/mem``; ``None``: it is opened at its first use.
        thread: its first thread, stopped; no system call of the program is under way.  ``None``:
            it is not recorded.

    Attributes:
        mm: the driver's address space.
        cpuid_sites: addresses where a CPUID was replaced.
        watched: whether calls of its threads that concern open devices have to stop.
        view: the device whose mappings are uncovered now, in a strict run.
        slots: slots for out-of-line execution.
        permits: the table of permits, ``None`` before it is made; permits_at: its address.
        has_room_for_permits: whether a table can be made.
        exit_stubs: the stubs for EEXITs; entry_stubs: those for EENTERs of the host's own code.
        loader: address of the dynamic loader; 0: the program has none.
        cpuid_stubs: the stubs that answer CPUID of the loader, ``None`` without any.
        path_stubs: the stubs that make calls with paths, ``None`` before the first such call.
        state_stubs: the stubs for instructions on extended state.

    Raises:
        Gone: the thread has ended.
        SoftSgxError: this machine forbids the pager of a recording.
    """

    # As each address space begins: most of those of short programs end so.
    has_room_for_permits = True
    view: EnclaveFile | None = None
    permits_at = loader = 0
    cpuid_stubs: CpuidStubs | None = None
    path_stubs: PathStubs | None = None

    def __init__(
        self,
        index: int,
        pid: int,
        vdso_base: int,
        vdso: Vdso,
        services: ImageServices,
        *,
        parent: ProcessImage | CopiedImage | None = None,
        memory_fd: int | None = None,
        thread: Thread | None = None,
    ) -> None:
        super().__init__(vdso_base, vdso, services.hold, NoPager())
        self.index, self._pid, self._services = index, pid, services
        if memory_fd is not None:
            self.memory_fd = memory_fd
        self.permits, self.watched = None, False
        self.registry, self.strict = services.registry, services.strict
        self.may_be_uninvolved = services.may_be_uninvolved
        self._uncovered: list[tuple[int, int]] = []
        self._used: dict[EnclaveFile, list[tuple[int, int]]] = {}
        if thread is not None and services.recorder is not None:
            self.pager = self._make_pager(thread)  # recordings ask each for its uses
        make_table: Callable[..., EnclavePageTable] = FAST_PAGE_TABLE
        if services.recorder is not None:
            make_table = partial(recording.RecordedPageTable, recorder=services.recorder)
        self.page_table = make_table(
            index,
            services.store,
            services.pages,
            self.pager,
            memory_at=self.memory_at,
            mapped_in=self.mapped_in,
            is_readable=self.can_read,
            kick_all=partial(services.kick, self),
            installed=services.installed,
        )
        self.cpuid_sites = Places()
        if parent is not None:
            self._copy(parent)

    def _copy(self, parent: ProcessImage | CopiedImage) -> None:
        """Take over what fork has copied; it is at the same addresses."""
        from softsgx.engines.native.memory.foreign import ForeignMappings

        self.permits_at, self.loader = parent.permits_at, parent.loader
        self.cpuid_stubs, self.cpuid_sites = parent.cpuid_stubs, parent.cpuid_sites.copy()
        self.path_stubs = None if parent.path_stubs is None else parent.path_stubs.copy()
        if isinstance(parent, CopiedImage):
            return
        made = vars(parent)
        if "exit_stubs" in made:
            self.exit_stubs = parent.exit_stubs.copy()
        if "entry_stubs" in made:
            self.entry_stubs = parent.entry_stubs.copy()
        if "state_stubs" in made:
            self.state_stubs = parent.state_stubs.copy()
        if "foreign_mappings" in made:
            self.foreign_mappings = ForeignMappings(
                self.inject, tuple(parent.foreign_mappings.ranges)
            )
        if "mm" in made:
            pid, ended = self._pid, partial(self._services.ended, self)
            self.mm = parent.mm.fork(self.page_table, ended=ended, name=f"mm of {pid}", pid=pid)

    # --- made at their first use: most address spaces never need them ----------------------------

    @cached_property
    def mm(self) -> Mm:
        """See the class."""
        services, pid = self._services, self._pid
        ended, name = partial(services.ended, self), f"mm of {pid}"
        return services.mm_type(services.runtime, self.page_table, ended=ended, name=name, pid=pid)

    @cached_property
    def slots(self) -> OutOfLineSlots:
        """See the class."""
        from softsgx.engines.native.vdso.out_of_line import OutOfLineSlots

        return OutOfLineSlots(self.memory_fd, self.vdso_base + self.vdso.slots)

    @cached_property
    def exit_stubs(self) -> Stubs[ExitSite]:
        """See the class."""
        from softsgx.engines.native.vdso.areas import make_area

        area = self.vdso_base + self.vdso.stubs, self.vdso.most_stubs
        return Stubs(STUB_BYTES, area, make_area)

    @cached_property
    def entry_stubs(self) -> Stubs[EntrySite]:
        """See the class."""
        from softsgx.engines.native.vdso.areas import make_area

        return Stubs(STUB_BYTES, make_area=make_area)

    @cached_property
    def state_stubs(self) -> Stubs[EnclaveSite]:
        """See the class."""
        return Stubs(STATE_STUB_BYTES, (self.vdso_base + self.vdso.state, MOST_STATE_STUBS))

    @property
    def has_state_stubs(self) -> bool:
        """Whether there are stubs for instructions on extended state."""
        return bool(vars(self).get("state_stubs"))

    @cached_property
    def foreign_mappings(self) -> ForeignMappings:
        """Mappings of other memory in the ranges of enclaves."""
        from softsgx.engines.native.memory.foreign import ForeignMappings

        return ForeignMappings(self.inject)

    def _make_pager(self, thread: Thread) -> Pager:
        services, events = self._services, None
        faults = services.waits.faults
        if faults is not None:
            events = partial(faults.add, image=self), faults.remove
        return make_pager(
            services.pager,
            thread,
            inject=self.inject,
            is_running=self.is_running,
            prot_at=self.usable_prot_at if self.strict else self.prot_at,
            failed=partial(services.failed, self),
            recorder=services.recorder,
            events=events,
        )

    def _failed(self, error: Exception) -> None:
        self._services.failed(self, error)

    def exit(self) -> None:
        """Its last thread has ended, or executes another program."""
        if "mm" in vars(self):
            self.mm.exit()
        else:
            self._services.ended(self)

    def close_memory(self) -> None:
        """Close the descriptor of its memory."""
        if "memory_fd" in vars(self):
            os.close(self.memory_fd)

    def thread_died(self, tid: int) -> None:
        """Forget a thread that runs no more code of the program."""
        del self.threads[tid]
        if "slots" in vars(self):
            self.slots.release(tid)

    @property
    def has_enclaves(self) -> bool:
        """Whether an enclave is mapped."""
        return "mm" in vars(self) and bool(self.mm.vmas())

    @property
    def has_had_enclaves(self) -> bool:
        """Whether an enclave is mapped, or may have been, and other memory where one was."""
        return "mm" in vars(self)

    @property
    def uninvolved(self) -> bool:
        """Whether it has no open device and no enclave yet: no call is made in its name."""
        return self.may_be_uninvolved and not self.watched and isinstance(self.pager, NoPager)

    @property
    def is_left_alone(self) -> bool:
        """Whether a copy that fork makes of it needs no preparation."""
        return self.uninvolved and vars(self).keys().isdisjoint(_COPIED)

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
        memory = self.memory_fd
        try:
            return os.pread(memory, size, address)
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
        mm = self.mm
        vma = mm.found
        if vma is None or not vma.start <= linaddr < vma.end:
            vma = mm.find(linaddr)
        memory: EnclaveMemory | None = None if vma is None else vma.file.memory
        return memory

    def mapped_in(self, start: int, end: int) -> list[tuple[int, int, EnclaveMemory]]:
        """Return (start, end, memory file) of the mappings of enclaves that overlap a range."""
        return [(vma.start, vma.end, vma.file.memory) for vma in self.mm.vmas(start, end)]

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
        for each in mappings(self.any_pid()):
            if start >= end or start < each.start:
                break
            start = max(start, each.end)
        return start >= end

    def is_present(self, linaddr: int) -> bool:
        """Return whether the processor's page tables have a present entry for ordinary memory."""
        pid = self.any_pid()
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
            word = os.pread(pagemap.fileno(), 8, linaddr // abi.PAGE * 8)
        if not int.from_bytes(word, "little") >> 63:
            return False
        mapping = mapping_at(pid, linaddr)
        # The kernel calls entries of memory without rights present.
        return mapping is not None and mapping.prot != abi.PROT_NONE

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


if compiled.speedups is not None:
    compiled.speedups.give("is_running", ProcessImage.is_running)
    compiled.speedups.give("mapped_in", ProcessImage.mapped_in)
