"""Page stores: the bytes of resident pages.

A store is an argument of the machine: a dictionary here, a memfd per enclave in the native
engine.  The machine calls it for valid pages of a type with an owner only, so a store may place a
page by its enclave and linear address as well as by its physical one.
"""

from __future__ import annotations

from typing import Protocol

from softsgx.arch import PAGE_BYTES, EpcAddr
from softsgx.hw.epcm import EpcPage

__all__ = ["DictStore", "PageStore", "share_zero_page"]

_ZEROS = bytes(PAGE_BYTES)


def share_zero_page(data: bytes) -> bytes:
    """Return ``data``, or one object that all pages of zeros share.

    A heap that is added and not used yet then costs no memory but its EPCM entries.  A store copies
    the bytes before the first write to a page.
    """
    return _ZEROS if data == _ZEROS else data


class PageStore(Protocol):
    """The bytes of REG, TCS, TRIM, SS_FIRST and SS_REST pages.

    Calls for one page come one at a time (its EPCM lock is held, or it is a plain access).
    ``page.secs`` and ``page.linaddr`` are already set when ``fill`` is called and still set in
    ``drop``.

    A store may keep an object of its own for a page in ``page.stored``.
    """

    def fill(self, page: EpcPage, data: bytes) -> None:
        """Make ``page`` resident with 4096 bytes; no access sees it half filled."""

    def freeze(self, page: EpcPage) -> bytes | bytearray:
        """Return the 4096 bytes of a page that EWB evicts; later stores to it must not succeed.

        Followed by ``drop``, or by ``thaw`` when the leaf refuses after all.
        """

    def thaw(self, page: EpcPage) -> None:
        """Undo ``freeze``."""

    def drop(self, page: EpcPage) -> None:
        """Forget the bytes of a page that is no longer resident."""

    def read(self, page: EpcPage, offset: int, size: int) -> bytes:
        """Return ``size`` bytes at ``offset``, within the page."""

    def write(self, page: EpcPage, offset: int, data: bytes) -> None:
        """Replace bytes at ``offset``, within the page."""

    def clear(self) -> None:
        """Forget every page: power is lost."""


class DictStore:
    """Bytes in a dictionary; its memory grows and shrinks with the pages in use."""

    __slots__ = ("_pages",)

    def __init__(self) -> None:
        self._pages: dict[EpcAddr, bytes | bytearray] = {}

    def fill(self, page: EpcPage, data: bytes) -> None:
        """Keep the object itself, or the shared page of zeros; the first write copies it."""
        self._pages[page.addr] = share_zero_page(data)

    def freeze(self, page: EpcPage) -> bytes | bytearray:
        """Return the bytes; the leaf holds the page exclusively, so no other one writes."""
        return self._pages[page.addr]

    def thaw(self, page: EpcPage) -> None:
        """Nothing was frozen."""

    def drop(self, page: EpcPage) -> None:
        """Drop the bytes."""
        del self._pages[page.addr]

    def read(self, page: EpcPage, offset: int, size: int) -> bytes:
        """Return a copy; a page that was dropped reads as the abort page.

        An access through a stale translation comes here; tracking rules that out, and a checker
        reports it.
        """
        data = self._pages.get(page.addr)
        if data is None:
            return b"\xff" * size
        return bytes(data[offset : offset + size])

    def write(self, page: EpcPage, offset: int, data: bytes) -> None:
        """Write in place, into a private copy made at the first write."""
        kept = self._pages.get(page.addr)
        if kept is None:
            return
        if not isinstance(kept, bytearray):
            kept = self._pages[page.addr] = bytearray(kept)
        assert offset + len(data) <= PAGE_BYTES, "a store beyond the page"
        kept[offset : offset + len(data)] = data

    def clear(self) -> None:
        """Forget everything."""
        self._pages.clear()

    def __len__(self) -> int:
        return len(self._pages)
