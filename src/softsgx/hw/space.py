"""Linear addresses: how an operand's address becomes a physical one.

ENCLS reaches EPC pages through the kernel's mapping; an enclave's own accesses go through the page
tables of its process.  Both are an :class:`AddressSpace`.  Ordinary memory is a
:class:`Ram`, sparse and unencrypted.
"""

from __future__ import annotations

from typing import Protocol

from softsgx.arch import PAGE_BYTES, Pfec, page_of, split_pages
from softsgx.hw.faults import PageFault

__all__ = ["EXECUTE", "READ", "WRITE", "AddressSpace", "DirectMap", "PageTables", "Ram"]

READ, WRITE, EXECUTE = 1, 2, 4
"""Kinds of access, in SECINFO's bit order."""


class AddressSpace(Protocol):
    """How paging translates linear addresses."""

    def translate(self, linaddr: int, access: int, *, user: bool) -> int:
        """Translate ``linaddr`` to a physical address for one kind of access.

        Raises:
            PageFault: ordinary, without the SGX bit: not present, or not allowed.
        """

    def paging_address(self, linaddr: int) -> int:
        """Translate ``linaddr`` by this space's own paging: to guest-physical in a guest.

        The result becomes ENCLAVECONTEXT and the address of SGX_CONFLICT exits.
        """


class DirectMap:
    """Linear is physical, everything allowed: the kernel's own mapping of EPC."""

    def translate(self, linaddr: int, access: int, *, user: bool) -> int:
        """Return ``linaddr``."""
        return linaddr

    def paging_address(self, linaddr: int) -> int:
        """Return ``linaddr``."""
        return linaddr


class PageTables:
    """A process' mappings, one entry a 4096-byte page."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[int, int]] = {}

    def map(self, linaddr: int, physical: int, rights: int) -> None:
        """Map the page at ``linaddr`` to ``physical`` with R/W/X ``rights``; both page aligned."""
        assert linaddr % PAGE_BYTES == physical % PAGE_BYTES == 0, "unaligned mapping"
        self._entries[linaddr] = physical, rights

    def unmap(self, linaddr: int) -> None:
        """Remove the page's entry, if there is one."""
        self._entries.pop(linaddr, None)

    def entry(self, linaddr: int) -> tuple[int, int] | None:
        """Return (physical, rights) of the page at ``linaddr``."""
        return self._entries.get(page_of(linaddr))

    def translate(self, linaddr: int, access: int, *, user: bool) -> int:
        """As :meth:`AddressSpace.translate`."""
        entry = self._entries.get(linaddr & -PAGE_BYTES)
        if entry is not None and not access & ~entry[1]:
            return entry[0] | linaddr % PAGE_BYTES
        code = (Pfec.U if user else 0) | (Pfec.W if access == WRITE else 0)
        code |= Pfec.I if access == EXECUTE else 0
        raise PageFault(linaddr, code if entry is None else code | Pfec.P)

    def paging_address(self, linaddr: int) -> int:
        """As :meth:`AddressSpace.paging_address`."""
        return self.translate(linaddr, READ, user=False)


class Ram:
    """Ordinary physical memory: zero until written, kept page by page."""

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}

    def read(self, physical: int, size: int) -> bytes:
        """Return ``size`` bytes; they may cross pages."""
        parts = []
        for at, length in split_pages(physical, size):
            page, start = self._pages.get(page_of(at)), at % PAGE_BYTES
            parts.append(bytes(length) if page is None else bytes(page[start : start + length]))
        return b"".join(parts)

    def write(self, physical: int, data: bytes) -> None:
        """Write ``data``; it may cross pages."""
        for at, length in split_pages(physical, len(data)):
            page, start = (
                self._pages.setdefault(page_of(at), bytearray(PAGE_BYTES)),
                at % PAGE_BYTES,
            )
            page[start : start + length] = data[at - physical : at - physical + length]

    def discard(self, physical: int) -> None:
        """Free the memory of one page, which then reads as zero."""
        self._pages.pop(page_of(physical), None)
