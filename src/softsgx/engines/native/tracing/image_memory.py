"""Ordinary memory of an address space as ``copy_from_user`` sees it: the driver's ``UserMemory``.

Source:
    process_vm_readv(2), proc(5): ``/proc/PID/maps`` and its PROCMAP_QUERY.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from errno import ENAMETOOLONG, ENOTTY

from softsgx.driver import BadAddress, VmaInfo
from softsgx.engines.native import libc

__all__ = ["ImageMemory"]


class ImageMemory:
    """See the module.

    Args:
        any_pid: returns the id of some thread that has the address space; raises
            :class:`~softsgx.driver.BadAddress` when there is none any more.
    """

    def __init__(self, any_pid: Callable[[], int]) -> None:
        self._any_pid = any_pid
        self._maps: list[tuple[int, int, bool]] | None = None

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
        """Return the mapping that holds ``address``.

        If the kernel has no query for one mapping, all are read, once for this object: loaders that
        add their pages one by one would read them for each page.
        """
        if self._maps is None:
            try:
                with open(f"/proc/{self._any_pid()}/maps", "rb", buffering=0) as maps:
                    found = libc.find_mapping(maps.fileno(), address)
            except OSError as error:
                if error.errno not in (ENOTTY, ENAMETOOLONG):
                    raise
                self._maps = _read_maps(self._any_pid())
            else:
                if found is None:
                    return None
                start, end, path = found
                noexec = path.startswith("/") and _on_noexec_mount(path)
                return VmaInfo(start, end, may_exec=not noexec)
        for start, end, may_exec in self._maps:
            if start <= address < end:
                return VmaInfo(start, end, may_exec=may_exec)
        return None


def _read_maps(pid: int) -> list[tuple[int, int, bool]]:
    """Return (start, end, whether it may be made executable) of each mapping."""
    noexec: dict[str, bool] = {}
    found = []
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            words = line.rstrip("\n").split(maxsplit=5)
            start, end = (int(part, 16) for part in words[0].split("-"))
            path = words[5] if len(words) > 5 else ""
            if path.startswith("/") and path not in noexec:
                noexec[path] = _on_noexec_mount(path)
            found.append((start, end, not noexec.get(path, False)))
    return found


def _on_noexec_mount(path: str) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_NOEXEC)
    except OSError:
        return False  # deleted, or a memory file
