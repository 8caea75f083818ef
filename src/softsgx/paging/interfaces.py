"""What the core asks of the parts it does not know.

The core moves EPC pages between free lists, LRU lists and their owners.  Who owns a page, what
accounts for it and where its bytes go when it leaves are the owner's, the group's and the backing
file's business; here is what each must offer, with what holds when the core calls it.

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
    """What the core needs of a machine: a :class:`softsgx.hw.Machine`, or a guest's."""

    @property
    def config(self) -> MachineConfig:
        """Sections, nodes, features: what CPUID tells."""

    @property
    def leaves(self) -> Leaves:
        """ENCLS as typed functions; EPC operands by the addresses that ``config`` names."""


class Reclaimable(Protocol):
    """One page's owner, as the reclaimer sees it.  Called in this order.

    ======== ===================== ===========================================================
    call     holds before          on ``True`` / ``False``
    ======== ===================== ===========================================================
    get      LRU lock; page        pinned, it cannot be destroyed / it is dying: the core
             just unlinked         forgets the page
    age      pinned, no lock       old enough to leave / young: back to the LRU's tail
    prepare  pinned, no lock       backing reserved, faults on the page back off /
                                   back to the tail
    block    prepared              no PTE maps it, EPCM.BLOCKED is set / undone: to the tail
    write    blocked               bytes, PCMD and version are out and the owner has forgotten
                                   the EPC page / the page is where it was, usable: to the tail
    put      pinned, no lock       always last; may run the owner's destructor
    ======== ===================== ===========================================================

    A call that returns ``False`` has undone what the calls before it did, except ``get``.
    """

    def get(self) -> bool:
        """Pin the owner so that it outlives this batch; never waits."""

    def put(self) -> None:
        """Unpin."""

    def age(self) -> bool:
        """Test and clear the accessed bits; ``True`` when nobody used the page since."""

    def prepare(self) -> bool:
        """Reserve the backing and mark the page as being reclaimed, in one critical section."""

    def block(self) -> bool:
        """Remove every PTE, then EBLOCK."""

    def write(self) -> bool:
        """EWB: as it is, after ETRACK, after kicking processors out."""


class Group(Protocol):
    """Who is charged for an EPC page: the one place, whoever uses the page.

    Attributes:
        lru: the reclaimable pages charged to exactly this group.
    """

    lru: Lru

    def try_charge(self) -> Group | None:
        """Charge one page to this group and its ancestors.

        Returns:
            ``None`` when charged; otherwise nothing is charged and the result is the group whose
            limit refused: reclaim has to happen in its subtree.
        """

    def uncharge(self) -> None:
        """Take one page off this group and its ancestors."""

    def walk(self) -> Iterator[Group]:
        """Yield the groups of the subtree, one endless fair round after the other.

        The position is shared by all walkers of this group, so that siblings shrink evenly.
        """

    def is_below(self, other: Group) -> bool:
        """Return whether what is charged here is charged to ``other`` too."""

    def describe(self) -> str:
        """Return what has how many pages at most, for people."""

    def has_reclaimable(self) -> bool:
        """Return whether any LRU in the subtree has a page."""

    def reclaim_failed(self) -> bool:
        """Nothing in the subtree can be reclaimed and a charge failed: a last resort.

        Returns:
            ``True`` when something was done that frees pages (an enclave was killed), so that the
            charge is worth another try; ``False`` ends it with "no memory".
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
        """Say that ``data`` was written; call after writing, or the bytes may be dropped."""

    def unpin(self) -> None:
        """Give the pin back; a page that is not dirty may lose what was written to it."""


class BackingFile(Protocol):
    """Ordinary memory that evicted pages go to: one file per enclave, sparse.

    Only :meth:`pin` fails.  What was marked dirty is there afterwards, whatever a disk says: a page
    that cannot be written stays in memory.
    """

    def pin(self, index: int, *, create: bool) -> BackingPage:
        """Return page ``index``, pinned.

        Raises:
            BackingError: there is no room (``create``), no such page (not ``create``), or it
                cannot be read or made; nothing has changed, and a later try may succeed.
        """

    def truncate(self, index: int) -> None:
        """Drop page ``index``; pinned copies become detached from the file."""

    def pages(self) -> int:
        """Return how many pages it holds."""

    def close(self) -> None:
        """Drop everything."""
