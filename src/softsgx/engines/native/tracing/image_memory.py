"""Ordinary memory of an address space as ``copy_from_user`` sees it: the driver's ``UserMemory``.

Source:
    process_vm_readv(2), proc(5): ``/proc/PID/maps`` and its PROCMAP_QUERY.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from softsgx.driver import BadAddress, VmaInfo
from softsgx.engines.native import libc
from softsgx.engines.native.mappings import mapping_at

__all__ = ["ImageMemory"]


class ImageMemory:
    """See the module.

    Args:
        any_pid: returns the id of some thread that has the address space; raises
            :class:`~softsgx.driver.BadAddress` when there is none any more.
    """

    def __init__(self, any_pid: Callable[[], int]) -> None:
        self._any_pid = any_pid

    def read(self, address: int, size: int) -> bytes:
        """Return ``size`` bytes.

        Raises:
            BadAddress: some of it is not readable.
        """
        try:
            return libc.read_memory(self._any_pid(), address, size)
        except OSError as error:
            raise BadAddress(str(error)) from None

    def read_pages(self, address: int, count: int) -> list[bytes]:
        """Return the bytes of up to ``count`` pages from a page boundary, in one system call.

        Raises:
            BadAddress: the first of them is not readable.
        """
        try:
            return libc.read_pages(self._any_pid(), address, min(count, libc.MOST_PAGES))
        except OSError as error:
            raise BadAddress(str(error)) from None

    def can_read(self, address: int) -> bool:
        """Return whether the byte at ``address`` is readable."""
        try:
            self.read(address, 1)
        except BadAddress:
            return False
        return True

    def write(self, address: int, data: bytes) -> None:
        """Store ``data``.

        Raises:
            BadAddress: some of it is not writable.
        """
        try:
            libc.write_memory(self._any_pid(), address, data)
        except OSError as error:
            raise BadAddress(str(error)) from None

    def vma_info(self, address: int) -> VmaInfo | None:
        """Return the mapping that holds ``address``."""
        found = mapping_at(self._any_pid(), address)
        if found is None:
            return None
        noexec = found.path.startswith("/") and _on_noexec_mount(found.path)
        return VmaInfo(found.start, found.end, may_exec=not noexec)


def _on_noexec_mount(path: str) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_NOEXEC)
    except OSError:
        return False  # deleted, or a memory file
