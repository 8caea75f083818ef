"""What the core keeps of one EPC page: ``struct sgx_epc_page``.

Source:
    ``arch/x86/kernel/cpu/sgx/sgx.h``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.arch import EpcAddr

if TYPE_CHECKING:
    from softsgx.paging.interfaces import Group, Reclaimable
    from softsgx.paging.lru import Lru

__all__ = ["SgxEpcPage"]


class SgxEpcPage:
    """One EPC page that was ever handed out.

    Attributes:
        addr: physical address.
        node: NUMA node it belongs to.
        owner: whom the reclaimer asks about it; ``None`` for pages it never sees.
        group: who is charged for it; ``None`` while it is free.
        kind: what it is used for, a label for counters: ``secs``, ``va``, ``reg``, ``tcs``, …
        free: IS_FREE; written under the node's latch.
        poisoned: its memory is broken; it is never handed out again.
        tracked: TRACKED: on an LRU list, or isolated from it by a running batch.
        lru: the list it is tracked on; written under that list's latch.
        blocked: EBLOCK was done to it and cannot be undone: no mapping of it may be made until it
            has been evicted and loaded again.
        kept: a thread needs it for its instruction: it stays until that has completed.
        leaked: EREMOVE refused it, so it can never be used again.
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
