"""How the host evicts a page of a guest, without the guest's help.

The host knows only what ERDINFO returns about the page.  The guest may have blocked the page
already.  Its SECS may be in another virtual EPC, and must still report its children to the guest.
Host and guest track the same enclaves.

Every function is called with ``Monitor.lock`` held, during :meth:`Monitor.host_working`, and when
the guest can no longer reach the page.

Invariants: VIRTCHILDCNT is incremented before EWB decrements CHLDCNT, and decremented after ELD has
incremented that, so their sum is never smaller than the number of children that the guest counts; a
page that the host has blocked is evicted and loaded before it is mapped again.

Source:
    arch/x86/kernel/cpu/sgx/virt.c of intel/kvm-sgx; SDM vol. 3D, "VMM Oversubscription of EPC".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.arch import PageType, RdInfo, RdInfoFlags, RdInfoStatus, Status
from softsgx.kvm.events import VepcEvicted
from softsgx.kvm.evicted_page import EvictedPage, PageKind
from softsgx.kvm.virtual_children import add_virtual_child, remove_virtual_child
from softsgx.paging import LeafResult, LoadFailed, SgxEpcPage, result_name

if TYPE_CHECKING:
    from softsgx.kvm.page import VepcPage

__all__ = ["block", "evict_blocked", "track", "write"]

_KICKS = 3
_PAGE_TYPE_SHIFT, _PAGE_TYPE_MASK = 8, 0xFF


def block(page: VepcPage) -> bool:
    """Find out the kind of ``page``, and EBLOCK it if EWB needs that.

    Returns:
        ``False``: it cannot be evicted now; nothing has changed.
    """
    epc, monitor = page.epc, page.vepc.monitor
    assert epc is not None, f"{page!r} is blocked"
    if epc.poisoned:
        return _kept(page, "poisoned")  # EBLOCK cannot be undone, and EWB would read the page
    leaves = monitor.host.leaves
    info = RdInfo()
    result = monitor.host_leaf(lambda: leaves.erdinfo(info, epc.addr))
    if result is Status.PG_INVLD:
        page.kind = PageKind.UNUSED
        return True
    if result is not Status.SUCCESS:
        return _kept(page, f"ERDINFO: {result_name(result)}")
    match PageType(info.flags >> _PAGE_TYPE_SHIFT & _PAGE_TYPE_MASK):
        case PageType.SECS:
            if info.status & RdInfoStatus.CHILDPRESENT:
                monitor.counters.kept_secs += 1
                page.trace_kept("secs with children")
                return False
            page.kind = PageKind.SECS
            return True
        case PageType.VA:
            page.kind = PageKind.VA
            return True
        case _:
            secs = monitor.page_at(info.enclave_context)
            if secs is None or secs.epc is None:
                return _kept(page, f"its SECS is not at {info.enclave_context:#x}")
            page.kind, page.secs = PageKind.CHILD, secs
    if info.flags & RdInfoFlags.BLOCKED:
        # The guest has blocked it, unless an earlier try of the host failed after EBLOCK.  The host
        # evicts it nevertheless: otherwise a guest could keep pages resident by blocking them.
        page.guest_blocked = not epc.blocked
        return True
    result = monitor.host_leaf(lambda: leaves.eblock(epc.addr))
    if result is not Status.SUCCESS:
        return _kept(page, f"EBLOCK: {result_name(result)}")
    epc.blocked = True
    return True


def write(page: VepcPage) -> bool:
    """EWB ``page``, which :func:`block` has blocked; the caller frees its EPC page.

    Returns:
        ``False``: it is still resident, and the reservation still stands.
    """
    epc, kind, secs = page.epc, page.kind, page.secs
    counters, vepc = page.vepc.monitor.counters, page.vepc
    assert epc is not None and kind is not None and page.reservation is not None, f"{page!r}"
    tries, linaddr = 0, 0
    result: LeafResult = Status.SUCCESS
    if epc.poisoned:
        return _kept(page, "poisoned")
    if kind is not PageKind.UNUSED:
        result, linaddr, tries = _ewb(page, epc, secs)
    if result is not Status.SUCCESS:
        return _kept(page, f"EWB: {result_name(result)}")
    if kind is PageKind.UNUSED:
        vepc.swap.cancel(page.reservation)
        counters.unused_out += 1
    else:
        entry = vepc.swap.written(page.reservation)
        page.evicted = EvictedPage(entry, linaddr, kind, secs, page.guest_blocked)
        counters.secs_out += kind is PageKind.SECS
        counters.va_out += kind is PageKind.VA
        counters.guest_blocked += page.guest_blocked
        if secs is not None:
            secs.evicted_children += 1
    counters.evicted += 1
    page.epc = None
    vepc.monitor.resident -= 1
    if vepc.monitor.tracer is not None:
        vepc.monitor.tracer(
            VepcEvicted(vepc.monitor.name, page.gpa, kind.value, tries, result_name(result))
        )
    return True


def _ewb(page: VepcPage, epc: SgxEpcPage, secs: VepcPage | None) -> tuple[LeafResult, int, int]:
    """EWB up to three times; return the last result, the linear address, and the tries."""
    if secs is None:
        return *_ewb_once(page, epc), 1
    if not add_virtual_child(page, epc, secs):
        return Status.INVALID_COUNTER, 0, 0
    result, linaddr = _ewb_once(page, epc)
    tries = 1
    if result is Status.NOT_TRACKED:
        if track(page, epc):
            result, linaddr = _ewb_once(page, epc)
            tries = 2
        if result is Status.NOT_TRACKED:
            # Only after ETRACKC: a processor that enters in between is in the new epoch already.
            page.vepc.monitor.kick()
            result, linaddr = _ewb_once(page, epc)
            tries = 3
        elif result is not Status.SUCCESS:
            page.vepc.monitor.kick()  # complete the host's cycle, or the guest would have to
    if result is not Status.SUCCESS:
        remove_virtual_child(page, epc, secs)
    return result, linaddr, tries


def _ewb_once(page: VepcPage, epc: SgxEpcPage) -> tuple[LeafResult, int]:
    assert page.reservation is not None, f"{page!r} was not prepared"
    return page.vepc.swap.ewb(page.vepc.monitor.host_leaf, epc.addr, page.reservation)


def track(page: VepcPage, epc: SgxEpcPage) -> bool:
    """ETRACKC for the enclave of ``page``; its previous cycle is completed first if need be."""
    monitor = page.vepc.monitor
    for _try in range(_KICKS):
        result = monitor.host_leaf(lambda: monitor.host.leaves.etrackc(epc.addr))
        if result is Status.SUCCESS:
            monitor.counters.etrackc += 1
            return True
        if result is not Status.PREV_TRK_INCMPL:
            return False
        monitor.counters.prev_incomplete += 1
        monitor.kick()
    return False


def evict_blocked(page: VepcPage) -> bool:
    """Evict a page that an earlier try has left blocked, so that it can be loaded again.

    Returns:
        ``False``: a reclaim batch has the page now; the caller waits for it.

    Raises:
        LoadFailed: the page can neither be evicted nor used.
    """
    epc, vepc = page.epc, page.vepc
    assert epc is not None and page.blocked_by_host, f"{page!r} is not blocked by the host"
    if not vepc.monitor.host.unmark_reclaimable(epc):
        return False
    page.reservation = vepc.swap.prepare(page.index)
    page.being_reclaimed = True
    vepc.monitor.evicting += 1
    evicted = page.reservation is not None and block(page) and write(page)
    if not evicted and page.reservation is not None:
        vepc.swap.cancel(page.reservation)
    page.end_eviction()
    if not evicted:
        vepc.monitor.host.mark_reclaimable(epc)
        raise LoadFailed("blocked, and cannot be evicted")
    vepc.monitor.host.free(epc)
    return True


def _kept(page: VepcPage, reason: str) -> bool:
    page.vepc.monitor.counters.kept_failed += 1
    page.trace_kept(reason)
    return False
