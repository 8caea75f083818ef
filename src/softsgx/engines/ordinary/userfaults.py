"""The userfaultfd of one address space: faults on anonymous memory, and the ioctls that answer.

The kernel reports an access to a page that is not present, and a store to a page that is
write-protected, also when a system call makes it.  The thread waits until the recorder answers.

Source:
    userfaultfd(2), ioctl_userfaultfd(2); uapi/linux/userfaultfd.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator
from errno import EAGAIN, EEXIST

from softsgx.engines.native import abi, libc

__all__ = ["Userfaults"]

_MESSAGE = struct.Struct("<B7xQQ8x")
_MOST_MESSAGES = 64
_BOTH = abi.UFFDIO_REGISTER_MODE_MISSING | abi.UFFDIO_REGISTER_MODE_WP


class Userfaults:
    """See the module.

    Args:
        descriptor: a new userfaultfd of the program, not blocking; closed by :meth:`close`.

    Raises:
        OSError: EINVAL: this kernel cannot report stores to write-protected pages.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        api = struct.pack("<QQQ", abi.UFFD_API, abi.UFFD_FEATURE_PAGEFAULT_FLAG_WP, 0)
        fcntl.ioctl(descriptor, abi.UFFDIO_API, bytearray(api))
        self._request = (ctypes.c_uint64 * 5)()
        self._request_at = ctypes.addressof(self._request)

    def read(self) -> Iterator[tuple[int, int]]:
        """Yield (flags, address) of each fault that the kernel has to report now."""
        try:
            data = os.read(self.descriptor, _MOST_MESSAGES * _MESSAGE.size)
        except BlockingIOError:
            return
        for event, flags, address in _MESSAGE.iter_unpack(data):
            if event == abi.UFFD_EVENT_PAGEFAULT:
                yield flags, address

    def register(self, start: int, end: int) -> None:
        """Report faults in anonymous private memory.

        Raises:
            OSError: EBUSY: the program has a userfaultfd of its own there; EINVAL: it is not
                anonymous; ENOMEM: nothing is mapped there.
        """
        request = bytearray(struct.pack("<QQQQ", start, end - start, _BOTH, 0))
        fcntl.ioctl(self.descriptor, abi.UFFDIO_REGISTER, request)

    def copy(self, address: int, source: int, *, protect: bool) -> int:
        """Make a page present with the bytes at ``source``; wake the threads that wait for it.

        Args:
            address: of the page.
            source: an address in the recorder.
            protect: whether the next store to it is reported.

        Returns:
            0, or an errno value: EEXIST: it is present; ENOENT, EINVAL: nothing is mapped, or not
            registered; ESRCH: the address space has ended.
        """
        request = self._request
        request[0], request[1], request[2] = address, source, abi.PAGE
        request[3], request[4] = abi.UFFDIO_COPY_MODE_WP if protect else 0, 0
        code = self._ioctl(abi.UFFDIO_COPY)
        if code == EEXIST:
            self.wake(address)
        return code

    def poison(self, address: int) -> int:
        """Make accesses to a page raise SIGBUS; returns as :meth:`copy`."""
        request = self._request
        request[0], request[1], request[2], request[3] = address, abi.PAGE, 0, 0
        return self._ioctl(abi.UFFDIO_POISON)

    def protect(self, start: int, end: int, *, on: bool) -> int:
        """Write-protect present pages, or allow stores and wake threads that wait; return errno."""
        request = self._request
        mode = abi.UFFDIO_WRITEPROTECT_MODE_WP if on else 0
        request[0], request[1], request[2] = start, end - start, mode
        return self._ioctl(abi.UFFDIO_WRITEPROTECT)

    def wake(self, address: int) -> None:
        """Let threads that wait for a page try again."""
        request = self._request
        request[0], request[1] = address, abi.PAGE
        self._ioctl(abi.UFFDIO_WAKE)

    def close(self) -> None:
        """Close the descriptor; the kernel wakes every thread that waits."""
        os.close(self.descriptor)

    def _ioctl(self, command: int) -> int:
        while libc.raw_ioctl(self.descriptor, command, self._request_at) == -1:
            code = ctypes.get_errno()
            if code != EAGAIN:  # the program's mappings are being changed
                return code
        return 0
