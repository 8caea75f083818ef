"""Enclave memory by userfaultfd: a thread that touches a hole in the memory file faults.

Most of the state is the file's holes and its write protection.  A fault is one of two things, the
same for all faults of an address space:

- an *event*: the thread waits in the kernel until its page is there and it is woken
  (:mod:`softsgx.engines.native.tracing.fault_events`);
- a *signal*: SIGBUS, which the supervisor sees as a signal-delivery stop.

At a stop the supervisor can change the thread's registers; it makes a thread that waits stop if it
has to.  No request of the pager wakes a thread, so it continues when all is done that has to be
done before.  :mod:`.fetches` keeps the program from executing pages whose EPCM entries
lack X.

Accessed pages are found in the page tables: the supervisor drops the entry of a page, and the
kernel makes it again when the page is touched.

Source:
    userfaultfd(2), ioctl_userfaultfd(2), madvise(2), Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable
from errno import EINVAL, ENOENT, ESRCH

from softsgx import compiled
from softsgx.arch import PAGE_BYTES
from softsgx.engines.native import abi, kernel
from softsgx.engines.native.memory.memory_file import runs
from softsgx.engines.native.memory.page_maps import PageMap, PageSet, page_map, page_set
from softsgx.errors import SoftSgxError

__all__ = ["MINOR_FEATURES", "UNMAPPED", "UffdPager", "open_userfaultfd"]

MINOR_FEATURES = abi.UFFD_FEATURE_MINOR_SHMEM | abi.UFFD_FEATURE_WP_UNPOPULATED
"""Further features that recordings need: Linux 6.4 at least.

With the second one, UFFDIO_CONTINUE can make a page that is write-protected.
"""

_WRITE = 2
_FEATURES = abi.UFFD_FEATURE_MISSING_SHMEM | abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
_EVENTS = abi.UFFD_FEATURE_THREAD_ID | abi.UFFD_FEATURE_EXACT_ADDRESS
UNMAPPED = frozenset({ENOENT, ESRCH, EINVAL})
"""Errors for a page that is not mapped here, or a process that has ended."""

PRESENT = 0x80  # bit 63, seen in the word's last byte
PAGE_SHIFT, BLOCK_PAGES, BLOCK_MASK = 12, 64, 63
BLOCK_AT = -BLOCK_PAGES * PAGE_BYTES
"""The bits of an address that its block of pages has."""


def open_userfaultfd(ours: int, more_features: int = 0, *, events: bool = False) -> None:
    """Negotiate the API on a fresh userfaultfd.

    Args:
        ours: the descriptor.
        more_features: UFFD_FEATURE_* bits besides those of :class:`UffdPager`.
        events: whether faults are events; otherwise they are signals.

    Raises:
        OSError: EINVAL: the kernel lacks one of the features.
    """
    features = _FEATURES | more_features | (_EVENTS if events else abi.UFFD_FEATURE_SIGBUS)
    request = struct.pack("<QQQ", abi.UFFD_API, features, 0)
    fcntl.ioctl(ours, abi.UFFDIO_API, bytearray(request))


class UffdPager:
    """See the module.

    Args:
        uffd: the supervisor's descriptor of the program's userfaultfd, after
            :func:`open_userfaultfd`.
        pagemap: a descriptor of ``/proc/PID/pagemap``.
        inject: makes the program execute system calls, each (number, arguments…); called before
            the program is resumed at the latest.
        running: returns whether any thread of the address space may be executing.
        prot_at: see :class:`~.fetches.Fetches`.
        failed: ends the processes of the address space; called after an unexpected error of the
            kernel (out of memory, for example), which may arise while the supervisor handles
            another process.
        close_events: called before the userfaultfd is closed; ``None``: faults are signals.
    """

    __slots__ = (
        "_close_events",
        "_dontwake",
        "_failed",
        "_fetches",
        "_inject",
        "_pagemap",
        "_present",
        "_running",
        "_uffd",
        "_watched",
    )

    name = "userfaultfd"
    _mode = abi.UFFDIO_REGISTER_MODE_MISSING | abi.UFFDIO_REGISTER_MODE_WP

    def __init__(
        self,
        uffd: int,
        pagemap: int,
        inject: Callable[[list[tuple[int, ...]]], None],
        running: Callable[[], bool],
        prot_at: Callable[[int], int | None],
        failed: Callable[[Exception], None],
        close_events: Callable[[int], None] | None = None,
    ) -> None:
        from softsgx.engines.native.memory.fetches import Fetches

        self._failed, self._close_events = failed, close_events
        self._dontwake = 0 if close_events is None else abi.UFFDIO_COPY_MODE_DONTWAKE
        self._uffd, self._pagemap, self._inject, self._running = uffd, pagemap, inject, running
        self._fetches = Fetches(prot_at)
        self._watched: PageSet = page_set()
        self._present: PageMap[bytes] = page_map()  # by the first page of a block

    def map_prot(self, prot: int) -> int:
        """Return ``prot``: the mapping has the program's rights."""
        return prot

    def mapped(self, start: int, end: int, prot: int, shown: dict[int, int]) -> None:
        """Register the range with userfaultfd; pages shown there keep their EPCM rights."""
        request = bytearray(struct.pack("<QQQQ", start, end - start, self._mode, 0))
        try:
            fcntl.ioctl(self._uffd, abi.UFFDIO_REGISTER, request)
        except OSError as error:
            raise SoftSgxError(
                f"enclave at {start:#x}: userfaultfd refuses the range ({error.strerror}); "
                "choose the mprotect pager"
            ) from None
        self._fetches.mapped(start, end, shown)
        if prot & abi.PROT_WRITE:
            for low, high in runs([page for page in sorted(shown) if not shown[page] & _WRITE]):
                self._protect(low, high, abi.UFFDIO_WRITEPROTECT_MODE_WP)

    def reveal(self, start: int, end: int, prot: int) -> None:
        """Set the rights of the mapping; write-protected pages and holes stay what they are."""
        self._inject(self._fetches.reveal(start, end, prot))

    # --- hiding and showing ---------------------------------------------------------------------

    def before_hide(self, start: int, end: int) -> None:
        """Write-protect the pages, unless no thread is running that could store to them."""
        if not self._running():
            return
        if self._protect(start, end, abi.UFFDIO_WRITEPROTECT_MODE_WP) or end - start == PAGE_BYTES:
            return
        for linaddr in range(start, end, PAGE_BYTES):  # some of them are not mapped here
            self._protect(linaddr, linaddr + PAGE_BYTES, abi.UFFDIO_WRITEPROTECT_MODE_WP)

    def after_hide(self, start: int, end: int) -> None:
        """Drop the state of the pages: holes fault without further calls."""
        pages = range(start, end, PAGE_BYTES)
        self._fetches.hidden(pages)
        if self._watched:
            self._watched.difference_update(pages)

    def show(self, linaddr: int, data: bytes | bytearray, rights: int) -> bool:
        """Fill the hole by UFFDIO_COPY, which makes the page and its entry in one step."""
        mode = self._dontwake | (0 if rights & _WRITE else abi.UFFDIO_COPY_MODE_WP)
        code = kernel.copy_page(self._uffd, linaddr, mode, data)
        if code:
            if code not in UNMAPPED:
                self._failed(OSError(code, f"UFFDIO_COPY: {os.strerror(code)}"))
            return False
        if self._present:  # was read before the new entry existed
            self._present.pop(linaddr & BLOCK_AT, None)
        self._fetches.shown(linaddr, rights)
        return True

    def shown(self, linaddr: int, rights: int) -> None:
        """Replace the write protection that hiding left behind."""
        self._allow_stores(linaddr, rights)
        self._fetches.shown(linaddr, rights)

    def set_rights(self, linaddr: int, rights: int) -> None:
        """Write-protect the page, or not; take PROT_EXEC away, or give it back."""
        self._allow_stores(linaddr, rights)
        self._fetches.changed(linaddr, rights)

    def _allow_stores(self, linaddr: int, rights: int) -> None:
        if not rights & _WRITE:
            mode = abi.UFFDIO_WRITEPROTECT_MODE_WP
        else:
            mode = abi.UFFDIO_WRITEPROTECT_MODE_DONTWAKE if self._dontwake else 0
        self._protect(linaddr, linaddr + PAGE_BYTES, mode)

    def _protect(self, start: int, end: int, mode: int) -> bool:
        """Set or clear write protection; ``False`` when not all of the range is mapped here."""
        code = kernel.protect_pages(self._uffd, start, end, mode)
        if code and code not in UNMAPPED:
            self._failed(OSError(code, f"UFFDIO_WRITEPROTECT: {os.strerror(code)}"))
        return not code

    # --- accessed bits --------------------------------------------------------------------------

    def test_and_clear_accessed(self, linaddr: int) -> bool:
        """Return whether the page has an entry; drop it before the program is resumed.

        The file keeps the page.
        """
        if linaddr in self._watched:
            return False  # its entry is about to be dropped
        # Queries for neighbours follow: one reading serves them until the program is resumed.
        flags = self._present.get(linaddr & BLOCK_AT)
        if flags is None:
            flags = self._read_block(linaddr & BLOCK_AT)
        if flags[linaddr >> PAGE_SHIFT & BLOCK_MASK] < PRESENT:
            return False
        self._watched.add(linaddr)
        return True

    def _read_block(self, block: int) -> bytes:
        """Return the last byte of each word of pagemap for the block of pages at an address."""
        try:
            words = os.pread(self._pagemap, 8 * BLOCK_PAGES, block // PAGE_BYTES * 8)
        except OSError:
            words = b""
        flags = self._present[block] = words[7::8].ljust(BLOCK_PAGES, b"\0")
        return flags

    def flush(self) -> None:
        """Make the deferred calls, and drop entries of watched pages; a thread is stopped here."""
        self._present.clear()
        fetches = self._fetches
        if not (fetches.due or self._watched):
            return
        calls = fetches.calls()
        if self._watched:
            calls += [
                (abi.SYS_MADVISE, start, end - start, abi.MADV_DONTNEED_LOCKED)
                for start, end in runs(sorted(self._watched))
            ]
            self._watched.clear()
        if calls:
            self._inject(calls)

    def touched(self, linaddr: int, access: int) -> bool:
        """Return ``False``: page tables record uses without a fault."""
        return False

    def close(self) -> None:
        """Close the descriptors."""
        if self._close_events is not None:
            self._close_events(self._uffd)
        os.close(self._uffd)
        os.close(self._pagemap)


if compiled.speedups is not None and compiled.speedups.bind("UffdPager", UffdPager):
    compiled.speedups.give("UffdPager", UffdPager)
