"""One VA page and its slots.  The reclaimer evicts it like any other page.

Lock order: the lock of the array it belongs to, then the VA tree's.

Source:
    ``struct sgx_va_page``, encl.h; SDM vol. 3D, "Version Array (VA)".
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from softsgx.arch import VA_SLOT_BYTES, VA_SLOTS, Status
from softsgx.compiled import record, speedups
from softsgx.paging.events import Evicted
from softsgx.paging.failures import BackingError
from softsgx.paging.leafio import LeafResult, ewb, result_name, vanished
from softsgx.paging.page import SgxEpcPage
from softsgx.paging.swapfile import Pinned

if TYPE_CHECKING:
    from softsgx.paging.va import VaArray

__all__ = ["ALL_FREE", "ReadableVaPageList", "VaPage", "VaPageList", "VaSlot"]

_SUCCESS = Status.SUCCESS
ALL_FREE = (1 << VA_SLOTS) - 1


class VaSlot:
    """One VA slot in use.

    Attributes:
        page: its VA page.
        number: 0 to 511.
    """

    __slots__ = ("number", "page")

    def __init__(self, page: VaPage, number: int) -> None:
        self.page, self.number = page, number

    @property
    def addr(self) -> int:
        """Its EPC address; the VA page must be resident."""
        epc = self.page.epc
        assert epc is not None, f"slot {self.number} of a VA page that is evicted"
        return epc.addr + self.number * VA_SLOT_BYTES

    def accepted(self, result: LeafResult) -> bool:
        """Return whether EWB has evicted a page and written its version to this slot."""
        if result is _SUCCESS:
            return True
        if result is Status.VA_SLOT_OCCUPIED:
            # EWB has evicted the page nevertheless; the version that it has overwritten is stale.
            assert self.page.stale >> self.number & 1, "EWB has overwritten another page's version"
            return True
        return False


@record
class VaPage:
    """One VA page, a :class:`~softsgx.paging.Reclaimable`.

    Attributes:
        array: the array it belongs to.
        index: its index in the tree's swap file.
        epc: the EPC page, ``None`` while it is evicted.
        free: bitmap of free slots.
        stale: bitmap of free slots that hold the version of a dropped page; EWB to such a slot
            returns VA_SLOT_OCCUPIED, which is harmless.
        pins: evictions that have reserved a slot here: the page must stay resident.
        accessed: whether a slot was used since the last :meth:`age`.
        parent: the slot that holds its own version while it is evicted.
        eviction: while it is being evicted: its backing, and the slot for its version.
        lost: it was resident when the machine lost power.
    """

    __slots__ = (
        "accessed",
        "array",
        "epc",
        "eviction",
        "free",
        "index",
        "lost",
        "parent",
        "pins",
        "stale",
    )

    def __init__(self, array: VaArray, index: int) -> None:
        self.array, self.index = array, index
        self.epc: SgxEpcPage | None = None
        self.free = ALL_FREE
        self.stale = 0
        self.pins = 0
        self.accessed = False
        self.parent: VaSlot | None = None
        self.lost = False
        self.eviction: tuple[Pinned, VaSlot] | None = None

    @property
    def free_slots(self) -> int:
        """How many slots are free."""
        return self.free.bit_count()

    @property
    def usable(self) -> bool:
        """Whether its free slots can be taken: it is resident and not being evicted."""
        return self.epc is not None and self.eviction is None

    # --- Reclaimable ------------------------------------------------------------------------------

    def get(self) -> bool:
        """Pin the enclave; ``False`` also when the page cannot be evicted now."""
        return self.array.can_evict(self) and self.array.pin.get()

    def put(self) -> None:
        """Unpin the enclave."""
        self.array.pin.put()

    def age(self) -> bool:
        """Return whether no slot was used since the last call."""
        young, self.accessed = self.accessed, False
        return not young

    def prepare(self) -> bool:
        """Reserve backing and a slot one level up."""
        array, tree = self.array, self.array.tree
        with array.lock:
            if self.epc is None or self.eviction is not None or not array.can_evict(self):
                return False
            with array.tree_lock():
                try:
                    pinned = tree.file.reserve(self.index)
                except BackingError:
                    return False
                slot = tree.alloc_upper_slot(array.level)
                if slot is None:
                    tree.file.cancel(pinned)
                    return False
            self.eviction = pinned, slot
            array.eviction_begun(self)
            return True

    def block(self) -> bool:
        """Return ``True``: EBLOCK is not for VA pages."""
        return True

    def write(self) -> bool:
        """EWB, unless the eviction was cancelled because a task needs the page."""
        array, tree = self.array, self.array.tree
        with array.lock:
            if self.eviction is None:
                return False
            pinned, slot = self.eviction
            epc = self.epc
            assert epc is not None, "a VA page that is being evicted is not resident"
            if epc.poisoned:
                self.cancel_eviction()
                return False
            result = ewb(tree.core.leaves, epc.addr, slot.addr, pinned)
            tree.trace(Evicted(epc.addr, "va", self.index, 1, result_name(result)))
            if vanished(result, epc.addr):
                self.cancel_eviction()
                self.lost = True
                tree.core.counters.lost += 1
                array.evicted(self)
                return True
            if not slot.accepted(result):
                self.cancel_eviction()
                tree.core.counters.ewb_failed += 1
                if vanished(result, slot.addr):
                    with array.tree_lock():
                        slot.page.array.discard_invalid(
                            slot.page
                        )  # the next try takes another page's slot
                return False
            with array.tree_lock():
                tree.file.written(pinned)
                slot.page.array.slot_written(slot)
            self.eviction, self.parent = None, slot
            array.evicted(self)
            tree.core.counters.va_out += 1
            return True

    def cancel_eviction(self) -> None:
        """Keep the page resident; the array's lock is held."""
        assert self.eviction is not None, "a VA page is not being evicted"
        pinned, slot = self.eviction
        tree = self.array.tree
        with self.array.tree_lock():
            tree.file.cancel(pinned)
            slot.page.array.cancel_slot(slot)
        self.eviction = None
        self.array.made_usable(self)


class ReadableVaPageList(OrderedDict[VaPage, None]):
    """VA pages in an order that changes with their room; a page is on one list at most.

    The compiled core links the pages, as those of a :class:`~softsgx.paging.page_list.PageList`.
    """

    __slots__ = ()

    def append(self, page: VaPage) -> None:
        """Add a page that is on no list, as the last one."""
        self[page] = None

    def remove(self, page: VaPage) -> None:
        """Take a page off the list.

        Raises:
            KeyError: it is not on the list.
        """
        del self[page]


if TYPE_CHECKING or speedups is None:
    VaPageList = ReadableVaPageList
else:
    VaPageList = speedups.VaPageList
