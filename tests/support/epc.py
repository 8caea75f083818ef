"""Toy enclaves for tests of the EPC core: real leaves, no driver, no processors.

A :class:`ToyEnclave` keeps the rules that the driver keeps (one lock, a reference count, PTEs as a
flag a page) and remembers what was written to each page, so that a lost or foreign byte shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.support.hw import secs_of

from softsgx.arch import PAGE_BYTES, PageType, SecInfo
from softsgx.hw import Machine, PageInfoArgs
from softsgx.hw.secs import ResidentSecs
from softsgx.hw.tracking import count_in, count_out
from softsgx.paging import (
    BackingFile,
    Claim,
    EnclaveSwap,
    EpcBusy,
    EpcCore,
    Group,
    MemoryBacking,
    Reservation,
    SgxEpcPage,
    SwapEntry,
)

__all__ = ["ToyEnclave", "ToyPage", "block_of"]

_RW = 3
_MOST_ATTEMPTS = 10_000


def block_of(number: int) -> bytes:
    """Return 4096 bytes that differ from those of every other ``number``."""
    return number.to_bytes(8, "little") * (PAGE_BYTES // 8)


@dataclass(eq=False)
class ToyPage:
    """One page of a toy enclave: the owner that the reclaimer asks.

    Attributes:
        content: what the page must hold.
        mapped: whether a PTE maps it.
        accessed: the PTE's accessed bit.
    """

    encl: ToyEnclave
    index: int
    content: bytes
    epc: SgxEpcPage | None = None
    entry: SwapEntry | None = None
    reservation: Reservation | None = None
    mapped: bool = False
    accessed: bool = False

    @property
    def leaving(self) -> bool:
        """BEING_RECLAIMED, or blocked by an eviction that failed."""
        return self.reservation is not None or (self.epc is not None and self.epc.blocked)

    def get(self) -> bool:
        return self.encl.get()

    def put(self) -> None:
        self.encl.put()

    def age(self) -> bool:
        young, self.accessed = self.accessed, False
        return not young

    def prepare(self) -> bool:
        with self.encl.lock:
            if self.epc is None:
                return False
            self.reservation = self.encl.swap.prepare(self.index)
            return self.reservation is not None

    def block(self) -> bool:
        self.mapped = False
        with self.encl.lock:
            assert self.epc is not None and self.reservation is not None
            if self.encl.swap.block(self.epc):
                return True
            self.encl.swap.cancel(self.reservation)
            self.reservation = None
            return False

    def write(self) -> bool:
        with self.encl.lock:
            assert self.epc is not None and self.reservation is not None
            reservation, self.reservation = self.reservation, None
            entry = self.encl.swap.write(self.epc, reservation)
            if entry is None:
                return False
            self.epc, self.entry = None, entry
            return True


@dataclass(eq=False)
class ToyEnclave:
    """An enclave of REG pages.

    Attributes:
        initialised: whether its SECS may leave.
        kicks: how often its processors were interrupted.
        inside: entry epochs of the "processors" that are in it.
    """

    core: EpcCore
    machine: Machine
    size_pages: int = 64
    number: int = 1
    backing: BackingFile = field(default_factory=MemoryBacking)
    group: Group | None = None
    initialised: bool = True
    pages: dict[int, ToyPage] = field(default_factory=dict)
    refs: int = 1
    destroyed: bool = False
    kicks: int = 0
    inside: list[int] = field(default_factory=list)
    on_kick: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.base = self.number * 0x1_0000_0000
        self.lock = self.core.runtime.lock(f"encl{self.number}")
        self.swap = EnclaveSwap(
            self.core,
            self.backing,
            pages=self.size_pages,
            base=self.base,
            lock=self.lock,
            pin=self,
            kick=self.kick,
            group=self.group,
        )
        self.swap.grow()
        epc = self.core.alloc(None, reclaim=True, kind="secs", group=self.group)
        secs = secs_of(self.size_pages * PAGE_BYTES, self.base)
        info = PageInfoArgs(srcpge=secs.pack(), secinfo=SecInfo.of(PageType.SECS))
        self.machine.leaves.ecreate(info, epc.addr)
        self.swap.set_secs(epc)
        self.swap.secs_may_leave = self.initialised

    # --- life -----------------------------------------------------------------------------------

    def get(self) -> bool:
        if self.refs == 0:
            return False
        self.refs += 1
        return True

    def put(self) -> None:
        self.refs -= 1
        if self.refs == 0:
            self._destroy()

    close = put

    def _destroy(self) -> None:
        with self.lock:
            for page in self.pages.values():
                assert page.reservation is None, "destroyed while a page is being evicted"
                if page.epc is not None:
                    assert self.core.unmark_reclaimable(page.epc), "destroyed in a batch"
                    self.swap.child_removed()
                    self.core.remove(page.epc)
                elif page.entry is not None:
                    self.swap.drop(page.entry)
            self.swap.destroy()
        self.destroyed = True

    # --- processors -------------------------------------------------------------------------------

    @property
    def hardware(self) -> ResidentSecs:
        """The processor's view; the SECS must be resident."""
        assert self.swap.secs is not None, "the SECS is evicted"
        page = self.machine.page_at(self.swap.secs.addr)
        assert page is not None
        return page.owner

    def enter(self) -> None:
        """A processor enters and stays until it is kicked out."""
        self.inside.append(count_in(self.hardware))

    def kick(self) -> None:
        self.kicks += 1
        for epoch in self.inside:
            count_out(self.hardware, epoch)
        self.inside.clear()
        if self.on_kick is not None:
            self.on_kick()

    # --- pages ------------------------------------------------------------------------------------

    def add(self, index: int, content: bytes | None = None, **alloc: object) -> ToyPage:
        """EADD a page; may reclaim."""
        assert index not in self.pages, f"page {index} exists"
        content = block_of(self.number << 32 | index) if content is None else content
        self.swap.grow()
        epc = self.core.alloc(None, reclaim=True, group=self.group, **alloc)  # type: ignore[arg-type]
        while True:
            try:
                with self.lock:
                    page = ToyPage(self, index, content)
                    linaddr = self.base + index * PAGE_BYTES
                    secs = self.swap.load_secs().addr
                    info = PageInfoArgs(linaddr, content, SecInfo.of(PageType.REG, _RW), secs)
                    self.machine.leaves.eadd(info, epc.addr)
                    self.swap.child_added()
                    self.pages[index] = page
                    page.epc, epc.owner = epc, page
                    self.core.mark_reclaimable(epc)
                    return page
            except EpcBusy as busy:
                self.core.wait_for_page(busy)

    @contextmanager
    def instruction(self) -> Iterator[Claim]:
        """What one thread does until an instruction of it has completed."""
        claim = Claim()
        try:
            yield claim
        finally:
            self.core.claims.release(claim)

    def touch(self, index: int) -> None:
        """Fault page ``index`` in if need be, and use it."""
        with self.instruction() as claim:
            self.fault(index, claim)

    def fault(self, index: int, claim: Claim) -> None:
        """Make page ``index`` resident and use it, for the thread of ``claim``."""
        page = self.pages[index]
        for _attempt in range(_MOST_ATTEMPTS):
            try:
                with self.lock:
                    if page.epc is None:
                        assert page.entry is not None
                        epc = self.swap.load(page.entry, page, group=self.group, claim=claim)
                        page.epc, page.entry = epc, None
                        self.core.mark_reclaimable(epc)
                    if not page.leaving:
                        page.mapped = page.accessed = True
                        return
                    blocked = page.reservation is None
            except EpcBusy as busy:
                self.core.wait_for_page(busy)
                continue
            if blocked:  # by an eviction that failed: another one has to take it out
                self.core.reclaim(self.group, force=True)
            self.core.runtime.yield_now()
        raise AssertionError(f"page {index} does not come, nor is it said that there is no memory")

    def execute(self, indices: Sequence[int], *, patience: int = _MOST_ATTEMPTS) -> int:
        """Execute an instruction that needs all these pages at once.

        Returns:
            How often it was begun.
        """
        with self.instruction() as claim:
            for attempt in range(patience):
                for index in indices:
                    self.fault(index, claim)
                with self.lock:
                    pages = [self.pages[index] for index in indices]
                    if all(page.epc is not None and not page.leaving for page in pages):
                        return attempt + 1
                self.core.runtime.yield_now()
        raise AssertionError(f"an instruction that needs pages {indices} never completes")

    def read(self, index: int) -> bytes:
        """Touch the page and return its bytes, taken while it is certainly there."""
        with self.instruction() as claim:
            while True:
                self.fault(index, claim)
                with self.lock:
                    epc = self.pages[index].epc
                    if epc is not None and not self.pages[index].leaving:
                        page = self.machine.page_at(epc.addr)
                        assert page is not None
                        return self.machine.store.read(page, 0, PAGE_BYTES)

    def store(self, index: int, content: bytes) -> None:
        """Touch the page and fill it with 4096 bytes."""
        with self.instruction() as claim:
            while True:
                self.fault(index, claim)
                with self.lock:
                    epc = self.pages[index].epc
                    if epc is not None and not self.pages[index].leaving:
                        page = self.machine.page_at(epc.addr)
                        assert page is not None
                        self.machine.store.write(page, 0, content)
                        self.pages[index].content = content
                        return

    def remove(self, index: int) -> bool:
        """Remove a page for good; ``False`` when a batch has it."""
        with self.lock:
            page = self.pages[index]
            if page.entry is not None:
                self.swap.drop(page.entry)
            else:
                assert page.epc is not None
                if not self.core.unmark_reclaimable(page.epc):
                    return False
                self.swap.child_removed()
                self.swap.shrink()
                self.core.remove(page.epc)
            del self.pages[index]
            return True

    def check(self) -> None:
        """Every page holds what was written to it (loads them all)."""
        for index, page in sorted(self.pages.items()):
            assert self.read(index) == page.content, f"page {index} holds other bytes"

    def check_invariants(self) -> None:
        """Compare the counts with the pages."""
        self.swap.check_invariants()
        resident = [page for page in self.pages.values() if page.epc is not None]
        assert self.swap.children == len(resident), "secs_child_cnt differs from resident pages"
        evicted = [page for page in self.pages.values() if page.entry is not None]
        slots = len(evicted) + (self.swap.secs_entry is not None)
        held = sum(page.reservation is not None for page in resident)
        held += self.swap._secs_page.reservation is not None
        assert self.swap.va.used == slots + held, "VA slots in use differ from evicted pages"
