"""Reading and writing memory past page tables: ``/proc/PID/mem`` and process_vm_readv.

Linux maps enclaves without pages of its own.  ``/proc/PID/mem`` calls the driver, which reads and
writes debug enclaves by EDBGRD and EDBGWR and refuses others; process_vm_readv and
process_vm_writev refuse all.  Without the handlers of this module the kernel would access the
memory file: it would return an enclave's bytes, or zeros, which would fill the hole of a page that
is not resident.

The supervisor records a descriptor of ``/proc/PID/mem`` when it is opened; its reads and writes
stop.

Deviation: process_vm_readv ends before the first remote part that touches an enclave, where Linux
transfers the pages of that part before the enclave.

Source:
    proc(5), process_vm_readv(2); ``sgx_vma_access()``, encl.c; ``mem_rw()``, fs/proc/base.c.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from errno import EFAULT, EIO

from softsgx import driver
from softsgx.engines.native import abi, libc
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.ondemand import dataclass, pattern

__all__ = ["RemoteMemory"]

_MEMORY = pattern(r"/proc/(\d+)(?:/task/\d+)?/mem")
_IOVEC = struct.Struct("<QQ")
_MOST_PARTS = 1024
_MOST_BYTES = 1 << 24
_SEEK_SET = 0
_INT32 = 0xFFFF_FFFF
_NO_OFFSET = (1 << 64) - 1

_READS = frozenset({abi.SYS_READ, abi.SYS_PREAD64, abi.SYS_READV, abi.SYS_PREADV, abi.SYS_PREADV2})
_AT_OFFSET = frozenset({abi.SYS_PREAD64, abi.SYS_PWRITE64, abi.SYS_PREADV, abi.SYS_PWRITEV})
_AT_EITHER = frozenset({abi.SYS_PREADV2, abi.SYS_PWRITEV2})
_PLAIN = frozenset({abi.SYS_READ, abi.SYS_WRITE, abi.SYS_PREAD64, abi.SYS_PWRITE64})


@dataclass(frozen=True, slots=True)
class _Transfer:
    """One read or write.

    Attributes:
        position: where in the other address space.
        parts: (address, bytes) of each buffer.
        moves: whether it moves the descriptor's position.
    """

    position: int
    parts: list[tuple[int, int]]
    moves: bool

    @property
    def length(self) -> int:
        return min(sum(size for _address, size in self.parts), _MOST_BYTES)


class RemoteMemory:
    """Handlers: a result, or ``None`` to let the call run.

    Args:
        image_of: returns the address space of a process or thread, ``None`` for other programs.
    """

    def __init__(self, image_of: Callable[[int], ProcessImage | None]) -> None:
        self._image_of = image_of

    def process_vm(self, thread: ProgramThread) -> int | None:
        """Do process_vm_readv and process_vm_writev (pid, local, count, remote, count, flags)."""
        regs = thread.regs
        image = self._image_of(regs.rdi & _INT32)
        if image is None or not 0 < regs.r8 <= _MOST_PARTS:
            return None
        for index, (start, size) in enumerate(_parts(thread, regs.r10, regs.r8)):
            touched = image.mm.vmas(start, start + size) if size else []
            if touched and image.is_mapped_up_to(start, touched[0].start):
                if not index:
                    return -EFAULT
                arguments = (regs.rdi, regs.rsi, regs.rdx, regs.r10, index, regs.r9)
                return thread.finish_syscall(regs.orig_rax, *arguments)
        return None

    def transfer(self, thread: ProgramThread) -> int | None:
        """Do read, write and their variants on a descriptor of ``/proc/PID/mem``."""
        regs = thread.regs
        descriptor, number = regs.rdi & _INT32, regs.orig_rax
        link = _MEMORY.fullmatch(_link(thread, descriptor))
        image = None if link is None else self._image_of(int(link[1]))
        if image is None:
            return None
        wanted = _wanted(thread, descriptor)
        if wanted is None:
            return None
        end = wanted.position + wanted.length
        touched = image.mm.vmas(wanted.position, end) if wanted.length else []
        if not touched:
            return None
        if touched[0].start > wanted.position:  # what lies before it is ordinary memory
            end = touched[0].start
        if number in _READS:
            done = self._read(thread, image, wanted, end)
        else:
            done = self._write(thread, image, wanted, end)
        if done > 0 and wanted.moves:
            thread.syscall(abi.SYS_LSEEK, descriptor, wanted.position + done, _SEEK_SET)
        return done

    def _read(self, thread: ProgramThread, image: ProcessImage, wanted: _Transfer, end: int) -> int:
        at, size = wanted.position, end - wanted.position
        try:
            if image.mm.find(at) is None:
                data = os.pread(image.memory_fd, size, at)
            else:
                data = driver.peek(image.mm, at, size, thread)
        except OSError:
            return -EIO
        given = 0
        try:
            for address, room in wanted.parts:
                piece = data[given : given + room]
                libc.write_memory(thread.tid, address, piece)
                given += len(piece)
        except OSError:
            return given or -EFAULT
        return given

    def _write(
        self, thread: ProgramThread, image: ProcessImage, wanted: _Transfer, end: int
    ) -> int:
        at = wanted.position
        try:
            data = b"".join(libc.read_memory(thread.tid, *part) for part in wanted.parts if part[1])
        except OSError:
            return -EFAULT
        try:
            if image.mm.find(at) is None:
                return os.pwrite(image.memory_fd, data[: end - at], at)
            return driver.poke(image.mm, at, data[: end - at], thread)
        except OSError:
            return -EIO


def _wanted(thread: ProgramThread, descriptor: int) -> _Transfer | None:
    """Return what a call wants to transfer; ``None`` where the descriptor does not allow it."""
    regs, number = thread.regs, thread.regs.orig_rax
    info = {}
    with open(f"/proc/{thread.tid}/fdinfo/{descriptor}") as file:
        for line in file:
            name, _colon, value = line.partition(":")
            info[name] = value.strip()
    without = abi.O_WRONLY if number in _READS else abi.O_RDONLY
    if int(info["flags"], 8) & abi.O_ACCMODE == without:
        return None
    plain = number in _PLAIN
    parts = [(regs.rsi, regs.rdx)] if plain else _parts(thread, regs.rsi, regs.rdx)
    given = number in _AT_OFFSET or (number in _AT_EITHER and regs.r10 != _NO_OFFSET)
    return _Transfer(regs.r10 if given else int(info["pos"]), parts, moves=not given)


def _link(thread: ProgramThread, descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/{thread.tid}/fd/{descriptor}")
    except OSError:
        return ""


def _parts(thread: ProgramThread, address: int, count: int) -> list[tuple[int, int]]:
    """Return the parts of an array of ``struct iovec``; none where it cannot be read."""
    data = thread.image.read(address, count * _IOVEC.size)
    return list(_IOVEC.iter_unpack(data[: len(data) // _IOVEC.size * _IOVEC.size]))
