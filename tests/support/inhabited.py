"""An enclave with threads in it, for tests of tracking.

:class:`Inhabited` builds an enclave by the real leaves, maps it into a process, lets logical
processors enter, leave, be interrupted and touch memory, and plays the operating system that
blocks, tracks, evicts and loads its pages by their offsets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.support.hw import (
    DEFAULT_BASE,
    Built,
    PageSpec,
    build_enclave,
    make_machine,
    map_enclave,
    reg,
    secs_of,
    tcs,
)
from tests.support.paging import Blob, outcome, pattern

from softsgx.arch import PAGE_BYTES, AttributesFlags, PageType, SecInfo, Status
from softsgx.hw import EpcPage, LogicalProcessor, Machine, PageInfoArgs, PageTables
from softsgx.hw.access import load, store
from softsgx.hw.leaves.aex import interrupt
from softsgx.hw.secs import ResidentSecs
from softsgx.runtime import Runtime
from softsgx.trace import Tracer

__all__ = ["AEP", "DATA", "SECINFO_PAGE", "SIZE", "Inhabited"]

AEP, EXIT_TO = 0x40_1000, 0x40_2000
DATA = tuple(page * PAGE_BYTES for page in range(4))  # offsets of data pages
SECINFO_PAGE = 4 * PAGE_BYTES
_THREADS_AT = 5 * PAGE_BYTES  # TCS and two SSA frames each
SIZE = 0x2_0000
NSSA = 2


def _layout(threads: int) -> list[PageSpec]:
    pages = [reg(pattern(number)) for number in range(len(DATA))] + [reg()]
    for number in range(threads):
        at = _THREADS_AT + number * (1 + NSSA) * PAGE_BYTES
        pages.append(tcs(ossa=at + PAGE_BYTES, nssa=NSSA))
        pages.extend(reg() for _ in range(NSSA))
    return pages


@dataclass
class Inhabited:
    """A machine with one enclave; more come by :meth:`another`.

    Attributes:
        threads: TCSs of the enclave and logical processors of the machine.
        readable: its machine has the readable leaves only, which have points.
        blobs: evicted pages by offset.
    """

    threads: int = 3
    machine: Machine | None = None
    runtime: Runtime | None = None
    tracer: Tracer | None = None
    debug: bool = False
    base: int = DEFAULT_BASE
    readable: bool = False
    blobs: dict[int, Blob] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.machine is None:
            self.machine = make_machine(
                processors=self.threads,
                runtime=self.runtime,
                tracer=self.tracer,
                optimised=not self.readable,
            )
        self.hw: Machine = self.machine
        flags = AttributesFlags.MODE64BIT | (AttributesFlags.DEBUG if self.debug else 0)
        self.built: Built = build_enclave(
            self.hw, _layout(self.threads), secs=secs_of(SIZE, self.base, flags=flags)
        )
        self.tables: PageTables = map_enclave(self.built)
        self.va = self.free()
        self.hw.leaves.epa(int(PageType.VA), self.va)
        self._next_slot = 0

    def another(self, base: int = DEFAULT_BASE) -> Inhabited:
        """Return another enclave on the same machine, in a process of its own."""
        return Inhabited(self.threads, self.hw, base=base)

    # --- names -------------------------------------------------------------------------------

    @property
    def leaves(self) -> Any:
        """The operating system's leaves."""
        return self.hw.leaves

    @property
    def enclave(self) -> ResidentSecs:
        """The enclave, while its SECS is resident."""
        return self.built.enclave

    def page(self, offset: int) -> EpcPage:
        """Return the EPC page that is or was at an offset."""
        return self.built.page(offset)

    def tcs(self, thread: int) -> int:
        """Return the offset of a thread's TCS."""
        return _THREADS_AT + thread * (1 + NSSA) * PAGE_BYTES

    def free(self) -> int:
        """Return an EPC page that is not in use."""
        for section in self.hw.config.sections:
            for index in range(section.pages):
                addr = section.page(index)
                page = self.hw.page_at(addr)
                if page is not None and not page.valid:
                    return addr
        raise AssertionError("the EPC is full")

    def slot(self) -> int:
        """Return a VA slot that was not given out yet."""
        self._next_slot += 8
        return self.va + self._next_slot - 8

    # --- threads -----------------------------------------------------------------------------

    def cpu(self, number: int) -> LogicalProcessor:
        """Return a processor, in this enclave's process unless it is inside another."""
        cpu = self.hw.cpus[number]
        if cpu.inside is None:
            cpu.space, cpu.cpl = self.tables, 3
        return cpu

    def enter(self, number: int, thread: int | None = None) -> None:
        """Let a processor EENTER the TCS of a thread, by default the one of its number."""
        cpu = self.cpu(number)
        cpu.regs.rip = AEP
        cpu.enclu.eenter(self.base + self.tcs(number if thread is None else thread), AEP)

    def resume(self, number: int, thread: int | None = None) -> None:
        """Let a processor ERESUME."""
        cpu = self.cpu(number)
        cpu.enclu.eresume(self.base + self.tcs(number if thread is None else thread), AEP)

    def exit(self, number: int) -> None:
        """Let a processor EEXIT."""
        self.cpu(number).enclu.eexit(EXIT_TO)

    def interrupt(self, number: int) -> bool:
        """Send an interrupt: AEX if the processor is inside."""
        return interrupt(self.cpu(number))

    def read(self, number: int, offset: int, size: int = 8) -> bytes:
        """Let a processor load from the enclave's range."""
        return load(self.cpu(number), self.base + offset, size)

    def write(self, number: int, offset: int, data: bytes) -> None:
        """Let a processor store to the enclave's range."""
        store(self.cpu(number), self.base + offset, data)

    def accept(self, number: int, offset: int, flags: int) -> object:
        """Let a processor EACCEPT a page as SECINFO ``flags`` say."""
        self.write(number, SECINFO_PAGE, SecInfo(flags=flags).pack())
        cpu = self.cpu(number)
        return outcome(lambda: cpu.enclu.eaccept(self.base + SECINFO_PAGE, self.base + offset))

    # --- the operating system ----------------------------------------------------------------

    def block(self, offset: int) -> object:
        """EBLOCK."""
        return outcome(lambda: self.leaves.eblock(self.built.epc(offset)))

    def track(self) -> object:
        """ETRACK."""
        return outcome(lambda: self.leaves.etrack(self.built.secs))

    def ewb(self, offset: int, slot: int | None = None) -> object:
        """EWB; on success the blob is kept and the page's address forgotten."""
        blob = Blob(bytearray(PAGE_BYTES), bytearray(128), self.slot() if slot is None else slot)
        info = PageInfoArgs(0, blob.srcpge, blob.pcmd)
        status = outcome(lambda: self.leaves.ewb(info, self.built.epc(offset), blob.slot))
        if status in (Status.SUCCESS, Status.VA_SLOT_OCCUPIED):
            blob.linaddr, blob.secs = info.linaddr, self.built.secs
            self.blobs[offset] = blob
        return status

    def eldu(self, offset: int, addr: int | None = None, leaf: str = "eldu") -> object:
        """ELDU of the kept blob; on success it is mapped again, and the blob stays kept."""
        blob = self.blobs[offset]
        blob.secs = self.built.secs
        where = self.free() if addr is None else addr
        status = outcome(lambda: getattr(self.leaves, leaf)(blob.args(), where, blob.slot))
        if status == Status.SUCCESS:
            self.built.pages[self.base + offset] = where
            self.tables.map(self.base + offset, where, 7)
        return status

    def evict(self, offset: int) -> None:
        """Do all that an eviction takes, with nobody inside."""
        assert self.block(offset) == Status.SUCCESS
        assert self.track() == Status.SUCCESS
        assert self.ewb(offset) == Status.SUCCESS

    def evict_secs(self) -> Blob:
        """EWB of the SECS, which must work."""
        blob = Blob(bytearray(PAGE_BYTES), bytearray(128), self.slot())
        info = PageInfoArgs(0, blob.srcpge, blob.pcmd)
        assert self.leaves.ewb(info, self.built.secs, blob.slot) == Status.SUCCESS
        return blob

    def remove(self, offset: int) -> object:
        """EREMOVE."""
        return outcome(lambda: self.leaves.eremove(self.built.epc(offset)))
