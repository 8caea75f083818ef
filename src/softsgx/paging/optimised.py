"""Second implementations of the hot paths: allocating and freeing a page, EWB and ELDU.

Each method handles the common case: a page is free, nothing is missing, the first EWB or ELDU
succeeds.  It does in one function what the readable one does in many, in the same order.  Otherwise
it falls back to the readable method before any state has changed, or continues in the middle of it,
from the result of the charge or of the leaf.  These classes are for runtimes that do not interleave
tasks, so they take no latch, and for cores without tracer and defects.  ``tests/differential`` runs
both implementations on the same histories.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from softsgx import compiled
from softsgx.arch import PAGE_BYTES, VA_SLOT_BYTES, Status
from softsgx.hw import Sealed
from softsgx.paging.claims import Claim, Claims
from softsgx.paging.core import EpcCore
from softsgx.paging.counters import Counters
from softsgx.paging.entries import SwapEntries, SwapEntry
from softsgx.paging.failures import BackingError, EpcBusy, Interrupted, LoadFailed, NoEpc
from softsgx.paging.flat import FlatBacking, FlatFile
from softsgx.paging.free_pages import FreePages
from softsgx.paging.interfaces import Group, Reclaimable
from softsgx.paging.ksgxd import Ksgxd
from softsgx.paging.leafio import LeafResult, eldu, ewb
from softsgx.paging.lru import Lru
from softsgx.paging.nodes import AtomicCount, Node
from softsgx.paging.page import SgxEpcPage
from softsgx.paging.plain_batch import EvictTogether, PlainReclaimer
from softsgx.paging.policy import Fifo, Policy
from softsgx.paging.reclaim import Batch, Reclaimer
from softsgx.paging.sealed import SealedPages
from softsgx.paging.slowpath import AllocRequest, AllocSlowPath, no_signal
from softsgx.paging.sparse import SparseNumbers
from softsgx.paging.swap import EnclaveSwap
from softsgx.paging.swapfile import Pinned
from softsgx.paging.swapspace import Reservation, SwapCounts
from softsgx.paging.va import VaArray
from softsgx.paging.va_page import VaPage, VaSlot

__all__ = ["FAST_CORE", "CompiledCore", "CompiledSwap", "PlainCore", "PlainSwap"]

_SUCCESS, _NOT_TRACKED = Status.SUCCESS, Status.NOT_TRACKED


class PlainCore(EpcCore):
    """See the module."""

    __slots__ = ()

    optimised = True
    reclaimer_type = PlainReclaimer

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        assert isinstance(self._reclaimer, PlainReclaimer), "a core of another class's batches"
        self._reclaimer.core = self

    def evict_together(self, evict: EvictTogether) -> None:
        """Let ``evict`` do the plain batches."""
        assert isinstance(self._reclaimer, PlainReclaimer), "a core of another class's batches"
        self._reclaimer.evict_together = evict

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
        """As :meth:`EpcCore.alloc`."""
        claims = self.claims
        pool = self._pool
        order = pool._orders.get(cpu_node)
        freed = pool.first(cpu_node).freed if order is None else order[0].freed
        if claims.holder is not None or not freed or freed[0].poisoned:
            return super().alloc(
                owner,
                reclaim=reclaim,
                group=group,
                kind=kind,
                cpu_node=cpu_node,
                signal_pending=signal_pending,
                claim=claim,
            )
        if group is None:
            group = self.root
        ksgxd, free = self._ksgxd, self._free
        seen = ksgxd.generation, ksgxd.outcomes
        refused = group.try_charge()
        if refused is None:
            page = freed.popleft()
            page.free = False
            free.value -= 1
        else:
            request = AllocRequest(reclaim, signal_pending, claim)
            page = self._take_refused(group, refused, seen, cpu_node, request, kind)
        page.owner, page.group, page.kind = owner, group, kind
        held = self.counters.held
        held[kind] = held.get(kind, 0) + 1
        if free.value < self._low and ksgxd.asleep and self.root.has_reclaimable():
            ksgxd.request()
        return page

    def _take_refused(
        self,
        group: Group,
        refused: Group | None,
        seen: tuple[int, int],
        cpu_node: int,
        request: AllocRequest,
        kind: str,
    ) -> SgxEpcPage:
        """Continue as :meth:`EpcCore.alloc` after a charge."""
        try:
            return self._take_page(group, refused, seen, cpu_node, request)
        except (NoEpc, EpcBusy, Interrupted) as error:
            self.slowpath.refused(kind, error)
            raise

    def free(self, page: SgxEpcPage) -> None:
        """As :meth:`EpcCore.free`."""
        group, kind = page.group, page.kind
        if page.poisoned:
            super().free(page)
            return
        assert not page.tracked, f"{page!r} is freed while it is tracked"
        assert group is not None and not page.leaked, f"{page!r} is freed but not allocated"
        assert not page.free, f"{page!r} is freed twice"
        group.uncharge()
        page.owner = page.group = None
        page.blocked = page.kept = False
        self.counters.held[kind] -= 1
        page.free = True
        self._pool.nodes[page.node].freed.append(page)
        self._free.value += 1
        self._ksgxd.page_freed()

    def free_evicted(self, lru: Lru, pages: list[SgxEpcPage]) -> None:
        """Free isolated pages of a list that were evicted and are not poisoned."""
        if not pages:
            return
        listed, held, nodes = lru.pages, self.counters.held, self._pool.nodes
        group = pages[0].group
        assert group is not None and group.lru is lru, f"{pages[0]!r} is not of this list"
        for page in pages:
            assert page.tracked and page.group is group, f"{page!r} was not isolated"
            assert page not in listed and not page.free, f"{page!r} is freed twice"
            page.tracked, page.lru = False, None
            page.owner = page.group = None
            page.blocked = page.kept = False
            held[page.kind] -= 1
            page.free = True
            nodes[page.node].freed.append(page)
        count, ksgxd = len(pages), self._ksgxd
        group.uncharge(count)
        self._free.value += count
        ksgxd.outcomes += count - 1
        ksgxd.generation += count - 1
        ksgxd.page_freed()

    def mark_reclaimable(self, page: SgxEpcPage) -> None:
        """As :meth:`EpcCore.mark_reclaimable`."""
        assert page.group is not None, f"{page!r} is marked but not allocated"
        if page.poisoned:
            return
        assert not page.tracked, f"{page!r} is tracked already"
        lru = page.lru = page.group.lru
        page.tracked = True
        lru.pages.append(page)
        self._ksgxd.candidate_added()


class PlainSwap(EnclaveSwap):
    """See the module.  Its backing is flat."""

    __slots__ = ()

    _core: PlainCore
    _file: FlatFile

    def write(self, page: SgxEpcPage, reservation: Reservation) -> SwapEntry | None:
        """As :meth:`EnclaveSwap.write`."""
        slot, pinned = reservation.slot, reservation.pinned
        va_epc = slot.page.epc
        if page.poisoned or pinned is None or va_epc is None or self.children == 1:
            return super().write(page, reservation)
        addr, slot_addr = page.addr, va_epc.addr + slot.number * VA_SLOT_BYTES
        sealed, tries = self._leaves.try_ewb(addr, slot_addr), 1
        if sealed is _NOT_TRACKED:
            sealed, tries = self._try_again(addr, slot_addr)
        if not isinstance(sealed, tuple):
            return self._conclude(page, reservation, sealed, tries)
        self.ewbs += tries
        counters = self._counters
        if tries == 1:
            counters.ewb_first += 1
        elif tries == 2:
            counters.ewb_second += 1
        else:
            counters.ewb_third += 1
        self._file.keep(pinned, sealed)
        self.va.slot_written(slot)
        self.children -= 1
        return SwapEntry(reservation.index, slot)

    def _try_again(self, addr: int, slot_addr: int) -> tuple[Sealed | Status | None, int]:
        """As :meth:`EnclaveSwap._track`."""
        try_ewb = self._leaves.try_ewb
        self._start_epoch()
        sealed = try_ewb(addr, slot_addr)
        if sealed is not _NOT_TRACKED:
            return sealed, 2
        self._kick_cpus()
        return try_ewb(addr, slot_addr), 3

    def _conclude(
        self, page: SgxEpcPage, reservation: Reservation, result: Status | None, tries: int
    ) -> SwapEntry | None:
        """Continue as :meth:`EnclaveSwap.write` after an EWB that did not succeed."""
        pinned = reservation.pinned
        assert pinned is not None, "EWB without backing"
        last: LeafResult | None = result
        if last is None:
            last = ewb(self._leaves, page.addr, reservation.slot.addr, pinned)
        entry = self._concluded(page, reservation, "page", pinned, last, tries)
        if entry is not None:
            self.children -= 1
        return entry

    def load(
        self,
        entry: SwapEntry,
        owner: Reclaimable | None,
        *,
        kind: str = "reg",
        cpu_node: int = 0,
        group: Group | None = None,
        claim: Claim | None = None,
    ) -> SgxEpcPage:
        """As :meth:`EnclaveSwap.load`."""
        slot, secs = entry.slot, self.secs
        va_page = None if slot is None else slot.page
        va_epc = None if va_page is None or va_page.eviction is not None else va_page.epc
        if slot is None or secs is None or not self.children or va_page is None or va_epc is None:
            return super().load(
                entry, owner, kind=kind, cpu_node=cpu_node, group=group, claim=claim
            )
        core, file, index = self._core, self._file, entry.index
        va_page.accessed = True
        page = core.alloc(
            owner, reclaim=False, group=group, kind=kind, cpu_node=cpu_node, claim=claim
        )
        try:
            sealed, flags, _eid = file.kept(index)
        except BackingError as error:
            core.free(page)
            self._counters.eldu_failed += 1
            raise LoadFailed(str(error)) from error
        linaddr = self._base + index * PAGE_BYTES
        slot_addr = va_epc.addr + slot.number * VA_SLOT_BYTES
        if not self._leaves.try_eldu(linaddr, secs.addr, sealed, flags, page.addr, slot_addr):
            self._load_by_leaf(page, index, slot_addr, linaddr, secs.addr)
        file.forget(index)
        self.va.slot_loaded(slot)
        self._counters.eldu += 1
        children = self.children = self.children + 1
        if children > self.peak_children:
            self.peak_children = children
        if claim is not None and owner is not None:
            core.claims.loaded(claim, owner, page)
        return page

    def _load_by_leaf(
        self, page: SgxEpcPage, index: int, slot_addr: int, linaddr: int, secs: int
    ) -> None:
        """ELDU by the readable leaf, which refuses what the optimised one did not load."""
        pinned = self._file.open(index)
        result = eldu(self._leaves, page.addr, slot_addr, pinned, linaddr, secs)
        if result is not _SUCCESS:
            raise self._refused(page, pinned, result)


# --- the same in C --------------------------------------------------------------------------------


class CompiledReclaimer(PlainReclaimer):
    """As :class:`PlainReclaimer`, with methods of the compiled core."""

    batch = Reclaimer.batch


class CompiledCore(PlainCore):
    """As :class:`PlainCore`, with methods of the compiled core."""

    __slots__ = ()

    compiled = True
    reclaimer_type = CompiledReclaimer

    def _take_otherwise(
        self,
        group: Group,
        refused: Group | None,
        seen: tuple[int, int],
        cpu_node: int,
        kind: str,
        claim: Claim | None,
    ) -> SgxEpcPage:
        """As :meth:`_take_refused`, for a load while no thread holds a claim."""
        ksgxd = self._ksgxd
        if refused is not None and not ksgxd._oom_verdicts and refused.has_reclaimable():
            ksgxd.request(refused)
            self.counters.alloc_busy += 1
            raise EpcBusy(seen[1], refused)
        request = AllocRequest(False, no_signal, claim)
        return self._take_refused(group, refused, seen, cpu_node, request, kind)

    def _alloc_for_load(
        self,
        owner: Reclaimable | None,
        group: Group | None,
        kind: str,
        cpu_node: int,
        claim: Claim | None,
    ) -> SgxEpcPage:
        """As :meth:`EpcCore.alloc`, for a load."""
        return EpcCore.alloc(
            self, owner, reclaim=False, group=group, kind=kind, cpu_node=cpu_node, claim=claim
        )


class CompiledSwap(PlainSwap):
    """As :class:`PlainSwap`, with methods of the compiled core."""

    __slots__ = ()


def _give(core: ModuleType) -> None:
    """Give the compiled core the classes and objects that it uses; take its methods."""
    for record in (Claim, Counters, Pinned, Reservation, SgxEpcPage, SwapEntry, VaPage, VaSlot):
        core.bind(record.__name__, record)
    for base in (AllocSlowPath, SwapCounts):
        core.bind(base.__name__, base)
    for one in (AtomicCount, CompiledSwap, FlatBacking, FlatFile, Ksgxd, SealedPages):
        core.bind(one.__name__, one)
    for part in (Claims, EpcCore, FreePages, Lru, Node, SparseNumbers, SwapEntries, VaArray):
        core.bind(part.__name__, part)
    for known in (Batch, EpcBusy, Fifo, FlatFile, Policy, VaArray):
        core.give(known.__name__, known)
    core.give("PREV_TRK_INCMPL", Status.PREV_TRK_INCMPL)
    for completed in (CompiledReclaimer, CompiledCore, CompiledSwap):
        core.give(completed.__name__, completed)
        core.add_methods(completed)


if compiled.speedups is not None:
    _give(compiled.speedups)

#: The fastest there is.
FAST_CORE: type[EpcCore] = PlainCore if compiled.speedups is None else CompiledCore
