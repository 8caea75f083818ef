"""Loads of evicted pages in one step.

Instead of calls from :class:`PlainSwap` to :class:`PlainCore`, VA pages and backing, one function
has the effects of all, in the same order.  It handles a load for which nothing is missing: the page
is evicted, its SECS and VA page are resident, an EPC page is free, no claim holds.  Only a refused
charge and a refused ELDU continue in the methods of these classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.arch import PAGE_BYTES, VA_SLOT_BYTES, VA_SLOTS
from softsgx.paging.claims import Claim
from softsgx.paging.entries import FIRST
from softsgx.paging.interfaces import Group, Reclaimable
from softsgx.paging.page import SgxEpcPage
from softsgx.paging.sealed import BLOCK_PAGES, SEALED_BYTES
from softsgx.paging.slowpath import AllocRequest, no_signal
from softsgx.paging.sparse import MASK, SHIFT
from softsgx.paging.swapfile import PCMDS_PER_PAGE

if TYPE_CHECKING:
    from softsgx.paging.optimised import PlainSwap

__all__ = ["load_at"]


def load_at(
    swap: PlainSwap,
    index: int,
    owner: Reclaimable,
    kind: str,
    cpu_node: int,
    group: Group | None,
    claim: Claim | None,
) -> SgxEpcPage | None:
    """Load an evicted page as :meth:`EnclaveSwap.load`; end its entry; mark it reclaimable.

    Args:
        swap: of its enclave.
        index: its index in the enclave.
        owner: the page.
        kind: as for ``load``.
        cpu_node: as for ``load``.
        group: as for ``load``.
        claim: as for ``load``.

    Returns:
        ``None``: the page is not evicted, or needs more than this; nothing has changed.

    Raises:
        EpcBusy, NoEpc, LoadFailed: as for :meth:`EnclaveSwap.load`.
    """
    # What has to be there
    high, low = index >> SHIFT, index & MASK
    entries = swap.entries
    numbers = entries._numbers.chunks.get(high)
    number = 0 if numbers is None else numbers[low]
    core, secs, va, flat = swap._core, swap.secs, swap.va, swap._file._flat
    store = flat.sealed
    places = store._places.chunks.get(high)
    order = core._pool._orders.get(cpu_node)
    if number < FIRST or numbers is None or places is None or order is None:
        return None
    number -= FIRST
    va_page = entries._va_pages[number // VA_SLOTS]
    va_epc, place, freed = va_page.epc, places[low], order[0].freed
    claims, children = core.claims, swap.children
    if (
        va_epc is None
        or va_page.eviction is not None
        or secs is None
        or not children
        or not place
        or claims.holder is not None
        or not freed
        or freed[0].poisoned
    ):
        return None

    # An EPC page
    va_page.accessed = True
    if group is None:
        group = core.root
    ksgxd, free = core._ksgxd, core._free
    refused = group.try_charge()
    if refused is None:
        page = freed.popleft()
        page.free = False
        free.value -= 1
    else:
        request = AllocRequest(False, no_signal, claim)
        seen = ksgxd.generation, ksgxd.outcomes
        page = core._take_refused(group, refused, seen, cpu_node, request, kind)
    page.owner, page.group, page.kind = owner, group, kind
    counters = swap._counters
    held = counters.held
    held[kind] = held.get(kind, 0) + 1
    if free.value < core._low and ksgxd.asleep and core.root.has_reclaimable():
        ksgxd.request()

    # Its content
    place -= 1
    at = place % BLOCK_PAGES * SEALED_BYTES
    blocks, linaddr = store._blocks, swap._base + index * PAGE_BYTES
    slot = number % VA_SLOTS
    slot_addr = va_epc.addr + slot * VA_SLOT_BYTES
    unusual = flat.unusual
    flags = ((unusual and unusual.get(index)) or flat.usual or (0,))[0]
    sealed = blocks[place // BLOCK_PAGES][at : at + SEALED_BYTES]
    if not swap._leaves.try_eldu(linaddr, secs.addr, sealed, flags, page.addr, slot_addr):
        swap._load_by_leaf(page, index, slot_addr, linaddr, secs.addr)

    # Its backing and its slot are free again
    places[low] = numbers[low] = 0
    room = store.free
    room.append(place)
    if len(room) == len(blocks) * BLOCK_PAGES and len(blocks) > 1:
        store._shrink(1)
    if unusual:
        unusual.pop(index, None)
    counters.truncated += 1
    sharers, pcmds = flat.sharers, index // PCMDS_PER_PAGE
    others = sharers.get(pcmds) - 1
    sharers.put(pcmds, others)
    if not others:
        flat.pcmd_pages -= 1
        counters.pcmd_truncated += 1
    va_page.free |= 1 << slot
    va.used -= 1
    va.room += 1
    va._pages.move_to_end(va_page, last=False)
    counters.eldu += 1
    children = swap.children = children + 1
    if children > swap.peak_children:
        swap.peak_children = children
    if claim is not None:
        loads = claim.loads
        if owner in loads or claim.prerequisites or claims.holder is not None:
            claims.loaded(claim, owner, page)
        else:
            loads[owner] = page
            if len(loads) > claims.pages:
                del loads[next(iter(loads))]

    # It may leave again
    assert not page.tracked, f"{page!r} is tracked already"
    lru = page.lru = group.lru
    page.tracked = True
    lru.pages.append(page)
    ksgxd._gave_up = False
    if ksgxd._oom_verdicts:
        ksgxd._oom_verdicts.clear()
    return page
