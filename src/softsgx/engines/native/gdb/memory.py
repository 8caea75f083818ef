"""The program's memory as gdb reads and writes it, and the breakpoints that are in it.

Ordinary memory is that of ``/proc/PID/mem``.  Where an enclave is mapped, the driver answers as it
does for ptrace: EDBGRD and EDBGWR for debug enclaves, an error for others.

A breakpoint is INT3 in place of a byte, in an enclave as well, as on hardware: enclave code that
reads the byte reads CC, and the page is evicted and loaded with it; earlier measurements by EEXTEND
do not change.  gdb reads the original byte, and CPUID where the supervisor has replaced a CPUID
instruction by INT3.

Source:
    SDM vol. 3D, "EDBGRD", "EDBGWR"; ``sgx_vma_access()``, encl.c; proc(5).
"""

from __future__ import annotations

import os
from errno import EFAULT

from softsgx.driver import peek, poke
from softsgx.engines.native import abi
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.x86.rewrite import CPUID

__all__ = ["DebuggedMemory"]

_INT3 = b"\xcc"


class DebuggedMemory:
    """The memory of one address space.

    Args:
        image: the address space.

    Attributes:
        breakpoints: the byte that INT3 has replaced, by address.
    """

    def __init__(self, image: ProcessImage) -> None:
        self.image = image
        self.breakpoints: dict[int, bytes] = {}

    def read(self, thread: ProgramThread, address: int, size: int) -> bytes:
        """Return up to ``size`` bytes, fewer where memory ends.

        Args:
            thread: a stopped thread of the program; pages that are loaded are charged to its group.
            address: of the first byte.
            size: bytes.

        Raises:
            OSError: not even the first byte can be read.
        """
        data = b""
        while len(data) < size:
            at = address + len(data)
            try:
                part = self._read_part(thread, at, size - len(data))
            except OSError:
                if data:
                    break
                raise
            if not part:
                break
            data += part
        if not data:
            raise OSError(EFAULT, os.strerror(EFAULT))
        return self._as_written(address, data)

    def write(self, thread: ProgramThread, address: int, data: bytes) -> None:
        """Replace bytes; breakpoints among them stay.

        Raises:
            OSError: not all of them can be written.
        """
        shown = bytearray(data)
        for place in self.breakpoints:
            if address <= place < address + len(data):
                at = place - address
                self.breakpoints[place] = data[at : at + 1]
                shown[at : at + 1] = _INT3
        self._write(thread, address, bytes(shown))

    def insert(self, thread: ProgramThread, address: int) -> None:
        """Set a breakpoint at ``address``; there may be one already.

        Raises:
            OSError: the byte cannot be replaced.
        """
        if address in self.breakpoints:
            return
        own = self.read(thread, address, 1)
        self._write(thread, address, _INT3)
        self.breakpoints[address] = own

    def remove(self, thread: ProgramThread, address: int) -> None:
        """Remove a breakpoint; its memory may be unmapped, or hold another byte."""
        own = self.breakpoints.pop(address, None)
        if own is None:
            return
        try:
            if self._read_part(thread, address, 1) == _INT3:
                self._write(thread, address, self._byte_without_breakpoint(address, own))
        except OSError:
            return

    def remove_all(self, thread: ProgramThread) -> None:
        """Remove every breakpoint."""
        for address in list(self.breakpoints):
            self.remove(thread, address)

    def give_back(self, copy: ProcessImage) -> None:
        """Restore the original bytes in a fork child's private memory, which gdb does not debug."""
        for address, own in self.breakpoints.items():
            if copy.mm.find(address) is None:
                try:
                    os.pwrite(copy.memory_fd, self._byte_without_breakpoint(address, own), address)
                except OSError:
                    continue  # the program does not copy that mapping

    def _byte_without_breakpoint(self, address: int, own: bytes) -> bytes:
        """Return the byte in memory without a breakpoint where gdb reads ``own``."""
        return _INT3 if address in self.image.cpuid_sites else own

    def _as_written(self, address: int, data: bytes) -> bytes:
        """Return bytes without breakpoints and replaced instructions."""
        end = address + len(data)
        own = bytearray(data)
        for site in self.image.cpuid_sites:
            for place, byte in zip(range(site, site + len(CPUID)), CPUID, strict=True):
                if address <= place < end:
                    own[place - address] = byte
        for place, saved in self.breakpoints.items():
            if address <= place < end:
                own[place - address : place - address + 1] = saved
        return bytes(own)

    def _read_part(self, thread: ProgramThread, address: int, size: int) -> bytes:
        """Return bytes of one enclave, or of ordinary memory, with breakpoints in them."""
        if address >= abi.TASK_SIZE:
            raise OSError(EFAULT, os.strerror(EFAULT))
        size = self._size_of_part(address, size)
        if self.image.mm.find(address) is not None:
            return peek(self.image.mm, address, size, thread)
        return os.pread(self.image.memory_fd, size, address)

    def _write(self, thread: ProgramThread, address: int, data: bytes) -> None:
        while data:
            if address >= abi.TASK_SIZE:
                raise OSError(EFAULT, os.strerror(EFAULT))
            part = data[: self._size_of_part(address, len(data))]
            if self.image.mm.find(address) is not None:
                done = poke(self.image.mm, address, part, thread)
            else:
                done = os.pwrite(self.image.memory_fd, part, address)
            if not done:
                raise OSError(EFAULT, os.strerror(EFAULT))
            address, data = address + done, data[done:]

    def _size_of_part(self, address: int, size: int) -> int:
        """Return how many of ``size`` bytes are in the same enclave, or in ordinary memory."""
        vma = self.image.mm.find(address)
        if vma is not None:
            return min(size, vma.end - address)
        following = self.image.mm.vmas(address, address + size)
        return min(size, following[0].start - address) if following else size
