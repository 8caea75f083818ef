"""The protocols that owners, groups and backing files implement for the core.

The core moves EPC pages between free lists, LRU lists and their owners.  Each method says which
preconditions hold when the core calls it.

Source:
    ``sgx_reclaim_pages()`` and its callees, arch/x86/kernel/cpu/sgx/main.c; the operations of the
    earlier ``struct sgx_epc_page_ops``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from softsgx.hw import Leaves, MachineConfig

if TYPE_CHECKING:
    from softsgx.paging.lru import Lru

__all__ = ["BackingFile", "BackingPage", "Group", "Hardware", "Reclaimable"]


class Hardware(Protocol):
    """A machine: a :class:`softsgx.hw.Machine`, or a guest."""

    @property
    def config(self) -> MachineConfig:
        """Sections, nodes, features: what CPUID enumerates."""

    @property
    def leaves(self) -> Leaves:
        """ENCLS as typed functions; EPC operands by the addresses that ``config`` names."""


class Reclaimable(Protocol):
    """The owner of one page, as the reclaimer calls it, in this order.

    ======== ===================== ===========================================================
    call     holds before          on ``True`` / ``False``
    ======== ===================== ===========================================================
    get      LRU lock; page        pinned: it cannot be destroyed / it is being destroyed: the
             just unlinked         core no longer tracks the page
    age      pinned, no lock       old enough to be evicted / young: back to the LRU's tail
    prepare  pinned, no lock       backing reserved, faults on the page wait / back to the tail
    block    prepared              no PTE maps it, EPCM.BLOCKED is set / undone: to the tail
    write    blocked               content, PCMD and version are written, the owner no longer
                                   refers to the EPC page / the page stays, usable: to the tail
    put      pinned, no lock       always last; may run the owner's destructor
    ======== ===================== ===========================================================

    A call that returns ``False`` has undone what the calls before it did, except ``get``.
    """

    def get(self) -> bool:
        """Pin the owner so that it outlives the batch; never waits."""

    def put(self) -> None:
        """Unpin."""

    def age(self) -> bool:
        """Test and clear the accessed bits; ``True``: no processor has accessed the page since."""

    def prepare(self) -> bool:
        """Reserve the backing and mark the page as being reclaimed, in one critical section."""

    def block(self) -> bool:
        """Remove every PTE, then EBLOCK."""

    def write(self) -> bool:
        """EWB; if needed again after ETRACK, and again after an interrupt to each processor."""


class Group(Protocol):
    """The group that an EPC page is charged to.

    Attributes:
        lru: the reclaimable pages charged to exactly this group.
    """

    lru: Lru

    def try_charge(self) -> Group | None:
        """Charge one page to this group and its ancestors.

        Returns:
            ``None`` when charged.  Otherwise nothing is charged, and the result is the group whose
            limit refused: the caller reclaims in its subtree.
        """

    def uncharge(self, pages: int = 1) -> None:
        """Uncharge pages from this group and its ancestors."""

    def walk(self) -> Iterator[Group]:
        """Yield the groups of the subtree in turn, without end.

        All walks from this group share one position, so that pages of siblings are evicted evenly.
        """

    def is_below(self, other: Group) -> bool:
        """Return whether a page charged here is charged to ``other`` too."""

    def describe(self) -> str:
        """Return the group and its limit, for messages."""

    def has_reclaimable(self) -> bool:
        """Return whether any LRU in the subtree has a page."""

    def reclaim_failed(self) -> bool:
        """Free pages as a last resort: a charge failed and no page of the subtree can be evicted.

        Returns:
            ``True``: an enclave was killed, so the core tries the charge again; ``False``: the
            allocation fails.
        """


class BackingPage(Protocol):
    """One pinned 4096-byte page of a backing file.

    Attributes:
        index: its index in the file.
        data: its bytes, writable while pinned.
    """

    index: int
    data: bytearray

    def part(self, start: int, size: int) -> memoryview:
        """Return ``size`` bytes of ``data`` from ``start``, writable while pinned."""

    def mark_dirty(self) -> None:
        """Mark ``data`` as written; call after writing, or the file may drop the bytes."""

    def unpin(self) -> None:
        """Unpin the page; the file may drop the bytes of a page that is not dirty."""


class BackingFile(Protocol):
    """The backing of evicted pages: one sparse file per enclave.

    Only :meth:`pin` fails.  Dirty pages are never lost: a page that cannot be written to disk stays
    in memory.
    """

    def pin(self, index: int, *, create: bool) -> BackingPage:
        """Return page ``index``, pinned.

        Raises:
            BackingError: the file is full (``create``), has no such page (not ``create``), or its
                disk fails; nothing has changed, and a later try may succeed.
        """

    def truncate(self, index: int) -> None:
        """Free page ``index``; pinned copies are detached from the file."""

    def pages(self) -> int:
        """Return how many pages the file holds."""

    def close(self) -> None:
        """Free every page."""
