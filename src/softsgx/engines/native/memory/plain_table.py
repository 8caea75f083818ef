"""The page table of an address space whose enclave pages are shown by userfaultfd, in few steps.

One function has the effects of many: of :class:`EnclavePageTable`, the store, the memory file and
the pager, in the same order.  It handles a page that only this address space maps, which appears
with the rights R and W; otherwise it falls back to the readable form before anything has changed.
Without the compiled core, which does the same in C.
"""

from __future__ import annotations

from softsgx import compiled
from softsgx.arch import PageType
from softsgx.driver import PROT_EXEC
from softsgx.engines.native import kernel
from softsgx.engines.native.memory.memory_file import EXECUTE, READ, WRITE
from softsgx.engines.native.memory.page_maps import BLOCK_SHIFT as RIGHTS_SHIFT
from softsgx.engines.native.memory.page_maps import INDEX_MASK, INDEX_SHIFT
from softsgx.engines.native.memory.page_table import EnclavePageTable
from softsgx.engines.native.memory.store import ZEROS, NativeStore, StoredPage
from softsgx.engines.native.memory.uffd import (
    BLOCK_AT,
    BLOCK_MASK,
    PAGE_SHIFT,
    PRESENT,
    UffdPager,
)

__all__ = ["FAST_PAGE_TABLE", "PlainPageTable"]

_REG, _READ_WRITE = PageType.REG, READ | WRITE


class PlainPageTable(EnclavePageTable):
    """See the module."""

    __slots__ = ()

    def install(self, linaddr: int, epc_addr: int, prot: int) -> None:
        """As :meth:`EnclavePageTable.install`."""
        entries, store, pager = self._entries, self._store, self.pager
        page, memory = self._pages.get(epc_addr), self.memory_at(linaddr)
        record: StoredPage | None = None if page is None else page.stored
        if (
            page is None
            or record is None
            or memory is None
            or type(pager) is not UffdPager
            or type(store) is not NativeStore
            or linaddr in entries
            or record.maps
            or record.rights
            or record.poisoned
            or not page.rwx & WRITE
            or not page.valid
            or page.pt is not _REG
            or page.pending
            or page.modified
            or len(memory.users) != 1
            or memory.users[0] is not self
        ):
            super().install(linaddr, epc_addr, prot)
            return
        rights = page.rwx
        entries[linaddr] = record
        if prot != _READ_WRITE:
            self._prots[linaddr] = prot
        data = ZEROS if record.data is None else record.data
        record.memory, record.linaddr, record.data = memory, linaddr, None
        record.maps, record.rights = 1, rights
        block, index = linaddr >> RIGHTS_SHIFT, linaddr >> INDEX_SHIFT & INDEX_MASK
        try:
            memory.pages.blocks[block][index] = rights
        except (KeyError, AttributeError):  # no block, or the compiled form
            memory.pages[linaddr] = rights
        if kernel.copy_page(pager._uffd, linaddr, pager._dontwake, data):
            memory.show(linaddr, data, rights, self)  # it fails again, and is written otherwise
        else:
            if pager._present:  # was read before the new entry existed
                pager._present.pop(linaddr & BLOCK_AT, None)
            fetches = pager._fetches
            try:
                fetches.rights.blocks[block][index] = rights
            except (KeyError, AttributeError):  # no block, or the compiled form
                fetches.rights[linaddr] = rights
            if prot & PROT_EXEC and (linaddr in fetches._taken) == bool(rights & EXECUTE):
                fetches.shown(linaddr, rights)  # a call is due
        if self._installed is not None:
            self._installed(page)

    def zap_pages(self, linaddrs: list[int]) -> None:
        """As :meth:`EnclavePageTable.zap_pages`."""
        store, entries, used, marked = self._store, self._entries, self._used, self._marked
        if type(store) is not NativeStore:
            super().zap_pages(linaddrs)
            return
        prots, leaving = self._prots, store._leaving
        for linaddr in linaddrs:
            record = entries.pop(linaddr, None)
            if record is None:
                continue
            if prots:
                prots.pop(linaddr, None)
            if used:
                used.discard(linaddr)
            if marked:
                marked.pop(linaddr, None)
            record.maps -= 1
            if record.rights and not record.maps:
                leaving.append(record)

    def test_and_clear_pages(self, linaddrs: list[int]) -> list[bool]:
        """As :meth:`EnclavePageTable.test_and_clear_pages`."""
        pager = self.pager
        if type(pager) is not UffdPager:
            return super().test_and_clear_pages(linaddrs)
        entries, used = self._entries, self._used
        watched, present = pager._watched, pager._present
        young: list[bool] = []
        for linaddr in linaddrs:
            record = entries.get(linaddr)
            if record is None:
                young.append(False)
                continue
            accessed = linaddr in used
            if accessed:
                used.discard(linaddr)
            if record.rights and linaddr not in watched:
                flags = present.get(linaddr & BLOCK_AT)
                if flags is None:
                    flags = pager._read_block(linaddr & BLOCK_AT)
                if flags[linaddr >> PAGE_SHIFT & BLOCK_MASK] >= PRESENT:
                    watched.add(linaddr)
                    accessed = True
            young.append(accessed)
        return young


#: The fastest there is.
FAST_PAGE_TABLE = PlainPageTable if compiled.speedups is None else EnclavePageTable
