"""The page table of an address space whose uses of enclave pages are recorded."""

from __future__ import annotations

from typing import Any

from softsgx.arch import PAGE_BYTES
from softsgx.engines.native.memory.page_table import EnclavePageTable
from softsgx.engines.native.recording.pagers import WatchingPager
from softsgx.engines.native.recording.recorder import Recorder
from softsgx.hw import READ, WRITE

__all__ = ["RecordedPageTable"]

_PAGE_MASK = -PAGE_BYTES


class RecordedPageTable(EnclavePageTable):
    """Reports each page that the program, or a leaf that it executes, uses to a recorder.

    Args:
        arguments: of :class:`EnclavePageTable`; the pager is a :class:`WatchingPager`.
        recorder: receives the reports.
        keywords: of :class:`EnclavePageTable`.
    """

    pager: WatchingPager

    def __init__(self, *arguments: Any, recorder: Recorder, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._recorder = recorder

    def install(self, linaddr: int, epc_addr: int, prot: int) -> None:
        """As :meth:`EnclavePageTable.install`."""
        page = self._pages.get(epc_addr)
        if page is not None and not self._store.is_mapped(page):
            self._recorder.page_mapped(epc_addr)
        super().install(linaddr, epc_addr, prot)

    def translate(self, linaddr: int, access: int, *, user: bool) -> int:
        """As :meth:`EnclavePageTable.translate`: a leaf uses the page."""
        physical = super().translate(linaddr, access, user=user)
        self._note(linaddr & _PAGE_MASK, access)
        return physical

    def touched(self, linaddr: int, access: int) -> bool:
        """As :meth:`EnclavePageTable.touched`: the program uses the page."""
        if not super().touched(linaddr, access):
            return False
        self._recorder.faulted = self._recorder.shown = True
        self._note(linaddr, access)
        return True

    def occupied(self, linaddr: int) -> None:
        """A thread that is inside an enclave occupies the TCS or SSA page at ``linaddr``."""
        self._note(linaddr & _PAGE_MASK, READ)

    def _note(self, page: int, access: int) -> None:
        entry = self.entry(page)
        if entry is None:  # ordinary memory
            return
        memory = self.memory_at(page)
        assert memory is not None, f"an entry for {page:#x} of no enclave"
        self._recorder.page_used(entry[0], memory, page, write=access == WRITE)
