"""One enclave: its pages, the address spaces that map it, and its lifetime.

Each page is an :class:`EnclavePage`, which the reclaimer calls;
:class:`~softsgx.paging.EnclaveSwap` evicts and loads it.

Lock order: ``mmap_lock`` of an address space, ``Enclave.lock``, the core's locks.  So PTEs are
removed and accessed bits read without ``Enclave.lock``; a page is marked before its PTEs are
removed (``being_reclaimed``, ``being_modified``), so that a fault does not insert one.

Invariants: a page is resident (``epc``), evicted (``entry``), or freed by :meth:`Enclave.kill`;
``swap.children`` is the number of resident pages; the enclave is referenced by its file, by each
address space it is registered with, and by each page in a reclaim batch.

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
from softsgx.driver.fault import Outcome
from softsgx.driver.mm import EnclaveVma, Mm
from softsgx.driver.page import EnclavePage
from softsgx.driver.pages import EnclavePages
from softsgx.driver.sync import Srcu
from softsgx.driver.uapi import refuse
from softsgx.hw import Fault
from softsgx.paging import EnclaveSwap, Group, RefCounted, SgxEpcPage

if TYPE_CHECKING:
    from softsgx.arch import Secs
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
"""Pages after which a long walk lets other tasks run: XA_CHECK_SCHED."""


class EnclaveMm:
    """The registration of an enclave with an address space: ``struct sgx_encl_mm``."""

    __slots__ = ("enclave", "mm")

    def __init__(self, enclave: Enclave, mm: Mm) -> None:
        self.enclave, self.mm = enclave, mm

    def release(self) -> None:
        """The address space ends: unregister it, so that no walk enters it any more."""
        enclave, mm = self.enclave, self.mm
        mm.forget(self)
        found = enclave._unlink(self)
        if found or Defect.MM_ENTRY_DROPPED_TWICE in enclave.driver.defects:
            enclave.srcu.synchronize()
            enclave._put_mm()


class Enclave(RefCounted):
    """An enclave, from the opening of its file: ``struct sgx_encl``.

    Args:
        driver: the driver.
        opening: number of the opening of the device; names its locks.

    Attributes:
        number: its number in events; 0 before CREATE.
        lock: protects pages, swapping, attributes and flags.
        changed: notified when a page is no longer busy; ``waiting`` tasks wait for that.
        base, size: its linear range; 0 before CREATE.
        attributes, xfrm: SECS.ATTRIBUTES.
        allowed: attributes that INIT accepts.
        created, initialized: whether CREATE and INIT have succeeded.
        dead: it was killed.
        pages: its pages by index.
        modified: pages that an ioctl changes which has released the lock for a while.
        mms: its registrations with address spaces; a change replaces the tuple.
        srcu: protects walks over them.
        group: charged for SECS and VA pages: that of the task that called CREATE.
        counts: numbers of events.
        refusal: why the last fault that ended with SIGBUS found no EPC page or could not load;
            empty when the access itself was wrong.
    """

    __slots__ = (
        "_mm_version",
        "_swap",
        "allowed",
        "attributes",
        "base",
        "changed",
        "counts",
        "created",
        "dead",
        "driver",
        "group",
        "initialized",
        "lock",
        "mms",
        "modified",
        "number",
        "pages",
        "refusal",
        "size",
        "srcu",
        "waiting",
        "xfrm",
    )

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
        self.pages = EnclavePages()
        self.modified: set[EnclavePage] = set()
        self.group: Group | None = None
        self.counts = EnclaveCounts()
        self.refusal = ""
        self._swap: EnclaveSwap | None = None
        self.mms: tuple[EnclaveMm, ...] = ()
        self._mm_version = 0

    def __repr__(self) -> str:
        return f"<enclave {self.number}>"

    @property
    def swap(self) -> EnclaveSwap:
        """Its swapping; there is none before CREATE."""
        swap = self._swap
        assert swap is not None, f"{self!r} is not created"
        return swap

    def create(self, swap: EnclaveSwap, secs: Secs, group: Group | None, number: int) -> None:
        """ECREATE has succeeded: the enclave has a SECS, a range and a number from now on."""
        self._swap, self.group, self.number = swap, group, number
        self.base, self.size = secs.base, secs.size
        self.attributes, self.xfrm = secs.attributes.flags, secs.attributes.xfrm
        self.created = True

    @property
    def debug(self) -> bool:
        """Whether it is a debug enclave."""
        return bool(self.attributes & AttributesFlags.DEBUG)

    def index_of(self, linaddr: int) -> int:
        """Return the page index of an address, which may be outside the enclave."""
        return linaddr - self.base >> PAGE_SHIFT

    def covers(self, index: int) -> bool:
        """Return whether a page index is in the enclave's range."""
        return 0 <= index < self.size >> PAGE_SHIFT

    # --- lifetime -------------------------------------------------------------------------------

    def release_file(self) -> None:
        """Unregister from every address space, then drop the reference of the file."""
        while True:
            with self._latch:
                entry = self.mms[0] if self.mms else None
                if entry is not None:
                    self.mms = self.mms[1:]
            if entry is None:
                break
            self.srcu.synchronize()
            entry.mm.forget(entry)
            self._put_mm()
        self.put()

    def _put_mm(self) -> None:
        if Defect.MM_WITHOUT_ENCLAVE_REFERENCE not in self.driver.defects:
            self.put()

    def _destroy(self) -> None:
        """Free every page: the last reference was given back."""
        assert not self.mms, f"{self!r} destroyed with address spaces registered"
        yields = Defect.RELEASE_WITHOUT_RESCHED not in self.driver.defects
        if self.created:
            for done, page in enumerate(self.pages.drain(), 1):
                with self.lock:
                    freed = self._free_page(page)
                assert freed, f"{page!r} is in a batch that does not pin its enclave"
                if done % CHECK_SCHED_PAGES == 0 and yields:
                    self.driver.runtime.yield_now()
            with self.lock:
                self.swap.destroy()
        self.srcu.cleanup()
        self.driver.forget_enclave(self)
        self.driver.trace_lifecycle(EnclaveReleased(self.number))

    def _free_page(self, page: EnclavePage) -> bool:
        """Free a page, resident or evicted; ``False``: a batch has it."""
        if page.epc is not None:
            if not self.driver.core.unmark_reclaimable(page.epc):
                return False
            self.free_epc_page(page.epc)
            self.swap.shrink()
            page.epc = None
        elif (entry := page.entry) is not None:
            self.swap.drop(entry)
            page.entry = None
        return True

    def free_epc_page(self, epc: SgxEpcPage) -> None:
        """EREMOVE and free an EPC page of it that is on no LRU list; ``lock`` is held."""
        removed = self.driver.core.remove(epc)
        assert removed or Defect.EREMOVE_FAILURE_FATAL not in self.driver.defects, (
            f"BUG: EREMOVE refused {epc!r}"
        )
        self.swap.child_removed()

    def remove_killed(self, epc: SgxEpcPage) -> bool:
        """EREMOVE a page of a killed enclave that a batch has isolated; ``lock`` is held.

        Returns:
            ``False``: a thread is inside the enclave; the page stays for the next batch.
        """
        for _try in range(2):
            try:
                if self.driver.core.leaves.eremove(epc.addr) is Status.SUCCESS:
                    self.swap.child_removed()
                    self.swap.shrink()
                    return True
            except Fault:
                pass  # another leaf holds the page, although it has no PTE any more
            self.kick()
        return False

    def kill(self) -> int:
        """Free its pages: every later access is SIGBUS, every later ioctl EFAULT.

        The caller holds no lock.

        Returns:
            EPC pages freed now; pages in a batch are freed when it ends.
        """
        if not self.get():
            return 0
        try:
            with self.lock:
                if self.dead or not self.created:
                    return 0
                self.dead = True
            with self.walk() as mms:
                for mm in mms:
                    with mm.mmap_lock.reading():
                        for page in self.pages.values():
                            mm.ptes.zap(page.linaddr)
            # The TCS pages are unmapped: a thread that exits from now on cannot enter again.
            self.kick()
            with self.lock:
                pages = self.pages.values()
                freed = sum(page.epc is not None and self._free_page(page) for page in pages)
                for page in pages:
                    if page.epc is None:
                        self._free_page(page)
                self.changed.notify_all()
        finally:
            self.put()
        self.driver.trace_lifecycle(EnclaveKilled(self.number, freed))
        return freed

    def page_changed(self) -> None:
        """Tell the tasks that wait for a page, which is no longer busy; takes ``lock``."""
        with self.lock:
            self.changed.notify_all()

    # --- address spaces -------------------------------------------------------------------------

    def add_mm(self, mm: Mm) -> bool:
        """Register with an address space whose ``mmap_lock`` is held for writing.

        Returns:
            ``False``: the address space has ended.
        """
        if any(entry.mm is mm for entry in self.mms):
            return True
        if not mm.alive:
            return False
        entry = EnclaveMm(self, mm)
        mm.notifiers.append(entry)
        with self._latch:
            if Defect.MM_WITHOUT_ENCLAVE_REFERENCE not in self.driver.defects:
                self.references += 1
            # A walk compares the version before and after: either it visits the new address space,
            # or faults of that address space find the page marked.
            self.mms = (entry, *self.mms)
            self._mm_version += 1
        return True

    def _unlink(self, entry: EnclaveMm) -> bool:
        with self._latch:
            found = entry in self.mms
            if found:
                self.mms = tuple(other for other in self.mms if other is not entry)
        return found

    @contextmanager
    def walk(self) -> Iterator[Iterator[Mm]]:
        """Yield the address spaces that have not ended, each pinned while it is visited."""
        reading = self.srcu.enter()
        try:
            yield self._spaces()
        finally:
            self.srcu.leave(reading)

    def _spaces(self) -> Iterator[Mm]:
        for entry in self.mms:
            mm = entry.mm
            if mm.pin():
                try:
                    yield mm
                finally:
                    mm.unpin()

    # The next methods walk without generators, since the reclaimer calls them often.

    def test_and_clear_accessed(self, page: EnclavePage) -> bool:
        """Test and clear a page's accessed bits in every address space; ``True``: one was set."""
        linaddr = self.base + (page.index << PAGE_SHIFT)
        stops_early = Defect.ACCESSED_BITS_OF_FIRST_MM_ONLY in self.driver.defects
        young = False
        reading = self.srcu.enter()
        try:
            for entry in self.mms:
                if young and stops_early:
                    break
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
                for entry in self.mms:
                    mm = entry.mm
                    if mm.pin():
                        try:
                            mm.zap(self, linaddr)
                        finally:
                            mm.unpin()
            finally:
                self.srcu.leave(reading)
            if version == self._mm_version or Defect.MM_WALK_NOT_REPEATED in self.driver.defects:
                return

    def kick(self) -> None:
        """Interrupt every processor that may run the enclave, and wait for each.

        After ETRACK: a thread that enters later is in the new epoch.
        """
        self.counts.kicks += 1
        spaces = 0
        reading = self.srcu.enter()
        try:
            for entry in self.mms:
                mm = entry.mm
                if mm.pin():
                    try:
                        mm.ptes.kick()
                        spaces += 1
                    finally:
                        mm.unpin()
        finally:
            self.srcu.leave(reading)
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
        return [page for index, page in self.pages.items() if first <= index < last]

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
        """EPC pages that it has now, without SECS and VA pages."""
        return sum(page.epc is not None for page in self.pages.values())

    def check_invariants(self) -> None:
        """Compare its counts with its pages; call it while no task runs."""
        if not self.created or self.dead:
            return
        with self.lock:
            resident = self.resident_pages
            children = self.swap.children
            assert children == resident, f"{self!r}: {children} children, {resident} are resident"
            for index, page in self.pages.items():
                assert page.index == index, f"{page!r} is at index {index:#x}"
                assert (page.epc is None) != (page.entry is None), f"{page!r} is in two places"
                assert not page.being_reclaimed and not page.being_modified, (
                    f"{page!r} is still marked"
                )
                assert page.reservation is None, f"{page!r} still has a reservation"
            self.swap.check_invariants()

    # --- faults ---------------------------------------------------------------------------------

    def fault(self, mm: Mm, vma: EnclaveVma, linaddr: int, task: Task | None) -> Outcome:
        """As :func:`softsgx.driver.fault.handle`."""
        return self.driver.handle_fault(self, mm, vma, linaddr, task)
