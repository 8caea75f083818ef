"""Ordinary memory of a simulated process: mappings onto frames of the machine's RAM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from softsgx.arch import PAGE_BYTES, page_of, split_pages
from softsgx.driver import PROT_READ, PROT_WRITE, BadAddress, VmaInfo
from softsgx.userland.page_tables import MachineOrGuest, SoftPageTable

__all__ = ["SoftMemory"]

_HEAP = 0x1000_0000
_RW = PROT_READ | PROT_WRITE


class SoftMemory:
    """The ordinary memory of one process: mappings onto frames of the machine's RAM.

    Args:
        machine: the machine that has the RAM.
        ptes: the process' page tables.
        frames: physical address of its first frame; it may have 64 GiB from there.
    """

    def __init__(self, machine: MachineOrGuest, ptes: SoftPageTable, frames: int) -> None:
        self._machine, self._ptes, self._next_frame = machine, ptes, frames
        self._latch = machine.runtime.latch()
        self._pages: dict[int, tuple[int, int, bool]] = {}
        self._top = _HEAP

    def map(
        self, size: int, prot: int = _RW, *, addr: int | None = None, may_exec: bool = True
    ) -> int:
        """Map zeroed pages; return their address, page aligned."""
        pages = -(-size // PAGE_BYTES)
        with self._latch:
            start = self._top if addr is None else addr
            if addr is None:
                self._top += (pages + 1) * PAGE_BYTES  # a guard page
            frame = self._next_frame
            self._next_frame += pages * PAGE_BYTES
        for number in range(pages):
            at = number * PAGE_BYTES
            self._set(start + at, frame + at, prot, may_exec=may_exec)
        return start

    def put(self, data: bytes, *, may_exec: bool = True) -> int:
        """Map pages that begin with ``data``; return their address, page aligned."""
        start = self.map(max(len(data), 1), may_exec=may_exec)
        self.write(start, data)
        return start

    def unmap(self, addr: int, size: int) -> None:
        """Unmap pages and free their memory."""
        for at in range(addr, addr + size, PAGE_BYTES):
            page = self._pages.pop(at, None)
            if page is not None:
                self._ptes.unmap(at)
                self._machine.ram_discard(page[0])

    @contextmanager
    def mapped(self, data: bytes) -> Iterator[int]:
        """Map pages that begin with ``data`` for the duration of a call; yield their address."""
        at = self.put(data)
        try:
            yield at
        finally:
            self.unmap(at, max(len(data), 1))

    def protect(self, addr: int, size: int, prot: int) -> None:
        """Change the rights of pages."""
        for at in range(addr, addr + size, PAGE_BYTES):
            frame, _prot, may_exec = self._pages[at]
            self._set(at, frame, prot, may_exec=may_exec)

    def _set(self, at: int, frame: int, prot: int, *, may_exec: bool) -> None:
        self._pages[at] = frame, prot, may_exec
        self._ptes.install(at, frame, prot)

    def copy_to(self, child: SoftMemory) -> None:
        """Give a forked child its own copy of everything."""
        for at, (frame, prot, may_exec) in list(self._pages.items()):
            child.map(PAGE_BYTES, prot, addr=at, may_exec=may_exec)
            child._store(at, self._machine.ram_read(frame, PAGE_BYTES))
        child._top = self._top

    # --- UserMemory -----------------------------------------------------------------------------

    def read(self, address: int, size: int) -> bytes:
        """As :meth:`UserMemory.read`."""
        self._check(address, size, PROT_READ)
        return b"".join(
            self._machine.ram_read(self._pages[page_of(at)][0] + at % PAGE_BYTES, length)
            for at, length in split_pages(address, size)
        )

    def read_pages(self, address: int, count: int) -> list[bytes]:
        """As :meth:`UserMemory.read_pages`: one, so that each is read when it is needed."""
        return [self.read(address, PAGE_BYTES)]

    def write(self, address: int, data: bytes) -> None:
        """As :meth:`UserMemory.write`."""
        self._check(address, len(data), PROT_WRITE)
        self._store(address, data)

    def _store(self, address: int, data: bytes) -> None:
        for at, length in split_pages(address, len(data)):
            frame = self._pages[page_of(at)][0]
            start = at - address
            self._machine.ram_write(frame + at % PAGE_BYTES, data[start : start + length])

    def _check(self, address: int, size: int, prot: int) -> None:
        for at, _length in split_pages(address, size):
            page = self._pages.get(page_of(at))
            if page is None or not page[1] & prot:
                raise BadAddress(f"{at:#x}")

    def vma_info(self, address: int) -> VmaInfo | None:
        """As :meth:`UserMemory.vma_info`."""
        page = self._pages.get(page_of(address))
        start = page_of(address)
        return None if page is None else VmaInfo(start, start + PAGE_BYTES, may_exec=page[2])
