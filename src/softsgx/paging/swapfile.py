"""Contents and PCMDs of evicted pages in one backing file.

The content of page ``i`` takes a page of the file; 32 PCMDs share one.  So a PCMD page outlives the
loading of its pages one by one, and may be given back only when it holds nothing and nobody is
about to write into it.

Called with one lock held, always the same: the enclave's, or the VA tree's.

Source:
    ``sgx_encl_get_backing_page_pcmd_offset()``, ``__sgx_encl_get_backing()``,
    ``reclaimer_writing_to_pcmd()``, encl.c.
"""

from __future__ import annotations

from collections.abc import Callable

from softsgx.arch import PAGE_BYTES, Pcmd
from softsgx.defects import Defect
from softsgx.paging.counters import Counters
from softsgx.paging.events import Truncated
from softsgx.paging.failures import BackingError
from softsgx.paging.interfaces import BackingFile, BackingPage
from softsgx.trace import Tracer

__all__ = ["Pinned", "SwapFile", "enclave_layout", "va_layout"]

PCMDS_PER_PAGE = PAGE_BYTES // Pcmd.SIZE
_PCMD_BYTES = Pcmd.SIZE
_NO_PCMD = bytes(_PCMD_BYTES)
_EMPTY_PAGE = bytes(PAGE_BYTES)

Layout = Callable[[int], tuple[int, int]]
"""Page index to (backing page of its content, backing page of its PCMD)."""


def enclave_layout(pages: int) -> Layout:
    """Return Linux's layout for an enclave of ``pages`` pages.

    Contents of all pages, that of the SECS (index ``pages``), then the PCMDs, 32 a page.
    """

    def layout(index: int) -> tuple[int, int]:
        assert 0 <= index <= pages, f"page {index} of an enclave of {pages}"
        return index, pages + 1 + index // PCMDS_PER_PAGE

    return layout


def va_layout(index: int) -> tuple[int, int]:
    """Return the layout for pages without an end: after each PCMD page its 32 contents."""
    group, at = divmod(index, PCMDS_PER_PAGE)
    pcmd = group * (PCMDS_PER_PAGE + 1)
    return pcmd + 1 + at, pcmd


class Pinned:
    """The two backing pages of one page, pinned.

    Attributes:
        content: 4096 bytes of ciphertext.
        pcmd: the page that holds its PCMD among others.
        pcmd_bytes: the 128 bytes of it.
    """

    __slots__ = ("content", "pcmd", "pcmd_bytes")

    def __init__(self, index: int, content: BackingPage, pcmd: BackingPage) -> None:
        self.content, self.pcmd = content, pcmd
        self.pcmd_bytes = pcmd.part(index % PCMDS_PER_PAGE * _PCMD_BYTES, _PCMD_BYTES)

    def unpin(self) -> None:
        """Give both pins back."""
        self.content.unpin()
        self.pcmd.unpin()


class SwapFile:
    """A backing file with a layout; closing it is the owner's business.

    Args:
        backing: where the bytes go.
        layout: which pages of it belong to a page.
        counters: told of truncations.
        tracer: as everywhere.
        defects: B1, B3, B4, B6.
    """

    def __init__(
        self,
        backing: BackingFile,
        layout: Layout,
        *,
        counters: Counters,
        tracer: Tracer | None,
        defects: frozenset[Defect],
    ) -> None:
        self.backing = backing
        self._layout, self._counters, self._tracer = layout, counters, tracer
        self._writers: dict[int, int] = {}  # PCMD page to reservations that will write into it
        self._truncates_shared = Defect.PCMD_PAGE_TRUNCATED_WHILE_SHARED in defects
        self._forgets_cleared = Defect.CLEARED_PCMD_NOT_DIRTY in defects
        self._dirties_early = Defect.BACKING_DIRTIED_BEFORE_EWB in defects
        self._keeps_loaded = Defect.BACKING_KEPT_AFTER_ELDU in defects

    # --- out ------------------------------------------------------------------------------------

    def reserve(self, index: int, *, announced: bool = True) -> Pinned:
        """Pin both pages for an eviction; end it with :meth:`written` or :meth:`cancel`.

        Args:
            index: the page's index.
            announced: whether the PCMD page must stay from now on; if not, :meth:`announce` it.

        Raises:
            BackingError: there is no room; nothing has changed.
        """
        layout, pin, writers = self._layout, self.backing.pin, self._writers
        content_at, pcmd_at = layout(index)
        content = pin(content_at, create=True)
        try:
            pcmd = pin(pcmd_at, create=True)
        except BackingError:
            content.unpin()
            self.backing.truncate(content_at)
            raise
        if announced:
            writers[pcmd_at] = writers.get(pcmd_at, 0) + 1
        if self._dirties_early:
            content.mark_dirty()
            pcmd.mark_dirty()
        return Pinned(index, content, pcmd)

    def announce(self, pinned: Pinned) -> None:
        """The PCMD page must stay until this eviction has ended."""
        pcmd_at = pinned.pcmd.index
        self._writers[pcmd_at] = self._writers.get(pcmd_at, 0) + 1

    def written(self, pinned: Pinned) -> None:
        """EWB has written both."""
        content, pcmd = pinned.content, pinned.pcmd
        if not self._dirties_early:
            content.mark_dirty()
            pcmd.mark_dirty()
        self._end_writing(pcmd)
        content.unpin()
        pcmd.unpin()

    def cancel(self, pinned: Pinned) -> None:
        """EWB was not done, or wrote nothing: give back what was only reserved."""
        self._end_writing(pinned.pcmd)
        pinned.unpin()
        self.backing.truncate(pinned.content.index)
        self._truncate_pcmd(pinned.pcmd)

    def _end_writing(self, pcmd: BackingPage) -> None:
        writers, pcmd_at = self._writers, pcmd.index
        if writers[pcmd_at] > 1:
            writers[pcmd_at] -= 1
        else:
            del writers[pcmd_at]

    # --- in -------------------------------------------------------------------------------------

    def open(self, index: int) -> Pinned:
        """Pin both pages of an evicted page; end it with :meth:`loaded` or :meth:`close`.

        Raises:
            BackingError: they are not there.
        """
        layout, pin = self._layout, self.backing.pin
        content_at, pcmd_at = layout(index)
        content = pin(content_at, create=False)
        try:
            pcmd = pin(pcmd_at, create=False)
        except BackingError:
            content.unpin()
            raise
        return Pinned(index, content, pcmd)

    def close(self, pinned: Pinned) -> None:
        """The page was not loaded: everything stays for the next try."""
        pinned.unpin()

    def loaded(self, pinned: Pinned) -> None:
        """The page is in the EPC again, and its version spent: nobody can use these bytes."""
        content, pcmd = pinned.content, pinned.pcmd
        pinned.pcmd_bytes[:] = _NO_PCMD
        if not self._forgets_cleared:
            pcmd.mark_dirty()
        if not self._keeps_loaded:
            self._counters.truncated += 1
            self.backing.truncate(content.index)
            self._truncate_pcmd(pcmd)
        content.unpin()
        pcmd.unpin()

    def _truncate_pcmd(self, pcmd: BackingPage) -> None:
        """Give a PCMD page back if it is empty and nobody is about to write into it."""
        if pcmd.data != _EMPTY_PAGE:
            return
        pcmd_at = pcmd.index
        if pcmd_at in self._writers and not self._truncates_shared:
            return
        self._counters.pcmd_truncated += 1
        if self._tracer is not None:
            self._tracer(Truncated(pcmd_at))
        self.backing.truncate(pcmd_at)

    def discard(self, index: int) -> None:
        """An evicted page will never be loaded."""
        try:
            pinned = self.open(index)
        except BackingError:
            # Its PCMD cannot be cleared, so that this PCMD page stays until the file is closed.
            self.backing.truncate(self._layout(index)[0])
            return
        self.loaded(pinned)
