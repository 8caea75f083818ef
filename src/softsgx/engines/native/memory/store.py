"""The store of resident pages: which of them are in the memory files that the program maps.

A page of an enclave is either *shown* or *hidden*.  Shown: its bytes are in the memory file, at
the offset that equals its linear address, so every mapping of the file has them and the program
uses them at native speed.  Hidden: its bytes are in the supervisor, the file has a hole there, and
each access of the program faults.  A page is shown while a page table maps it and its EPCM entry
lets enclave code use it.  TCS, pending, modified and trimmed pages are always hidden, and so are
pages without any right and poisoned pages.  In each address space a shown page has the rights that
both its mapping and its EPCM entry have.

Invariant: while a page is shown, the file has the only copy of its bytes; else ``_hidden`` does,
unless they are zeros: a heap that is added and not used yet costs no more than its EPCM entries.

A page that no page table maps any more may stay shown until its bytes are needed, or until the
supervisor resumes the program: pages are evicted in batches, and hiding sixteen neighbours costs
little more than hiding one.  Threads that run meanwhile use the page as if their TLB still had the
translation, which hardware allows until ETRACK and an exit.

Deviation: a page with the EPCM right X can also be read: page table entries cannot allow fetches
without reads.

Deviation: code outside the enclave reads a shown page's bytes, where hardware gives ones, unless
the run is strict.
"""

from __future__ import annotations

from softsgx import compiled
from softsgx.arch import PAGE_BYTES, PageType
from softsgx.engines.native.memory.memory_file import (
    ALL_RIGHTS,
    EXECUTE,
    READ,
    WRITE,
    EnclaveMemory,
    User,
)
from softsgx.hw import EpcPage

__all__ = ["ZEROS", "NativeStore"]

_ONES, ZEROS = b"\xff" * PAGE_BYTES, bytes(PAGE_BYTES)
_REG = PageType.REG  # the lookup of an enumeration's member is slow


class NativeStore:
    """The machine's page store: it holds the bytes of resident pages; see the module.

    Attributes:
        poisoned: EPC addresses of pages whose memory has an uncorrected error.
        shown: memory file, linear address and EPCM rights of each page that is in a file, by EPC
            address; also of those that no page table maps any more.
    """

    __slots__ = ("_hidden", "_leaving", "_maps", "poisoned", "shown")

    def __init__(self) -> None:
        self.poisoned: set[int] = set()
        self._hidden: dict[int, bytes | bytearray] = {}
        self.shown: dict[int, tuple[EnclaveMemory, int, int]] = {}
        self._maps: dict[int, tuple[EnclaveMemory, int, int]] = {}
        self._leaving: set[int] = set()

    # --- the machine's side ---------------------------------------------------------------------

    def fill(self, page: EpcPage, data: bytes) -> None:
        """Keep the bytes, hidden until a page table maps the page."""
        if data == ZEROS:
            self._hidden.pop(page.addr, None)
        else:
            self._hidden[page.addr] = data

    def freeze(self, page: EpcPage) -> bytes | bytearray:
        """Hide the page, so that no thread can store to it, and return its bytes."""
        addr = page.addr
        if addr in self._leaving:
            self.hide_unmapped()
        elif addr in self.shown:
            self._hide(addr)
        return self._hidden.get(addr, ZEROS)

    def thaw(self, page: EpcPage) -> None:
        """The page was not evicted: show it again, if its entries allow that."""
        self.refresh(page)

    def drop(self, page: EpcPage) -> None:
        """Forget the bytes."""
        addr = page.addr
        if addr in self.shown:
            self._hide(addr)
        self._hidden.pop(addr, None)

    def read(self, page: EpcPage, offset: int, size: int) -> bytes:
        """Return bytes of a page, shown or hidden."""
        shown = self.shown.get(page.addr)
        if shown is None:
            return bytes(self._hidden.get(page.addr, ZEROS)[offset : offset + size])
        memory, linaddr, _rights = shown
        return memory.read(linaddr + offset, size)

    def write(self, page: EpcPage, offset: int, data: bytes) -> None:
        """Replace bytes of a page, shown or hidden."""
        shown = self.shown.get(page.addr)
        if shown is not None:
            memory, linaddr, _rights = shown
            memory.write(linaddr + offset, data)
            return
        kept = self._hidden.get(page.addr, ZEROS)
        if not isinstance(kept, bytearray):
            kept = self._hidden[page.addr] = bytearray(kept)
        kept[offset : offset + len(data)] = data

    def poison(self, page: EpcPage) -> None:
        """Give the memory of ``page`` an uncorrected error: every use traps from now on."""
        self.poisoned.add(page.addr)
        self.refresh(page)

    def clear(self) -> None:
        """Drop the bytes of all pages, after a loss of power."""
        for addr in list(self.shown):
            self._hide(addr)
        self._hidden.clear()

    # --- the page tables' side ------------------------------------------------------------------

    def mapped(
        self, page: EpcPage, memory: EnclaveMemory, linaddr: int, user: User | None = None
    ) -> None:
        """One more page table maps ``page``, at ``linaddr``.

        Args:
            page: the page.
            memory: what is mapped there.
            linaddr: its address.
            user: the page table; ``None``: no matter which.
        """
        addr = page.addr
        known = self._maps.get(addr)
        self._maps[addr] = memory, linaddr, 1 if known is None else known[2] + 1
        rights = page.rwx
        if (
            rights & WRITE
            and page.valid
            and page.pt is _REG
            and not (page.pending or page.modified)
            and addr not in self.shown
            and addr not in self.poisoned
        ):
            # As refresh() does it: a hidden page that becomes usable, has R, and has no marks.
            self.shown[addr] = memory, linaddr, rights
            memory.show(linaddr, self._hidden.pop(addr, ZEROS), rights, user)
            return
        self._leaving.discard(addr)
        self.refresh(page)

    def unmapped(self, addr: int) -> None:
        """One page table fewer maps the page at EPC address ``addr``."""
        memory, linaddr, count = self._maps[addr]
        if count > 1:
            self._maps[addr] = memory, linaddr, count - 1
        else:
            del self._maps[addr]
            if addr in self.shown:
                self._leaving.add(addr)

    def hide_unmapped(self) -> None:
        """Hide the pages that no page table maps any more.

        Call it before the program is resumed, and before a step that relies on their faulting.
        """
        leaving = self._leaving
        if not leaving:
            return
        shown, hidden = self.shown, self._hidden
        by_file: dict[EnclaveMemory, dict[int, int]] = {}
        for addr in leaving:
            memory, linaddr, _rights = shown[addr]
            pages = by_file.get(memory)
            if pages is None:
                pages = by_file[memory] = {}
            pages[linaddr] = addr
        for memory, pages in by_file.items():
            ascending = sorted(pages)
            for linaddr, data in zip(ascending, memory.hide(ascending), strict=True):
                addr = pages[linaddr]
                if data != ZEROS:
                    hidden[addr] = data
                del shown[addr]
        leaving.clear()

    def lend(self, addr: int, memory: EnclaveMemory, linaddr: int) -> None:
        """Show a page of ones at ``linaddr`` in place of the page, whose bytes stay hidden."""
        self.hide_unmapped()
        self._hide(addr)
        memory.show(linaddr, _ONES, ALL_RIGHTS)

    def take_back(self, memory: EnclaveMemory, linaddr: int) -> None:
        """Remove the page of ones and drop what was stored in it; call :meth:`refresh` next."""
        memory.hide([linaddr])

    def is_mapped(self, addr: int) -> bool:
        """Return whether some page table maps the page at EPC address ``addr``."""
        return addr in self._maps

    def is_shown(self, addr: int) -> bool:
        """Return whether page tables map the page and its bytes are in a memory file."""
        return addr in self.shown and addr not in self._leaving

    def rights(self, addr: int) -> int:
        """Return the EPCM rights of the page at EPC address ``addr``; 0: it is not shown."""
        return self.shown[addr][2] if self.is_shown(addr) else 0

    def refresh(self, page: EpcPage) -> None:
        """Make the program's rights on ``page`` agree with its EPCM entry.

        Call it after each change of the entry.
        """
        addr, rights = page.addr, page.rwx
        if rights & EXECUTE:
            rights |= READ
        usable = page.valid and page.pt is _REG and not (page.pending or page.modified)
        usable = usable and addr not in self.poisoned
        where = self._maps.get(addr)
        if where is None or not usable or not rights:
            self._hide(addr)
            return
        memory, linaddr, _count = where
        shown = self.shown.get(addr)
        if shown is None:
            data = self._hidden.pop(addr, ZEROS)
            self.shown[addr] = memory, linaddr, rights
            if rights & ~READ == EXECUTE:
                data = memory.forbid(linaddr, bytes(data))
            memory.show(linaddr, data, rights)
        elif shown[2] != rights:
            memory.unmark(linaddr)  # writable code has no marks
            self.shown[addr] = memory, linaddr, rights
            memory.set_rights(linaddr, rights)
            if rights & ~READ == EXECUTE:
                memory.forbid_shown(linaddr)

    def _hide(self, addr: int) -> None:
        shown = self.shown.get(addr)
        if shown is not None:
            memory, linaddr, _rights = shown
            (data,) = memory.hide([linaddr])
            if data != ZEROS:
                self._hidden[addr] = data
            del self.shown[addr]
            self._leaving.discard(addr)


if compiled.speedups is not None:
    if compiled.speedups.bind("NativeStore", NativeStore):
        compiled.speedups.give("NativeStore", NativeStore)
    compiled.speedups.give("REG", _REG)
    compiled.speedups.give("ZEROS", ZEROS)
