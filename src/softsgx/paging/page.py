"""The core's record of one EPC page: ``struct sgx_epc_page``.

Source:
    ``arch/x86/kernel/cpu/sgx/sgx.h``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.arch import EpcAddr
from softsgx.compiled import record

if TYPE_CHECKING:
    from softsgx.paging.interfaces import Group, Reclaimable
    from softsgx.paging.lru import Lru

__all__ = ["SgxEpcPage"]


@record
class SgxEpcPage:
    """One EPC page that was ever allocated or poisoned.

    Attributes:
        addr: physical address.
        node: NUMA node it belongs to.
        owner: the reclaimer calls it; ``None``: the page is never reclaimed.
        group: charged for it; ``None`` while it is free.
        kind: a label for counters: ``secs``, ``va``, ``reg``, ``tcs``, …
        free: IS_FREE; written under the node's latch.
        poisoned: a machine check has reported it; it is never allocated again.
        tracked: TRACKED: on an LRU list, or isolated from it by a running batch.
        lru: the list it is tracked on; written under that list's latch.
        blocked: EBLOCK was executed on it, which cannot be undone: it must not be mapped before it
            was evicted and loaded again.
        kept: the thread that holds needs it: it is not evicted until its instruction has completed.
        leaked: EREMOVE refused it, so it is never used again.
    """

    __slots__ = (
        "addr",
        "blocked",
        "free",
        "group",
        "kept",
        "kind",
        "leaked",
        "lru",
        "node",
        "owner",
        "poisoned",
        "tracked",
    )

    def __init__(self, addr: EpcAddr, node: int) -> None:
        self.addr, self.node = addr, node
        self.owner: Reclaimable | None = None
        self.group: Group | None = None
        self.lru: Lru | None = None
        self.kind = ""
        self.free = self.poisoned = self.tracked = self.blocked = self.kept = self.leaked = False

    def __repr__(self) -> str:
        flags = ("free", "poisoned", "tracked", "blocked", "kept", "leaked")
        words = [self.kind, *(flag for flag in flags if getattr(self, flag))]
        return f"<EPC {self.addr:#x} {' '.join(words)}>"
