"""One enclave: its pages, the address spaces that map it, and how long it lives.

Each page is an :class:`EnclavePage`, which the reclaimer asks; how it is written out and loaded is
the core's business (:class:`~softsgx.paging.EnclaveSwap`).

Lock order: ``mmap_lock`` of an address space, ``Enclave.lock``, the core's locks.  So PTEs are
removed and accessed bits read without ``Enclave.lock``; a page whose PTEs go is marked first
(``reclaiming``, ``busy``), so that a fault does not put one back.

Invariants: a page is resident (``epc``), evicted (``entry``), or gone with a killed enclave;
``swap.children`` counts the resident ones; the enclave is referenced by its file, by each address
space it is registered with, and by each page in a reclaim batch.

Source:
    arch/x86/kernel/cpu/sgx/encl.c, encl.h; sgx_reclaim_pages() of main.c.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES
from typing import TYPE_CHECKING

from softsgx.arch import PAGE_SHIFT, AttributesFlags, Status
from softsgx.defects import Defect
from softsgx.driver.counts import EnclaveCounts
from softsgx.driver.events import EnclaveKilled, EnclaveReleased, ProcessorsKicked
from softsgx.driver.fault import handle as handle_fault
from softsgx.driver.mm import Mm
from softsgx.driver.page import EnclavePage
from softsgx.driver.sync import Srcu
from softsgx.driver.uapi import refuse
from softsgx.hw import Fault
from softsgx.paging import EnclaveSwap, Group, RefCounted, SgxEpcPage

if TYPE_CHECKING:
    from softsgx.driver.driver import Driver
    from softsgx.driver.task import Task

__all__ = ["UNPRIVILEGED", "Enclave", "EnclaveMm"]

UNPRIVILEGED = int(
    AttributesFlags.DEBUG
    | AttributesFlags.MODE64BIT
    | AttributesFlags.KSS
    | AttributesFlags.AEXNOTIFY
)
"""SECS.ATTRIBUTES that need no permission."""

CHECK_SCHED_PAGES = 4096
"""Pages after which a long walk lets others run: XA_CHECK_SCHED."""


class EnclaveMm:
    """An enclave is registered with an address space: ``struct sgx_encl_mm`` and its notifier."""

    __slots__ = ("enclave", "mm")

    def __init__(self, enclave: Enclave, mm: Mm) -> None:
        self.enclave, self.mm = enclave, mm

    def release(self) -> None:
        """The address space ends: nobody may walk into it any more."""
        enclave, mm = self.enclave, self.mm
        mm.forget(self)
        found = enclave._unlink(self)
        # B14: whether the entry was found was asked of the loop's cursor, which is never null.
        if found or Defect.MM_ENTRY_DROPPED_TWICE in enclave.driver.defects:
            enclave.srcu.synchronize()
            enclave._put_mm()


class Enclave(RefCounted):
    """An enclave, from the opening of its file: ``struct sgx_encl``.

    Args:
        driver: the driver.
        opening: which opening of the device it is from; its locks are called by it.

    Attributes:
        number: its name in events, 0 before CREATE: openings that create nothing are not counted.
        lock: guards pages, ``swap``, attributes and flags.
        changed: a page is no longer in motion; ``waiting`` tasks wait for that.
        base, size: its linear range, 0 before CREATE.
        attributes, xfrm: SECS.ATTRIBUTES.
        allowed: attributes INIT accepts.
        swap: its half of paging; only after CREATE.
        created, initialized: how far its building is.
        dead: it was killed.
        pages: its pages by index.
        srcu: guards walks over its address spaces.
        group: who pays for SECS and VA pages: whoever created it.
        counts: how often things happened to it.
        refusal: why the last fault that ended with SIGBUS found no EPC page or could not load;
            empty when the enclave itself was the reason.
    """

    swap: EnclaveSwap

    def __init__(self, driver: Driver, opening: int) -> None:
        self.driver, self.number = driver, 0
        runtime = driver.runtime
        super().__init__(runtime)
        self.lock = runtime.lock(f"encl{opening}")
        self.changed = runtime.condition(self.lock)
        self.waiting = 0
        self.srcu = Srcu(runtime, f"encl{opening}.srcu")
        self.base = self.size = self.attributes = self.xfrm = 0
        self.allowed = UNPRIVILEGED
        self.created = self.initialized = self.dead = False
        self.pages: dict[int, EnclavePage] = {}
        self.group: Group | None = None
        self.counts = EnclaveCounts()
        self.refusal = ""
        self._mms: tuple[EnclaveMm, ...] = ()
        self._mm_version = 0

    def __repr__(self) -> str:
        return f"<enclave {self.number}>"

    @property
    def debug(self) -> bool:
        """Whether it is a debug enclave."""
        return bool(self.attributes & AttributesFlags.DEBUG)

    def index_of(self, linaddr: int) -> int:
        """Return the page index of an address, which may be outside."""
        return linaddr - self.base >> PAGE_SHIFT

    def covers(self, index: int) -> bool:
        """Return whether a page index is in the enclave's range."""
        return 0 <= index < self.size >> PAGE_SHIFT

    # --- life -----------------------------------------------------------------------------------

    def release_file(self) -> None:
        """The file is gone: unregister from every address space, then drop its reference."""
        while True:
            with self._latch:
                entry = self._mms[0] if self._mms else None
                if entry is not None:
                    self._mms = self._mms[1:]
            if entry is None:
                break
            self.srcu.synchronize()
            entry.mm.forget(entry)
            self._put_mm()
        self.put()

    def _put_mm(self) -> None:
        # B13: only the file had a reference, so the end of an address space could outlive it.
        if Defect.MM_WITHOUT_ENCLAVE_REFERENCE not in self.driver.defects:
            self.put()

    def _destroy(self) -> None:
        """Free everything; nobody else knows the enclave any more."""
        assert not self._mms, f"{self!r} destroyed with address spaces registered"
        yields = Defect.RELEASE_WITHOUT_RESCHED not in self.driver.defects
        if self.created:
            for done, page in enumerate(list(self.pages.values()), 1):
                with self.lock:
                    freed = self._free(page)
                assert freed, f"{page!r} is in a batch that does not pin its enclave"
                if done % CHECK_SCHED_PAGES == 0 and yields:
                    self.driver.runtime.yield_now()
            self.pages.clear()
            with self.lock:
                self.swap.destroy()
        self.srcu.cleanup()
        self.driver.destroyed(self)
        self.driver.announce(EnclaveReleased(self.number))

    def _free(self, page: EnclavePage) -> bool:
        """Give back what a page has, resident or not; ``False`` when a batch has it."""
        if page.epc is not None:
            if not self.driver.core.unmark_reclaimable(page.epc):
                return False
            self.remove(page.epc)
            self.swap.shrink()
            page.epc = None
        elif page.entry is not None:
            self.swap.drop(page.entry)
            page.entry = None
        return True

    def remove(self, epc: SgxEpcPage) -> None:
        """EREMOVE a page of it that is on no list and free it; ``lock`` is held."""
        removed = self.driver.core.remove(epc)
        assert removed or Defect.EREMOVE_FAILURE_FATAL not in self.driver.defects, (
            f"BUG: EREMOVE refused {epc!r}"
        )
        self.swap.child_removed()

    def discard(self, epc: SgxEpcPage) -> bool:
        """EREMOVE a page of a killed enclave that a batch has; ``lock`` is held.

        Returns:
            ``False`` when somebody is inside again: the page stays, for the next batch.
        """
        for _try in range(2):
            try:
                if self.driver.core.leaves.eremove(epc.addr) is Status.SUCCESS:
                    self.swap.child_removed()
                    self.swap.shrink()
                    return True
            except Fault:
                pass  # its PTEs are gone, but a leaf may still hold it
            self.kick()
        return False

    def kill(self) -> int:
        """Take its memory: every later access is SIGBUS, every later ioctl EFAULT.

        No lock may be held.

        Returns:
            EPC pages freed now; those in a batch follow when it ends.
        """
        if not self.get():
            return 0
        try:
            with self.lock:
                if self.dead or not self.created:
                    return 0
                self.dead = True
                pages = list(self.pages.values())
            with self.walk() as mms:
                for mm in mms:
                    with mm.mmap_lock.reading():
                        for page in pages:
                            mm.ptes.zap(page.linaddr)
            # Their TCS pages are unmapped: whoever leaves now cannot come back.
            self.kick()
            with self.lock:
                freed = sum(page.epc is not None and self._free(page) for page in pages)
                for page in pages:
                    if page.epc is None:
                        self._free(page)
                self.changed.notify_all()
        finally:
            self.put()
        self.driver.announce(EnclaveKilled(self.number, freed))
        return freed

    # --- address spaces -------------------------------------------------------------------------

    def add_mm(self, mm: Mm) -> bool:
        """Register with an address space whose ``mmap_lock`` is held for writing.

        Returns:
            ``False`` when it has ended.
        """
        if any(entry.mm is mm for entry in self._mms):
            return True
        if not mm.alive:
            return False
        entry = EnclaveMm(self, mm)
        mm.notifiers.append(entry)
        with self._latch:
            if Defect.MM_WITHOUT_ENCLAVE_REFERENCE not in self.driver.defects:
                self._references += 1
            # The version is read before a walk and after it: the newcomer is either walked into,
            # or its faults find the page marked.
            self._mms = (entry, *self._mms)
            self._mm_version += 1
        return True

    def _unlink(self, entry: EnclaveMm) -> bool:
        with self._latch:
            found = entry in self._mms
            if found:
                self._mms = tuple(other for other in self._mms if other is not entry)
        return found

    @contextmanager
    def walk(self) -> Iterator[Iterator[Mm]]:
        """Walk over the address spaces that have not ended, each pinned while it is looked at."""
        reading = self.srcu.enter()
        try:
            yield self._spaces()
        finally:
            self.srcu.leave(reading)

    def _spaces(self) -> Iterator[Mm]:
        for entry in self._mms:
            mm = entry.mm
            if mm.pin():
                try:
                    yield mm
                finally:
                    mm.unpin()

    # Two walks as any other, without generators: each page that is to leave goes through them.

    def test_and_clear_accessed(self, page: EnclavePage) -> bool:
        """Return whether any address space has used a page; each one's accessed bit is cleared."""
        linaddr = self.base + (page.index << PAGE_SHIFT)
        stops_early = Defect.ACCESSED_BITS_OF_FIRST_MM_ONLY in self.driver.defects
        young = False
        reading = self.srcu.enter()
        try:
            for entry in self._mms:
                if young and stops_early:
                    break  # L10: the others keep their bits, and the page some more rounds
                mm = entry.mm
                if mm.pin():
                    try:
                        if mm.test_and_clear_accessed(self, linaddr):
                            young = True
                    finally:
                        mm.unpin()
        finally:
            self.srcu.leave(reading)
        return young

    def zap(self, page: EnclavePage) -> None:
        """Remove every PTE of a page that is marked; ``lock`` must not be held."""
        linaddr = self.base + (page.index << PAGE_SHIFT)
        while True:
            version = self._mm_version
            reading = self.srcu.enter()
            try:
                for entry in self._mms:
                    mm = entry.mm
                    if mm.pin():
                        try:
                            mm.zap(self, linaddr)
                        finally:
                            mm.unpin()
            finally:
                self.srcu.leave(reading)
            # B24: whoever was added meanwhile keeps its PTE.
            if version == self._mm_version or Defect.MM_WALK_NOT_REPEATED in self.driver.defects:
                return

    def kick(self) -> None:
        """Interrupt every processor that may run it, and wait until each has been.

        Asked for after ETRACK, so that whoever enters later is in the new epoch.
        """
        self.counts.kicks += 1
        spaces = 0
        with self.walk() as mms:
            for mm in mms:
                mm.ptes.kick()
                spaces += 1
        if self.driver.tracer is not None:
            self.driver.tracer(ProcessorsKicked(self.number, spaces))

    def addresses(self, start: int, end: int) -> list[int]:
        """Return the addresses of the pages it has in a range."""
        return [page.linaddr for page in self.pages_in(start, end)]

    def pages_in(self, start: int, end: int) -> list[EnclavePage]:
        """Return the pages it has in a range of addresses."""
        first, last = self.index_of(start), self.index_of(end - 1) + 1
        if last - first < len(self.pages):
            found = (self.pages.get(index) for index in range(first, last))
            return [page for page in found if page is not None]
        return [page for index, page in list(self.pages.items()) if first <= index < last]

    def may_map(self, start: int, end: int, prot: int, task: Task | None) -> None:
        """Check that a range may be mapped with PROT_* rights.

        Raises:
            OSError: EACCES.

        Source:
            sgx_encl_may_map(), encl.c.
        """
        if task is not None and task.personality_read_implies_exec:
            refuse(EACCES, "READ_IMPLIES_EXEC would make enclave pages executable")
        outside = start < self.base or end > self.base + self.size
        # B22: there was no such check.
        if self.initialized and outside and Defect.MMAP_BEYOND_ENCLAVE not in self.driver.defects:
            refuse(EACCES, f"{start:#x}-{end:#x} is not inside the enclave")
        pages = self.pages_in(start, end)
        for at in range(0, len(pages), CHECK_SCHED_PAGES):
            with self.lock:
                for page in pages[at : at + CHECK_SCHED_PAGES]:
                    if prot & ~page.max_prot:
                        refuse(EACCES, f"page {page.linaddr:#x} does not allow {prot:#x}")

    @property
    def resident_pages(self) -> int:
        """EPC pages its pages take now, without SECS and VA pages."""
        return sum(page.epc is not None for page in list(self.pages.values()))

    def check_invariants(self) -> None:
        """Compare its counts with a recount from its pages; call while nothing runs."""
        if not self.created or self.dead:
            return
        with self.lock:
            resident = self.resident_pages
            children = self.swap.children
            assert children == resident, f"{self!r}: {children} children, {resident} are resident"
            for index, page in self.pages.items():
                assert page.index == index, f"{page!r} stands at {index:#x}"
                assert (page.epc is None) != (page.entry is None), f"{page!r} is in two places"
                assert not page.reclaiming and not page.busy, f"{page!r} is still marked"
                assert page.reservation is None, f"{page!r} still has a reservation"
            self.swap.check_invariants()

    # --- faults ---------------------------------------------------------------------------------

    fault = handle_fault
