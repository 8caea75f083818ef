"""Where the evicted pages of an owner are: four bytes a page.

A :class:`SwapEntry` has 96 bytes with its slot, so that it exists only while it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.arch import VA_SLOTS
from softsgx.ondemand import dataclass
from softsgx.paging.sparse import MASK, SHIFT, SparseNumbers
from softsgx.paging.va_page import VaSlot

if TYPE_CHECKING:
    from softsgx.paging.va_page import VaPage

__all__ = ["FIRST", "SwapEntries", "SwapEntry"]

_LOST = 1
FIRST = 2
"""What the number of the first slot is kept as."""


@dataclass(slots=True)
class SwapEntry:
    """Where an evicted page is.

    Attributes:
        index: page index in the enclave; the enclave's size in pages stands for the SECS.
        slot: the VA slot with its version; ``None`` when the page can never be loaded again.
    """

    index: int
    slot: VaSlot | None

    @property
    def lost(self) -> bool:
        """Whether its content no longer exists: every load fails."""
        return self.slot is None


class SwapEntries:
    """The entries of all evicted pages of one owner.

    Args:
        va_pages: every VA page by its index; the VA tree keeps it up to date.
    """

    __slots__ = ("_numbers", "_va_pages")

    def __init__(self, va_pages: dict[int, VaPage]) -> None:
        # 0: the page is resident; _LOST; or the number of its slot among all slots, plus FIRST.
        self._numbers = SparseNumbers()
        self._va_pages = va_pages

    def get(self, index: int) -> SwapEntry | None:
        """Return the entry of a page; ``None``: it is not evicted."""
        chunk = self._numbers.chunks.get(index >> SHIFT)
        number = 0 if chunk is None else chunk[index & MASK]
        if number > _LOST:
            number -= FIRST
            page = self._va_pages[number // VA_SLOTS]
            return SwapEntry(index, VaSlot(page, number % VA_SLOTS))
        return SwapEntry(index, None) if number else None

    def put(self, index: int, entry: SwapEntry | None) -> None:
        """Replace the entry of a page; ``None``: it is not evicted any more."""
        if entry is None:
            number = 0
        elif (slot := entry.slot) is None:
            number = _LOST
        else:
            number = slot.page.index * VA_SLOTS + slot.number + FIRST
        chunk = self._numbers.chunks.get(index >> SHIFT)
        if chunk is not None:
            chunk[index & MASK] = number
        elif number:
            self._numbers.put(index, number)

    def clear(self) -> None:
        """The owner has ended."""
        self._numbers.clear()
