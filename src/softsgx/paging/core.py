"""The EPC core: allocates, charges, tracks, reclaims and frees EPC pages.

Native enclaves and guests allocate from the same core.  It knows the owner of a page as a
:class:`~softsgx.paging.Reclaimable` and a group as a :class:`~softsgx.paging.Group`, and does not
ask what a page is used for.

Lock order (an outer lock is left of an inner one)::

    mmap locks → an enclave's lock → the VA tree's lock → the core's "ksgxd" lock → latches

``alloc`` with ``reclaim=True``, ``reclaim``, ``evict`` and ``wait_for_page`` take owners' locks, so
a caller must hold none; all other methods may be called with any lock held.

Invariants: a page is dirty, free, in quarantine, held or leaked; a held page is tracked on at most
one list, or by one batch; each count equals the number of pages.  :meth:`EpcCore.check_invariants`
compares.

Source:
    ``arch/x86/kernel/cpu/sgx/main.c``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from softsgx.arch import PAGE_BYTES, EpcAddr, Status
from softsgx.defects import Defect
from softsgx.hw import Fault
from softsgx.paging import events
from softsgx.paging.backing import MemoryBacking
from softsgx.paging.claims import Claim, Claims, pages_at_once
from softsgx.paging.counters import Counters
from softsgx.paging.failures import EpcBusy, Interrupted, NoEpc
from softsgx.paging.free_pages import FreePages
from softsgx.paging.groups import Ungrouped
from softsgx.paging.interfaces import BackingFile, Group, Hardware, Reclaimable
from softsgx.paging.invariants import check_pages
from softsgx.paging.ksgxd import Ksgxd
from softsgx.paging.page import SgxEpcPage
from softsgx.paging.policy import LinuxPolicy, Policy
from softsgx.paging.reclaim import EVICT_POISONED, Batch, Reclaimer
from softsgx.paging.sanitize import Sanitizer
from softsgx.paging.slowpath import AllocRequest, AllocSlowPath, no_signal
from softsgx.paging.va import VaTree
from softsgx.runtime import Runtime
from softsgx.trace import Tracer

__all__ = ["EpcCore"]


class EpcCore:
    """The EPC of one machine.

    Args:
        hw: the machine.
        runtime: locks, tasks, points.
        policy: which pages are evicted, when, and how many at once.
        tracer: receives events; ``None`` costs nothing.
        root: the group above all others, charged when an allocation names none.
        dirty: addresses of the pages that may be in use by an earlier system, so that they need
            EREMOVE first; ``None``: all pages, since a kernel cannot know.
        va_backing: backing file of evicted VA pages; memory when ``None``.
        defects: those to switch on; it has the broken forms of package ``paging``.

    Attributes:
        counters: numbers of events.
        reclaim_ns: time that reclaim batches took, of ksgxd and of other tasks.
        root: as given.
        policy: as given.
        claims: the pages that are kept for a thread which needs them together.
        slowpath: the slow path of allocations.
        va: the upper levels of VA pages.
        optimised: whether second implementations run here, and may run in the driver.
        compiled: whether the second implementations are those of the compiled core.
        reclaimer_type: class of what runs batches.
    """

    __slots__ = (
        "_free",
        "_held_latch",
        "_high",
        "_ksgxd",
        "_low",
        "_pool",
        "_reclaimer",
        "_sanitizer",
        "claims",
        "counters",
        "defects",
        "epc_pages",
        "hw",
        "leaves",
        "policy",
        "reclaim_ns",
        "root",
        "runtime",
        "slowpath",
        "tracer",
        "va",
    )

    optimised = False
    compiled = False
    reclaimer_type: type[Reclaimer] = Reclaimer

    def __init__(
        self,
        hw: Hardware,
        runtime: Runtime,
        *,
        policy: Policy | None = None,
        tracer: Tracer | None = None,
        root: Group | None = None,
        dirty: Iterable[int] | None = None,
        va_backing: BackingFile | None = None,
        defects: frozenset[Defect] = frozenset(),
    ) -> None:
        self.hw, self.runtime, self.defects = hw, runtime, defects
        self.leaves = hw.leaves
        self.policy: Policy = LinuxPolicy() if policy is None else policy
        self.root: Group = Ungrouped(runtime) if root is None else root
        self.counters = Counters()
        self.reclaim_ns = 0
        self._held_latch = runtime.latch() if runtime.concurrent else None
        self.tracer = tracer
        self.epc_pages = sum(section.pages for section in hw.config.sections)
        self._low = self.policy.low(self.epc_pages)
        self._high = self.policy.high(self.epc_pages)
        self._pool = FreePages(hw.config.sections, runtime, defects=defects)
        self._free = self._pool.count
        self._reclaimer = self.reclaimer_type(
            self.policy,
            self.epc_pages,
            runtime,
            free=self.free,
            counters=self.counters,
            tracer=tracer,
            ignore_poison=not defects.isdisjoint(EVICT_POISONED),
        )
        self._sanitizer = self._make_sanitizer(dirty)
        if Defect.FREE_PAGES_COUNTED_TWICE in defects:
            self._free.add(self.epc_pages)
        self._ksgxd = Ksgxd(
            runtime,
            self.root,
            self._sanitizer,
            reclaim=lambda group, force: self.reclaim(group, force=force),
            scarce=lambda: self._free.value < self._high,
            in_use=self._in_use,
            patience_passes=self.policy.patience_passes,
            counters=self.counters,
            tracer=tracer,
        )
        self.claims = Claims(
            runtime,
            pages=pages_at_once(hw.config),
            counters=self.counters,
            released=self._ksgxd.candidate_added,
        )
        self.slowpath = AllocSlowPath(
            self,
            self._pool,
            self._ksgxd,
            patience_passes=(
                None
                if Defect.DIRECT_RECLAIM_WITHOUT_END in defects
                else self.policy.patience_passes
            ),
            in_use=self._in_use,
        )
        self.va = VaTree(self, MemoryBacking() if va_backing is None else va_backing)

    def _make_sanitizer(self, dirty: Iterable[int] | None) -> Sanitizer:
        """Free the pages that need no EREMOVE; return a sanitizer for the others."""
        if dirty is None:
            ranges = [
                (section.base, section.base + section.size) for section in self.hw.config.sections
            ]
        else:
            ranges = [(addr, addr + PAGE_BYTES) for addr in sorted(set(dirty))]
            self._pool.give_all_but([start for start, _end in ranges])
        return Sanitizer(
            ranges,
            eremove=lambda address: self.leaves.eremove(address),  # the leaves are bound then
            clean=self._give_sanitized,
            poisoned=self._pool.is_poisoned,
            runtime=self.runtime,
            report_stopped=Defect.STOPPED_SANITIZE_REPORTED in self.defects,
        )

    # --- the EPC --------------------------------------------------------------------------------

    @property
    def free_pages(self) -> int:
        """EPC pages that can be allocated now."""
        return self._free.value

    @property
    def poisoned_pages(self) -> int:
        """Poisoned pages, in use or in quarantine; counted from the page records."""
        return self._pool.poisoned_pages()

    @property
    def dirty_pages(self) -> int:
        """Pages that are still to be sanitized."""
        return self._sanitizer.pages()

    def node_bytes(self) -> dict[int, int]:
        """Return the EPC bytes of each node (``sgx_total_bytes``)."""
        return {number: pages * PAGE_BYTES for number, pages in self._pool.node_pages().items()}

    def is_epc(self, physical: int) -> bool:
        """Return whether a physical address is in the EPC (``arch_is_platform_page``)."""
        return self._pool.section_of(physical) is not None

    # --- allocation -----------------------------------------------------------------------------

    def alloc(
        self,
        owner: Reclaimable | None,
        *,
        reclaim: bool,
        group: Group | None = None,
        kind: str = "reg",
        cpu_node: int = 0,
        signal_pending: Callable[[], bool] = no_signal,
        claim: Claim | None = None,
    ) -> SgxEpcPage:
        """Return an EPC page whose EPCM entry is invalid, charged to ``group``.

        Args:
            owner: the reclaimer calls it after :meth:`mark_reclaimable`.
            reclaim: whether to evict pages if none is free, which may wait; then the caller holds
                no owner's lock and no mmap lock.
            group: the group to charge; the root when ``None``.
            kind: a label for counters: what the page is used for.
            cpu_node: NUMA node of the calling processor; its EPC is tried first.
            signal_pending: called before each batch; ``True`` ends the allocation.
            claim: of the thread that needs the page.

        Raises:
            NoEpc: no page is free and none can be reclaimed; the text says why.
            EpcBusy: no page is free, and ``reclaim`` is false; ksgxd was woken.
            Interrupted: a signal is pending.

        Source:
            ``sgx_alloc_epc_page()``, main.c; charging as in the EPC cgroup series, v17.
        """
        group = self.root if group is None else group
        claims = self.claims
        if claims.holder is not None:
            claims.allocating(claim)
        request = AllocRequest(reclaim, signal_pending, claim)
        try:
            if claims.short_in is not None:
                self.slowpath.stand_back(group, request)
            ksgxd = self._ksgxd
            seen = ksgxd.generation, ksgxd.outcomes
            page = self._take_page(group, group.try_charge(), seen, cpu_node, request)
        except (NoEpc, EpcBusy, Interrupted) as error:
            self.slowpath.refused(kind, error)
            raise
        page.owner, page.group, page.kind = owner, group, kind
        self._count_held(kind, 1)
        if self._free.value < self._low and self._ksgxd.asleep and self.root.has_reclaimable():
            self._ksgxd.request()
        if self.tracer is not None:
            self.tracer(events.Allocated(page.addr, kind, page.node))
        return page

    def _take_page(
        self,
        group: Group,
        refused: Group | None,
        seen: tuple[int, int],
        cpu_node: int,
        request: AllocRequest,
    ) -> SgxEpcPage:
        """Return a free page after :meth:`Group.try_charge` has returned ``refused``.

        Args:
            group: to be charged.
            refused: ``None``: it is charged already.
            seen: ksgxd's ``generation`` and ``outcomes`` before that.
            cpu_node: as for :meth:`alloc`.
            request: what the caller may do.

        Raises:
            NoEpc, EpcBusy, Interrupted: as for :meth:`alloc`; nothing is charged.
        """
        if refused is not None:
            self.slowpath.charge(group, refused, seen, request)
        try:
            page = self._pool.take(cpu_node)
            if page is None:
                page = self.slowpath.take(cpu_node, request)
        except BaseException:
            group.uncharge()
            raise
        return page

    def _count_held(self, kind: str, change: int) -> None:
        held = self.counters.held
        if self._held_latch is None:
            held[kind] = held.get(kind, 0) + change
        else:
            with self._held_latch:
                held[kind] = held.get(kind, 0) + change

    def _in_use(self) -> int:
        return self.epc_pages - self._free.value

    # --- freeing --------------------------------------------------------------------------------

    def free(self, page: SgxEpcPage) -> None:
        """Free ``page``, whose EPCM entry is invalid and which is not tracked.

        Source:
            ``sgx_free_epc_page()``, main.c.
        """
        group = page.group
        assert not page.tracked, f"{page!r} is freed while it is tracked"
        assert group is not None and not page.leaked, f"{page!r} is freed but not allocated"
        group.uncharge()
        page.owner = page.group = None
        page.blocked = page.kept = False
        self._count_held(page.kind, -1)
        self._pool.give(page)
        self._ksgxd.page_freed()
        if self.tracer is not None:
            self.tracer(events.Freed(page.addr, page.poisoned))

    def remove(self, page: SgxEpcPage) -> bool:
        """EREMOVE ``page`` and free it.

        Returns:
            ``False`` when the leaf refused, which is a bug of the owner.  The page is leaked: it is
            counted and traced, and never used again, since its content is unknown.

        Source:
            ``sgx_encl_free_epc_page()``, encl.c.
        """
        try:
            status = self.leaves.eremove(page.addr)
            result = status.manual_name
        except Fault as fault:
            status, result = None, str(fault)
        if status is Status.SUCCESS:
            self.free(page)
            return True
        assert not page.tracked, f"{page!r} is removed while it is tracked"
        page.leaked, page.owner = True, None
        self._count_held(page.kind, -1)
        self.counters.leaked += 1
        if self.tracer is not None:
            self.tracer(events.Leaked(page.addr, page.kind, result))
        return False

    # --- tracking -------------------------------------------------------------------------------

    def mark_reclaimable(self, page: SgxEpcPage) -> None:
        """Add ``page`` to its group's LRU list as the youngest; a poisoned page stays off it.

        Source:
            ``sgx_mark_page_reclaimable()``, main.c.
        """
        assert page.group is not None, f"{page!r} is marked but not allocated"
        if page.poisoned and Defect.POISONED_PAGE_STAYS_ON_LRU not in self.defects:
            return
        page.group.lru.add(page)
        self._ksgxd.candidate_added()

    def mark_accessed(self, page: SgxEpcPage) -> None:
        """Make ``page`` the youngest of its LRU list: for engines that see every access."""
        if page.lru is not None:
            page.lru.mark_accessed(page)

    def unmark_reclaimable(self, page: SgxEpcPage) -> bool:
        """Take ``page`` off its LRU list.

        Returns:
            ``False``: a batch has isolated it; nothing has changed.  Linux: EBUSY.

        Source:
            ``sgx_unmark_page_reclaimable()``, main.c.
        """
        lru = page.lru
        return True if lru is None else lru.remove(page)

    # --- machine checks -------------------------------------------------------------------------

    def poison(self, physical: int) -> bool:
        """A machine check has reported this address: its page is never allocated again.

        A page in use stays with its owner, is no longer evicted, and goes into quarantine when it
        is freed.

        Returns:
            ``False`` when it is not in the EPC (ENXIO).

        Source:
            ``arch_memory_failure()``, main.c; since ed16618c380c a tracked page leaves its list.
        """
        section = self._pool.section_of(physical)
        if section is None:
            return False
        addr = EpcAddr(physical - physical % PAGE_BYTES)
        found = self._pool.poison(addr, section.node, dirty=addr in self._sanitizer)
        if found is None:
            return True
        page, was_free = found
        lru = page.lru
        if lru is not None and Defect.POISONED_PAGE_STAYS_ON_LRU not in self.defects:
            lru.remove(page)  # a batch that has isolated the page sees that it is poisoned
        if self.tracer is not None:
            self.tracer(events.Poisoned(addr, was_free))
        return True

    # --- reclaim --------------------------------------------------------------------------------

    def reclaim(self, group: Group | None = None, *, force: bool = False) -> Batch:
        """Run one batch in the subtree of ``group``; the caller holds no owner's lock.

        The batch scans the first group in turn that has a reclaimable page.

        Args:
            group: the root when ``None``.
            force: whether to evict pages that were accessed too.
        """
        group = self.root if group is None else group
        batch, began_ns = Batch(0, 0), self.runtime.now_ns()
        self._ksgxd.batch_began()
        try:
            for member in group.walk():
                batch = self._reclaimer.batch(member.lru, force=force)
                if batch.scanned or not group.has_reclaimable():
                    break
        finally:
            self.reclaim_ns += self.runtime.now_ns() - began_ns
            self._ksgxd.batch_ended()
        return batch

    def evict(self, page: SgxEpcPage) -> bool:
        """Evict one page, even if it was accessed; the caller holds no owner's lock.

        Returns:
            ``False``: it is still resident, since it is not reclaimable, a batch has it, or it
            cannot be written.
        """
        lru = page.lru
        if lru is None:
            return False
        self._ksgxd.batch_began()
        try:
            return self._reclaimer.evict(lru, page)
        finally:
            self._ksgxd.batch_ended()

    def reclaim_direct(self, group: Group | None = None) -> None:
        """Run one batch if free pages are below the low watermark.

        Source:
            ``sgx_reclaim_direct()``, main.c.
        """
        if self._free.value < self._low and self.root.has_reclaimable():
            self.counters.direct += 1
            self.reclaim(group)

    # --- ksgxd ----------------------------------------------------------------------------------

    def wait_for_page(self, busy: EpcBusy) -> None:
        """Wait until a refused allocation may succeed; the caller holds no lock.

        If ksgxd does not run, the caller reclaims in its place.  If no page can be evicted, the
        next allocation raises :class:`NoEpc`.
        """
        self._ksgxd.wait_for_page(busy)

    def request_reclaim(self, group: Group) -> None:
        """Ask ksgxd for a batch in the subtree of ``group``; does not wait."""
        self._ksgxd.request(group)

    def start(self) -> None:
        """Start ksgxd, which sanitizes the EPC first.

        Source:
            ``sgx_init()``, ``ksgxd()``, main.c.
        """
        self._ksgxd.start()

    def stop(self) -> None:
        """Stop ksgxd and wait until it has ended; :meth:`start` may start it again."""
        self._ksgxd.stop()

    def wait_sanitized(self) -> None:
        """Wait until every page is sanitized, or :meth:`stop` is called."""
        self._ksgxd.wait_sanitized()

    def _give_sanitized(self, addr: EpcAddr) -> None:
        """EREMOVE has freed the page at ``addr``, or the page is poisoned."""
        self._pool.give_clean(addr)
        self._ksgxd.page_freed()

    # --- checking -------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Compare every count with the pages themselves; call while no task runs here.

        Raises:
            AssertionError: says which count or page is wrong.
        """
        check_pages(
            pool=self._pool,
            dirty=self._sanitizer,
            counters=self.counters,
            idle=not self._ksgxd.working.value,
        )
        self.va.check_invariants()
