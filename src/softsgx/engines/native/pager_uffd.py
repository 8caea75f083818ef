"""Enclave memory by userfaultfd: a hole in the memory file is a signal for the thread that hits it.

The file's holes and its write protection are all the state there is; a fault arrives as SIGBUS in
the tracer's loop, with the thread where its registers can still be changed.

Which pages are used is read from page tables: their entries are dropped, and come back when the
page is touched.

Source:
    userfaultfd(2), ioctl_userfaultfd(2), madvise(2), Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Callable
from errno import EAGAIN, EINVAL, ENOENT, ESRCH

from softsgx.arch import PAGE_BYTES
from softsgx.engines.native import abi, libc
from softsgx.errors import SoftSgxError

__all__ = ["UffdPager", "open_userfaultfd"]

_COPY = 0xC028AA03
_COPY_MODE_WP = 2
_FEATURES = (
    abi.UFFD_FEATURE_SIGBUS | abi.UFFD_FEATURE_MISSING_SHMEM | abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
)
_PRESENT = 1 << 63
_PACK_RANGE = struct.Struct("<QQQ")


def open_userfaultfd(ours: int) -> None:
    """Negotiate the API on a fresh userfaultfd.

    Raises:
        OSError: EINVAL: this kernel lacks a feature we need.
    """
    fcntl.ioctl(ours, abi.UFFDIO_API, bytearray(struct.pack("<QQQ", abi.UFFD_API, _FEATURES, 0)))


class UffdPager:
    """See the module.

    Args:
        uffd: our descriptor of the program's userfaultfd, negotiated.
        pagemap: a descriptor of ``/proc/PID/pagemap``.
        inject: makes system calls in the program's name, each (number, arguments…); called at the
            latest before the program goes on.
    """

    name = "userfaultfd"

    def __init__(
        self, uffd: int, pagemap: int, inject: Callable[[list[tuple[int, ...]]], None]
    ) -> None:
        self._uffd, self._pagemap, self._inject = uffd, pagemap, inject
        self._source = ctypes.create_string_buffer(PAGE_BYTES)
        self._copy = (ctypes.c_uint64 * 5)()
        self._copy[1] = ctypes.addressof(self._source)
        self._copy[2] = PAGE_BYTES
        self._watched: set[int] = set()

    def map_prot(self, prot: int) -> int:
        """The mapping gets what the program asked for."""
        return prot

    def mapped(self, start: int, end: int, prot: int) -> None:
        """Register the range; harmless where it is registered already."""
        mode = abi.UFFDIO_REGISTER_MODE_MISSING | abi.UFFDIO_REGISTER_MODE_WP
        request = bytearray(struct.pack("<QQQQ", start, end - start, mode, 0))
        try:
            fcntl.ioctl(self._uffd, abi.UFFDIO_REGISTER, request)
        except OSError as error:
            raise SoftSgxError(
                f"enclave at {start:#x}: userfaultfd refuses the range ({error.strerror}); "
                "choose the mprotect pager"
            ) from None

    # --- hiding and showing ---------------------------------------------------------------------

    def before_hide(self, linaddr: int) -> None:
        """Write-protect the page."""
        self._protect(linaddr, abi.UFFDIO_WRITEPROTECT_MODE_WP)

    def after_hide(self, linaddr: int) -> None:
        """The hole is enough; a use that was not asked for is forgotten."""
        self._watched.discard(linaddr)

    def show(self, linaddr: int, data: bytes | bytearray, *, writable: bool) -> bool:
        """UFFDIO_COPY: page and entry appear together."""
        ctypes.memmove(self._source, bytes(data), PAGE_BYTES)
        request = self._copy
        request[0], request[3], request[4] = linaddr, 0 if writable else _COPY_MODE_WP, 0
        while True:
            try:
                libc.ioctl(self._uffd, _COPY, request)
            except OSError as error:
                if error.errno == EAGAIN:  # the mappings are changing this moment
                    continue
                if error.errno in (ENOENT, ESRCH, EINVAL):
                    return False  # not mapped here
                raise
            return True

    def shown(self, linaddr: int, *, writable: bool) -> None:
        """Replace the write protection that hiding left behind."""
        self.set_writable(linaddr, writable=writable)

    def set_writable(self, linaddr: int, *, writable: bool) -> None:
        """Write-protect the page, or not."""
        self._protect(linaddr, 0 if writable else abi.UFFDIO_WRITEPROTECT_MODE_WP)

    def _protect(self, linaddr: int, mode: int) -> None:
        request = _PACK_RANGE.pack(linaddr, PAGE_BYTES, mode)
        while True:
            try:
                fcntl.ioctl(self._uffd, abi.UFFDIO_WRITEPROTECT, request)
            except OSError as error:
                if error.errno == EAGAIN:
                    continue
                if error.errno not in (ENOENT, ESRCH, EINVAL):  # not mapped here, or gone
                    raise
            return

    # --- accessed bits --------------------------------------------------------------------------

    def accessed(self, linaddr: int) -> bool:
        """Return whether the page has an entry again."""
        if linaddr in self._watched:
            return False  # its entry is about to be dropped
        try:
            word = os.pread(self._pagemap, 8, linaddr // PAGE_BYTES * 8)
        except OSError:
            return False
        return len(word) == 8 and bool(int.from_bytes(word, "little") & _PRESENT)

    def clear_accessed(self, linaddr: int) -> None:
        """Drop the entry before the program goes on; the file keeps the page."""
        self._watched.add(linaddr)

    def flush(self) -> None:
        """Drop the entries of watched pages now; a thread of this space is stopped."""
        if not self._watched:
            return
        calls: list[tuple[int, ...]] = [
            (abi.SYS_MADVISE, start, end - start, abi.MADV_DONTNEED)
            for start, end in _runs(sorted(self._watched))
        ]
        self._watched.clear()
        self._inject(calls)

    def touched(self, linaddr: int) -> bool:
        """Page tables tell of uses without a fault."""
        return False

    def close(self) -> None:
        """Close our descriptors."""
        os.close(self._uffd)
        os.close(self._pagemap)


def _runs(pages: list[int]) -> list[tuple[int, int]]:
    """Return (start, end) of each run of adjacent pages."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and runs[-1][1] == page:
            runs[-1] = runs[-1][0], page + PAGE_BYTES
        else:
            runs.append((page, page + PAGE_BYTES))
    return runs
