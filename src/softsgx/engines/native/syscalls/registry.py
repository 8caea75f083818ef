"""The registry of the program's SGX devices, and of the descriptors that refer to them.

An open device is a memory file in the program; its inode says which one it is, also for
descriptors that the program has duplicated, inherited or received.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from softsgx.driver import EnclaveFile, ProvisionFile
from softsgx.engines.native.memory.memory_file import EnclaveMemory
from softsgx.engines.native.memory.page_table import EnclavePageTable
from softsgx.engines.native.memory.store import NativeStore
from softsgx.ondemand import dataclass

__all__ = ["Device", "Registry"]


@dataclass(eq=False, slots=True)
class Device:
    """An open device.

    Attributes:
        file: the driver's file.
        memory: the memory file that stands for it.
        mode: O_RDONLY, O_WRONLY or O_RDWR.
        closed: whether the kernel has released it: no process has a descriptor or a mapping.
    """

    file: EnclaveFile | ProvisionFile
    memory: EnclaveMemory
    mode: int
    closed: bool = False


class Registry:
    """All open devices of all processes.

    A device, with its memory file, stays for as long as the driver references its file.  The kernel
    may release it earlier: a process that has ended takes its mappings with it, but its address
    space is still known to the driver until the loop hears of the end.

    Args:
        store: of the pages that the memory files hold.
        removed: called with each memory file that is given up.
    """

    def __init__(
        self,
        store: NativeStore,
        removed: Callable[[EnclaveMemory], None] = lambda _memory: None,
    ) -> None:
        self._store, self._removed = store, removed
        self._by_inode: dict[tuple[int, int], Device] = {}
        self._by_file: dict[int, Device] = {}

    def __len__(self) -> int:
        return len(self._by_inode)

    def add(self, device: Device) -> None:
        """Remember a device that was just opened."""
        self._by_inode[device.memory.key] = device
        self._by_file[id(device.file)] = device
        device.file.memory = device.memory

    def has(self, device: Device) -> bool:
        """Return whether a device is still open or mapped somewhere."""
        return id(device.file) in self._by_file

    def of_file(self, file: EnclaveFile) -> Device:
        """Return the device of a driver's file."""
        return self._by_file[id(file)]

    def of_descriptor(self, tid: int, descriptor: int) -> Device | None:
        """Return the device that ``descriptor`` is to thread ``tid``, ``None`` if it is none.

        The thread, not its process, which has no descriptors when its leader has ended.
        """
        if not self._by_inode:
            return None
        try:
            info = os.stat(f"/proc/{tid}/fd/{descriptor}")
        except OSError:
            return None
        return self._by_inode.get((info.st_dev, info.st_ino))

    def of_inode(self, key: tuple[int, int]) -> Device | None:
        """Return the device whose memory file has this (device, inode), if any."""
        return self._by_inode.get(key)

    def forget_page_table(self, page_table: EnclavePageTable) -> None:
        """An address space has ended: its pager is closed."""
        for device in self._by_inode.values():
            if page_table in device.memory.users:
                device.memory.users.remove(page_table)

    def sweep(self) -> None:
        """Release the files that the program has closed and unmapped everywhere."""
        for device in list(self._by_inode.values()):
            if not device.closed and device.memory.released():
                self._release(device)
            if device.closed and not device.file.referenced:
                self._remove(device)

    def close(self) -> None:
        """Release everything: the program has ended."""
        for device in list(self._by_inode.values()):
            if not device.closed:
                self._release(device)
            self._remove(device)

    def _release(self, device: Device) -> None:
        device.closed = True
        device.file.release()

    def _remove(self, device: Device) -> None:
        self._store.hide_unmapped()  # such pages may still be in the file
        del self._by_inode[device.memory.key], self._by_file[id(device.file)]
        self._removed(device.memory)
        device.memory.close()
