"""Second implementations of the hot paths: allocating and freeing a page, batches, EWB and ELDU.

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
from softsgx.paging.claims import Claim
from softsgx.paging.core import EpcCore
from softsgx.paging.counters import Counters
from softsgx.paging.failures import BackingError, EpcBusy, Interrupted, LoadFailed, NoEpc
from softsgx.paging.flat import FlatBacking, FlatFile
from softsgx.paging.interfaces import Group, Reclaimable
from softsgx.paging.ksgxd import Ksgxd
from softsgx.paging.leafio import eldu
from softsgx.paging.lru import Lru
from softsgx.paging.nodes import AtomicCount
from softsgx.paging.page import SgxEpcPage
from softsgx.paging.policy import Policy
from softsgx.paging.reclaim import Reclaimer
from softsgx.paging.slowpath import AllocRequest, no_signal
from softsgx.paging.swap import EnclaveSwap
from softsgx.paging.swapfile import Pinned
from softsgx.paging.swapspace import Reservation, SwapEntry
from softsgx.paging.va import VaArray
from softsgx.paging.va_page import VaPage, VaSlot

__all__ = ["FAST_CORE", "CompiledCore", "CompiledSwap", "PlainCore", "PlainSwap"]

_SUCCESS = Status.SUCCESS


class PlainReclaimer(Reclaimer):
    """See the module."""

    def _prepare(self, lru: Lru, pages: list[SgxEpcPage], *, force: bool) -> list[SgxEpcPage]:
        """As :meth:`Reclaimer._prepare`."""
        victims: list[SgxEpcPage] = []
        counters, old, listed = self._counters, self._policy.old, lru.pages
        asks_owner = type(self._policy).old is Policy.old
        for page in pages:
            owner = page.owner
            assert owner is not None, f"{page!r} in a batch has no owner"
            if page.poisoned:
                self._skip(lru, page, owner, "poisoned")
            elif page.kept:
                counters.kept += 1
                self._skip(lru, page, owner, "kept")
            elif not (force or (owner.age() if asks_owner else old(owner))):
                counters.young += 1
                assert page.tracked and page.lru is lru, f"{page!r} was not isolated from here"
                listed[page] = None
                owner.put()
            elif owner.prepare():
                victims.append(page)
            else:
                counters.not_prepared += 1
                self._skip(lru, page, owner, "prepare")
        return victims

    def _write(self, lru: Lru, pages: list[SgxEpcPage]) -> int:
        """As :meth:`Reclaimer._write`."""
        freed, free, listed = 0, self._free, lru.pages
        for page in pages:
            owner = page.owner
            assert owner is not None, f"{page!r} in a batch has no owner"
            if owner.write():
                assert page.tracked and page not in listed, f"{page!r} was not isolated"
                page.tracked, page.lru = False, None
                free(page)
                owner.put()
                freed += 1
            else:
                self._counters.not_written += 1
                self._skip(lru, page, owner, "write")
        return freed


class PlainCore(EpcCore):
    """See the module."""

    optimised = True
    reclaimer_type = PlainReclaimer

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
        freed = self._pool.first(cpu_node).freed
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
        refused: Group,
        seen: tuple[int, int],
        cpu_node: int,
        request: AllocRequest,
        kind: str,
    ) -> SgxEpcPage:
        """Continue as :meth:`EpcCore.alloc` after a refused charge."""
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

    def mark_reclaimable(self, page: SgxEpcPage) -> None:
        """As :meth:`EpcCore.mark_reclaimable`."""
        assert page.group is not None, f"{page!r} is marked but not allocated"
        if page.poisoned:
            return
        assert not page.tracked, f"{page!r} is tracked already"
        lru = page.lru = page.group.lru
        page.tracked = True
        lru.pages[page] = None
        self._ksgxd.candidate_added()


class PlainSwap(EnclaveSwap):
    """See the module.  Its backing is flat."""

    __slots__ = ()

    _file: FlatFile

    def write(self, page: SgxEpcPage, reservation: Reservation) -> SwapEntry | None:
        """As :meth:`EnclaveSwap.write`."""
        slot, pinned = reservation.slot, reservation.pinned
        va_epc = slot.page.epc
        if page.poisoned or pinned is None or va_epc is None or self.children == 1:
            return super().write(page, reservation)
        sealed = self._leaves.try_ewb(page.addr, va_epc.addr + slot.number * VA_SLOT_BYTES)
        if sealed is None:
            return super().write(page, reservation)
        if isinstance(sealed, Status):
            entry = self._concluded(page, reservation, "page", pinned, sealed)
            if entry is not None:
                self.children -= 1
            return entry
        self.ewbs += 1
        self._counters.ewb_first += 1
        self._file.keep(pinned, sealed)
        self.va.slot_written(slot)
        self.children -= 1
        return SwapEntry(reservation.index, slot)

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

    core: EpcCore


class CompiledCore(PlainCore):
    """As :class:`PlainCore`, with methods of the compiled core."""

    compiled = True
    reclaimer_type = CompiledReclaimer

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        assert isinstance(self._reclaimer, CompiledReclaimer), "a core of another class's batches"
        self._reclaimer.core = self

    def _refused_alloc(
        self,
        group: Group,
        refused: Group,
        seen: tuple[int, int],
        cpu_node: int,
        kind: str,
        claim: Claim | None,
    ) -> SgxEpcPage:
        """As :meth:`_take_refused`, for a load."""
        request = AllocRequest(False, no_signal, claim)
        return self._take_refused(group, refused, seen, cpu_node, request, kind)


class CompiledSwap(PlainSwap):
    """As :class:`PlainSwap`, with methods of the compiled core."""

    __slots__ = ()


def _give(core: ModuleType) -> None:
    """Give the compiled core the classes and objects that it uses; take its methods."""
    for record in (Claim, Counters, Pinned, Reservation, SgxEpcPage, SwapEntry, VaPage, VaSlot):
        core.bind(record.__name__, record)
    for one in (AtomicCount, CompiledSwap, FlatBacking, FlatFile, Ksgxd, VaArray):
        core.bind(one.__name__, one)
    for known in (CompiledCore, CompiledSwap, FlatFile, Ksgxd, Policy, VaArray):
        core.give(known.__name__, known)
    for completed in (CompiledReclaimer, CompiledCore, CompiledSwap):
        core.add_methods(completed)


if compiled.speedups is not None:
    _give(compiled.speedups)

#: The fastest there is.
FAST_CORE: type[EpcCore] = PlainCore if compiled.speedups is None else CompiledCore
