"""How a page of a guest becomes resident: loaded after an eviction, or taken for the first time.

Every function is called with ``Monitor.lock`` held, during :meth:`Monitor.host_working`, and when
the guest cannot reach the page.

Source:
    arch/x86/kernel/cpu/sgx/virt.c of intel/kvm-sgx; SDM vol. 3D, "VMM Oversubscription of EPC".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.arch import Status
from softsgx.kvm.events import VepcLoaded
from softsgx.kvm.evicted_page import EvictedPage, PageKind
from softsgx.kvm.eviction import evict_blocked, track
from softsgx.kvm.virtual_children import remove_virtual_child
from softsgx.paging import Claim, LoadFailed, SgxEpcPage, result_name

if TYPE_CHECKING:
    from softsgx.kvm.page import VepcPage

__all__ = ["drop", "make_resident"]

_CONTEXT_BYTES = 8


def make_resident(page: VepcPage, claim: Claim | None = None) -> SgxEpcPage | None:
    """Return the EPC page of ``page``, which the guest can use; load or make it if needed.

    Args:
        page: the page.
        claim: of the processor that needs it.

    Returns:
        ``None``: a reclaim batch has it; the caller asks again.

    Raises:
        EpcBusy, NoEpc: no EPC page now, or at all; pages that were loaded first stay.
        LoadFailed: it does not authenticate, or the backing store cannot read it.
    """
    if page.blocked_by_host and not evict_blocked(page):
        return None
    return page.epc or _load(page, claim)


def _load(
    page: VepcPage, claim: Claim | None = None, *, secs_for_another: bool = False
) -> SgxEpcPage:
    """Load ``page``, or give it an unused EPC page, as :func:`make_resident`.

    Its SECS is loaded first; that cannot be evicted once it has a child.
    """
    evicted, vepc = page.evicted, page.vepc
    monitor = vepc.monitor
    secs_addr = 0
    if evicted is not None:
        if evicted.secs is not None:
            secs = evicted.secs
            secs_addr = (secs.epc or _load(secs, claim, secs_for_another=True)).addr
        vepc.swap.load_va_page(evicted.entry, claim)
    epc = monitor.host.alloc(page, reclaim=False, group=monitor.group, kind="vepc", claim=claim)
    if evicted is not None:
        try:
            result = vepc.swap.eld(
                monitor.host_leaf,
                evicted.entry,
                epc.addr,
                linaddr=evicted.linaddr,
                secs=secs_addr,
                blocked=evicted.blocked,
            )
            if result is not Status.SUCCESS:
                raise LoadFailed(result_name(result))
        except LoadFailed:
            monitor.host.remove(epc)
            raise
    page.epc = epc
    if claim is not None:
        claims = monitor.host.claims
        note = claims.prerequisite_loaded if secs_for_another else claims.loaded
        note(claim, page, epc)
    monitor.resident += 1
    kind = "fresh"
    if evicted is not None:
        page.evicted, kind = None, evicted.kind.value
        _restore(page, epc, evicted)
        monitor.counters.loaded += 1
    else:
        monitor.counters.fresh += 1
    monitor.host.mark_reclaimable(epc)
    if monitor.tracer is not None:
        monitor.tracer(VepcLoaded(monitor.name, page.gpa, kind, Status.SUCCESS.manual_name))
    return epc


def _restore(page: VepcPage, epc: SgxEpcPage, evicted: EvictedPage) -> None:
    """Restore the state that ELD does not restore: enclave context, child counts, tracking."""
    monitor, secs = page.vepc.monitor, evicted.secs
    if evicted.kind is PageKind.SECS:
        monitor.counters.secs_in += 1
        context = page.gpa.to_bytes(_CONTEXT_BYTES, "little")
        monitor.host_leaf(lambda: monitor.host.leaves.esetcontext(epc.addr, context))
        while page.deferred_edecvirtchild:
            page.deferred_edecvirtchild -= 1
            remove_virtual_child(page, epc, page)
    elif secs is not None:
        remove_virtual_child(page, epc, secs)
        secs.evicted_children -= 1
        # The guest may have tracked a page that it has blocked, before the eviction or after it.
        # No processor has a translation of the page, so tracking it again is correct either way.
        if evicted.blocked and track(page, epc):
            monitor.kick()


def drop(page: VepcPage) -> None:
    """Forget an evicted page, as EREMOVE would."""
    evicted = page.evicted
    assert evicted is not None, f"{page!r} is dropped"
    page.evicted, page.promised = None, False
    page.vepc.swap.drop(evicted.entry)
    secs = evicted.secs
    if secs is None:
        page.deferred_edecvirtchild = 0
        return
    secs.evicted_children -= 1
    if secs.epc is not None:
        remove_virtual_child(page, secs.epc, secs)
    else:
        secs.deferred_edecvirtchild += 1
