"""Contents and PCMDs of evicted pages in one backing file.

The content of a page takes one page of the file; 32 PCMDs share one.  A PCMD page is truncated when
it holds no PCMD and no eviction is about to write to it.

Lock order: one lock protects a file, and is held at each call: the enclave's, or the VA tree's.

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
    """Return the layout for any number of pages: each PCMD page, then its 32 contents."""
    group, at = divmod(index, PCMDS_PER_PAGE)
    pcmd = group * (PCMDS_PER_PAGE + 1)
    return pcmd + 1 + at, pcmd


class Pinned:
    """Where the content and the PCMD of one page are while the page is evicted or loaded.

    Attributes:
        index: the page's index.
        data: 4096 bytes of ciphertext.
        pcmd_bytes: the 128 bytes of its PCMD.
    """

    __slots__ = ("data", "index", "pcmd_bytes")

    def __init__(
        self, index: int, data: bytearray | memoryview, pcmd_bytes: bytearray | memoryview
    ) -> None:
        self.index, self.data, self.pcmd_bytes = index, data, pcmd_bytes


class _PinnedPages(Pinned):
    """Two pages of a backing file, pinned.

    Attributes:
        content: holds the content.
        pcmd: holds the PCMD among others.
    """

    __slots__ = ("content", "pcmd")

    def __init__(self, index: int, content: BackingPage, pcmd: BackingPage) -> None:
        at = index % PCMDS_PER_PAGE * _PCMD_BYTES
        super().__init__(index, content.data, pcmd.part(at, _PCMD_BYTES))
        self.content, self.pcmd = content, pcmd

    def unpin(self) -> None:
        """Unpin both."""
        self.content.unpin()
        self.pcmd.unpin()


class SwapFile:
    """Contents and PCMDs in a backing file with a layout; the owner closes the backing file.

    Args:
        backing: the backing file.
        layout: which of its pages hold content and PCMD of a page.
        counters: the core's.
        tracer: receives events; ``None`` for none.
        defects: those to switch on.
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
        self._writers: dict[int, int] = {}  # PCMD page to evictions that will write to it
        self._truncates_shared = Defect.PCMD_PAGE_TRUNCATED_WHILE_SHARED in defects
        self._forgets_cleared = Defect.CLEARED_PCMD_NOT_DIRTY in defects
        self._dirties_early = Defect.BACKING_DIRTIED_BEFORE_EWB in defects
        self._keeps_loaded = Defect.BACKING_KEPT_AFTER_ELDU in defects

    # --- out ------------------------------------------------------------------------------------

    def reserve(self, index: int, *, announced: bool = True) -> Pinned:
        """Pin both pages for an eviction; end it with :meth:`written` or :meth:`cancel`.

        Args:
            index: the page's index.
            announced: whether the PCMD page is protected from truncation from now on; otherwise
                from :meth:`announce` on.

        Raises:
            BackingError: the file is full; nothing has changed.
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
        return _PinnedPages(index, content, pcmd)

    def announce(self, pinned: Pinned) -> None:
        """Protect the PCMD page from truncation until this eviction has ended."""
        pcmd_at = _pages(pinned).pcmd.index
        self._writers[pcmd_at] = self._writers.get(pcmd_at, 0) + 1

    def written(self, pinned: Pinned) -> None:
        """EWB has written content and PCMD."""
        pages = _pages(pinned)
        content, pcmd = pages.content, pages.pcmd
        if not self._dirties_early:
            content.mark_dirty()
            pcmd.mark_dirty()
        self._end_writing(pcmd)
        content.unpin()
        pcmd.unpin()

    def cancel(self, pinned: Pinned) -> None:
        """EWB has written nothing: free what was reserved."""
        pages = _pages(pinned)
        self._end_writing(pages.pcmd)
        pages.unpin()
        self.backing.truncate(pages.content.index)
        self._truncate_pcmd(pages.pcmd)

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
            BackingError: the file does not have them, or cannot read them.
        """
        layout, pin = self._layout, self.backing.pin
        content_at, pcmd_at = layout(index)
        content = pin(content_at, create=False)
        try:
            pcmd = pin(pcmd_at, create=False)
        except BackingError:
            content.unpin()
            raise
        return _PinnedPages(index, content, pcmd)

    def close(self, pinned: Pinned) -> None:
        """The page was not loaded: unpin both pages, for the next try."""
        _pages(pinned).unpin()

    def loaded(self, pinned: Pinned) -> None:
        """ELDU has loaded the page and cleared its version: free content and PCMD."""
        pages = _pages(pinned)
        content, pcmd = pages.content, pages.pcmd
        at = pinned.index % PCMDS_PER_PAGE * _PCMD_BYTES
        pcmd.data[at : at + _PCMD_BYTES] = _NO_PCMD
        if not self._forgets_cleared:
            pcmd.mark_dirty()
        if not self._keeps_loaded:
            self._counters.truncated += 1
            self.backing.truncate(content.index)
            self._truncate_pcmd(pcmd)
        content.unpin()
        pcmd.unpin()

    def _truncate_pcmd(self, pcmd: BackingPage) -> None:
        """Truncate a PCMD page if it is empty and no eviction is about to write to it."""
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
        """Free content and PCMD of an evicted page that will not be loaded."""
        try:
            pinned = self.open(index)
        except BackingError:
            # Its PCMD cannot be cleared, so the PCMD page stays until the file is closed.
            self.backing.truncate(self._layout(index)[0])
            return
        self.loaded(pinned)


def _pages(pinned: Pinned) -> _PinnedPages:
    assert isinstance(pinned, _PinnedPages), "a page of another kind of file"
    return pinned
