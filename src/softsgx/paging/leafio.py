"""EWB and ELDU between an EPC page and pinned backing pages, and how a leaf ended.

Source:
    ``__sgx_encl_ewb()``, main.c; ``__sgx_encl_eldu()``, encl.c; ``encls_failed()``, encls.h: #PF
    is excused, because it means that the EPCM entry has vanished with the power.
"""

from __future__ import annotations

from softsgx.arch import Status
from softsgx.hw import Fault, Leaves, PageFault, PageInfoArgs
from softsgx.paging.swapfile import Pinned

__all__ = ["LeafResult", "eldu", "ewb", "result_name", "vanished"]

LeafResult = Status | Fault
"""How a leaf ended: its code, or the fault."""


def ewb(leaves: Leaves, addr: int, slot_addr: int, pinned: Pinned) -> LeafResult:
    """Evict the page at ``addr``, its version going to ``slot_addr``."""
    leaf = leaves.ewb
    try:
        return leaf(PageInfoArgs(0, pinned.data, pinned.pcmd_bytes, 0), addr, slot_addr)
    except Fault as fault:
        return fault


def eldu(
    leaves: Leaves, addr: int, slot_addr: int, pinned: Pinned, linaddr: int, secs: int
) -> LeafResult:
    """Load a page into the free EPC page at ``addr``."""
    leaf = leaves.eldu
    try:
        return leaf(PageInfoArgs(linaddr, pinned.data, pinned.pcmd_bytes, secs), addr, slot_addr)
    except Fault as fault:
        return fault


def vanished(result: LeafResult, addr: int) -> bool:
    """Return whether a leaf found no valid EPC page at ``addr``, where there was one."""
    return isinstance(result, PageFault) and result.address == addr


def result_name(result: LeafResult) -> str:
    """Return the code's name in the manual, or the fault."""
    return result.manual_name if isinstance(result, Status) else str(result)
