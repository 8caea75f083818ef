"""How pages of a guest leave the EPC and come back without the guest's noticing.

What makes it different from an enclave of one's own: the host knows nothing of the page but what
ERDINFO tells; the page may be blocked already; its SECS may be anywhere, and must go on saying that
it has children; and the tracking of the enclave is shared with the guest.

Every function is called with ``Monitor.lock`` held and the page out of the guest's reach.

Invariants: VIRTCHILDCNT is raised before CHLDCNT falls and lowered after it has risen, so their sum
is never smaller than the number of children that the guest believes in; a page that the host has
blocked is never mapped again before it was evicted and loaded.

Source:
    arch/x86/kernel/cpu/sgx/virt.c of intel/kvm-sgx; SDM vol. 3D, "VMM Oversubscription of EPC".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.arch import PageType, RdInfo, RdInfoFlags, RdInfoStatus, Status
from softsgx.hw import Fault
from softsgx.kvm.events import VepcEvicted, VepcLoaded
from softsgx.kvm.fate import Evicted, Fate
from softsgx.paging import Claim, EpcPage, LoadFailed

if TYPE_CHECKING:
    from softsgx.kvm.page import VepcPage

__all__ = ["block", "drop", "name_of", "settle", "write_out"]

_KICKS = 3
_CONTEXT_BYTES = 8


# --- out ------------------------------------------------------------------------------------------


def block(page: VepcPage) -> bool:
    """See what ``page`` is, and EBLOCK it where that is needed.

    Returns:
        ``False``: it cannot leave now; nothing has changed.
    """
    epc, monitor = page.epc, page.vepc.monitor
    assert epc is not None, f"{page!r} is blocked"
    leaves = monitor.host.leaves
    info = RdInfo()
    ending = monitor.leaf(lambda: leaves.erdinfo(info, epc.addr))
    if ending is Status.PG_INVLD:
        page.fate = Fate.UNUSED
        return True
    if ending is not Status.SUCCESS:
        return _kept(page, f"ERDINFO: {name_of(ending)}")
    match PageType(info.flags >> 8 & 0xFF):
        case PageType.SECS:
            if info.status & RdInfoStatus.CHILDPRESENT:
                monitor.counters.kept_secs += 1
                page.tell_kept("secs with children")
                return False
            page.fate = Fate.SECS
            return True
        case PageType.VA:
            page.fate = Fate.VA
            return True
        case _:
            secs = monitor.page_at(info.enclave_context)
            if secs is None or secs.epc is None:
                return _kept(page, f"its SECS is not at {info.enclave_context:#x}")
            page.fate, page.secs = Fate.CHILD, secs
    if info.flags & RdInfoFlags.BLOCKED:
        # The guest's doing, unless a try of ours has failed after EBLOCK.  Evicted all the same:
        # otherwise a guest could keep the host from reclaiming.
        page.guest_blocked = not epc.blocked
        return True
    ending = monitor.leaf(lambda: leaves.eblock(epc.addr))
    if ending is not Status.SUCCESS:
        return _kept(page, f"EBLOCK: {name_of(ending)}")
    epc.blocked = True
    return True


def write_out(page: VepcPage) -> bool:
    """EWB ``page``, which :func:`block` has blocked.

    Returns:
        ``False``: it is where it was; the reservation still stands.
    """
    epc, fate, secs = page.epc, page.fate, page.secs
    counters, vepc = page.vepc.monitor.counters, page.vepc
    assert epc is not None and fate is not None and page.reservation is not None, f"{page!r}"
    tries, linaddr = 0, 0
    ending: Status | Fault = Status.SUCCESS
    if fate is not Fate.UNUSED:
        ending, linaddr, tries = _ewb(page, epc, secs)
    if ending is not Status.SUCCESS:
        return _kept(page, f"EWB: {name_of(ending)}")
    if fate is Fate.UNUSED:
        vepc.swap.cancel(page.reservation)
        counters.unused_out += 1
    else:
        entry = vepc.swap.written(page.reservation)
        page.evicted = Evicted(entry, linaddr, fate, secs, page.guest_blocked)
        counters.secs_out += fate is Fate.SECS
        counters.va_out += fate is Fate.VA
        counters.guest_blocked += page.guest_blocked
        if secs is not None:
            secs.evicted_children += 1
    counters.evicted += 1
    page.epc = None
    vepc.monitor.resident -= 1
    if vepc.monitor.tracer is not None:
        vepc.monitor.tracer(
            VepcEvicted(vepc.monitor.name, page.gpa, fate.value, tries, name_of(ending))
        )
    return True


def _ewb(page: VepcPage, epc: EpcPage, secs: VepcPage | None) -> tuple[Status | Fault, int, int]:
    """EWB with all it takes; return how it ended, the linear address, and how many tries."""
    if secs is None:
        return *_try(page, epc), 1
    if not _count_child(page, epc, secs):
        return Status.INVALID_COUNTER, 0, 0
    ending, linaddr = _try(page, epc)
    tries = 1
    if ending is Status.NOT_TRACKED:
        if _track(page, epc):
            ending, linaddr = _try(page, epc)
            tries = 2
        if ending is Status.NOT_TRACKED:
            # Only after ETRACKC: whoever enters in between is already in the new epoch.
            page.vepc.monitor.kick()
            ending, linaddr = _try(page, epc)
            tries = 3
        elif ending is not Status.SUCCESS:
            page.vepc.monitor.kick()  # the cycle must not be left to the guest
    if ending is not Status.SUCCESS:
        _subtract(page, epc, secs)
    return ending, linaddr, tries


def _try(page: VepcPage, epc: EpcPage) -> tuple[Status | Fault, int]:
    assert page.reservation is not None, f"{page!r} was not prepared"
    ending, linaddr = page.vepc.swap.write_out(page.vepc.monitor.leaf, epc.addr, page.reservation)
    return ending, linaddr


def _track(page: VepcPage, epc: EpcPage) -> bool:
    """ETRACKC for the enclave of ``page``; its previous cycle is completed first if need be."""
    monitor = page.vepc.monitor
    for _try in range(_KICKS):
        ending = monitor.leaf(lambda: monitor.host.leaves.etrackc(epc.addr))
        if ending is Status.SUCCESS:
            monitor.counters.etrackc += 1
            return True
        if ending is not Status.PREV_TRK_INCMPL:
            return False
        monitor.counters.prev_incomplete += 1
        monitor.kick()
    return False


def unstick(page: VepcPage) -> bool:
    """Evict a page that an earlier try has left blocked, so that it can be loaded again.

    Returns:
        ``False``: a batch of reclaim has it now; wait for that.

    Raises:
        LoadFailed: it can neither leave nor be used.
    """
    epc, vepc = page.epc, page.vepc
    assert epc is not None and page.stuck, f"{page!r} is not stuck"
    if not vepc.monitor.host.unmark_reclaimable(epc):
        return False
    page.reservation = vepc.swap.prepare(page.index)
    page.reclaiming = True
    vepc.monitor.leaving += 1
    left = page.reservation is not None and block(page) and write_out(page)
    if not left and page.reservation is not None:
        vepc.swap.cancel(page.reservation)
    page.moved()
    if not left:
        vepc.monitor.host.mark_reclaimable(epc)
        raise LoadFailed("blocked, and cannot leave")
    vepc.monitor.host.free(epc)
    return True


def _kept(page: VepcPage, reason: str) -> bool:
    page.vepc.monitor.counters.kept_failed += 1
    page.tell_kept(reason)
    return False


# --- in -------------------------------------------------------------------------------------------


def settle(page: VepcPage, claim: Claim | None = None) -> EpcPage | None:
    """Return the EPC page of ``page``, made resident and usable if need be.

    Args:
        page: the page.
        claim: the processor's that needs it.

    Returns:
        ``None``: a batch of reclaim is about to look at it; ask again.

    Raises:
        EpcBusy, NoEpc, LoadFailed: as for :func:`fill`.
    """
    if page.stuck and not unstick(page):
        return None
    return page.epc or fill(page, claim)


def fill(page: VepcPage, claim: Claim | None = None, *, secs_for_another: bool = False) -> EpcPage:
    """Make ``page`` resident: what it was, or a page that is not in use.

    Its SECS comes first, and is resident for good as soon as it has a child.

    Args:
        page: the page.
        claim: the processor's that needs it.
        secs_for_another: whether it is a SECS that another page needs first.

    Raises:
        EpcBusy, NoEpc: no EPC page now, or at all; what was loaded on the way stays.
        LoadFailed: it does not authenticate, or its backing is gone.
    """
    evicted, vepc = page.evicted, page.vepc
    monitor = vepc.monitor
    secs_addr = 0
    if evicted is not None:
        if evicted.secs is not None:
            secs = evicted.secs
            secs_addr = (secs.epc or fill(secs, claim, secs_for_another=True)).addr
        vepc.swap.fetch_va(evicted.entry, claim)
    epc = monitor.host.alloc(page, reclaim=False, group=monitor.group, kind="vepc", claim=claim)
    result = Status.SUCCESS.manual_name
    if evicted is not None:
        try:
            ending = vepc.swap.read_in(
                monitor.leaf,
                evicted.entry,
                epc.addr,
                linaddr=evicted.linaddr,
                secs=secs_addr,
                blocked=evicted.blocked,
            )
            result = name_of(ending)
            if ending is not Status.SUCCESS:
                raise LoadFailed(result)
        except LoadFailed:
            monitor.host.remove(epc)
            raise
    page.epc = epc
    if claim is not None:
        claims = monitor.host.claims
        note = claims.fetched if secs_for_another else claims.loaded
        note(claim, page, epc)
    monitor.resident += 1
    kind = "fresh"
    if evicted is not None:
        page.evicted, kind = None, evicted.fate.value
        _hide(page, epc, evicted)
        monitor.counters.loaded += 1
    else:
        monitor.counters.fresh += 1
    monitor.host.mark_reclaimable(epc)
    if monitor.tracer is not None:
        monitor.tracer(VepcLoaded(monitor.name, page.gpa, kind, result))
    return epc


def _hide(page: VepcPage, epc: EpcPage, evicted: Evicted) -> None:
    """A page was loaded: put right what the guest could notice."""
    monitor, secs = page.vepc.monitor, evicted.secs
    if evicted.fate is Fate.SECS:
        monitor.counters.secs_in += 1
        context = page.gpa.to_bytes(_CONTEXT_BYTES, "little")
        monitor.leaf(lambda: monitor.host.leaves.esetcontext(epc.addr, context))
        while page.owed:
            page.owed -= 1
            _subtract(page, epc, page)
    elif secs is not None:
        _subtract(page, epc, secs)
        secs.evicted_children -= 1
        # The guest may have tracked a page that it has blocked before that left, or while it was
        # away.  Nobody has a translation of it, so that it is tracked is true either way.
        if evicted.blocked and _track(page, epc):
            monitor.kick()


def drop(page: VepcPage) -> None:
    """Forget an evicted page, as EREMOVE would."""
    evicted = page.evicted
    assert evicted is not None, f"{page!r} is dropped"
    page.evicted, page.promised = None, False
    page.vepc.swap.drop(evicted.entry)
    secs = evicted.secs
    if secs is None:
        page.owed = 0
        return
    secs.evicted_children -= 1
    if secs.epc is not None:
        _subtract(page, secs.epc, secs)
    else:
        secs.owed += 1


# --- children that only the guest believes in -----------------------------------------------------


def _count_child(page: VepcPage, epc: EpcPage, secs: VepcPage) -> bool:
    monitor = page.vepc.monitor
    assert secs.epc is not None, f"{page!r} is resident, its SECS is not"
    at = secs.epc.addr
    ending = monitor.leaf(lambda: monitor.host.leaves.eincvirtchild(epc.addr, at))
    return ending is Status.SUCCESS


def _subtract(page: VepcPage, epc: EpcPage, secs: VepcPage) -> None:
    """EDECVIRTCHILD through ``epc``, a page of the enclave or its SECS."""
    monitor = page.vepc.monitor
    assert secs.epc is not None, f"{secs!r} is counted in, but evicted"
    at = secs.epc.addr
    ending = monitor.leaf(lambda: monitor.host.leaves.edecvirtchild(epc.addr, at))
    assert ending is Status.SUCCESS, f"EDECVIRTCHILD for {page!r}: {name_of(ending)}"


def name_of(ending: Status | Fault) -> str:
    """Return the code's name in the manual, or the fault."""
    return ending.manual_name if isinstance(ending, Status) else str(ending)
