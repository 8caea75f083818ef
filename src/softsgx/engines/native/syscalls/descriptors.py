"""System calls on descriptors of devices, with Linux's results for a device of ioctl and mmap only.

The program's descriptor is a memory file, whose bytes are those of resident pages, so no call may
read, write, cut or extend it.  Rare calls always stop.  For those that transfer data the supervisor
adds a filter on the descriptor's number when an enclave is created through it, and for each
duplicate: programs without an enclave have no cost.

Deviation: a descriptor received from another process (SCM_RIGHTS, pidfd_getfd) with a number that
is not filtered yet can be read and written.  Before the receiver maps it shared, or makes an SGX
ioctl on it, fstat describes a memory file, and a private mapping of it succeeds.

Deviation: F_GETFL returns O_RDWR for every mode of open.

Deviation: flock of a device always succeeds, and locks nothing.

Source:
    read(2), write(2), lseek(2), fsync(2), ftruncate(2), fallocate(2), splice(2); the file
    operations of driver.c; fs/read_write.c, fs/open.c, fs/sync.c for what their absence means.
"""

from __future__ import annotations

from collections.abc import Iterable
from errno import EBADF, EINVAL, ENODEV, ESPIPE

from softsgx.engines.native import abi
from softsgx.engines.native.syscalls.registry import Device, Registry
from softsgx.engines.native.syscalls.remote import RemoteMemory
from softsgx.engines.native.tracing.bpf import build_descriptor_guard
from softsgx.engines.native.tracing.filters import add_filter, watch_devices
from softsgx.engines.native.tracing.loop import Handler
from softsgx.engines.native.tracing.program import ProgramThread

__all__ = ["DeviceDescriptors"]

_INT32 = 0xFFFF_FFFF
#: Every filter makes system calls slower: descriptors beyond these are not filtered.
_MOST_GUARDED = 32

_READS = (abi.SYS_READ, abi.SYS_PREAD64, abi.SYS_READV, abi.SYS_PREADV, abi.SYS_PREADV2)
_WRITES = (abi.SYS_WRITE, abi.SYS_PWRITE64, abi.SYS_WRITEV, abi.SYS_PWRITEV, abi.SYS_PWRITEV2)
_REFUSED = {
    abi.SYS_LSEEK: ESPIPE,
    abi.SYS_SYNC_FILE_RANGE: ESPIPE,
    abi.SYS_FSYNC: EINVAL,
    abi.SYS_FDATASYNC: EINVAL,
    abi.SYS_READAHEAD: EINVAL,
}
#: Calls with two descriptors, and which arguments they are.
_BETWEEN = {
    abi.SYS_SENDFILE: ("rdi", "rsi"),
    abi.SYS_SPLICE: ("rdi", "rdx"),
    abi.SYS_COPY_FILE_RANGE: ("rdi", "rdx"),
}


class DeviceDescriptors:
    """Handlers of system calls on descriptors: a result, or ``None`` to let the call run.

    Args:
        registry: which descriptors are devices.
        remote: reads and writes memory through descriptors of ``/proc/PID/mem``.
    """

    def __init__(self, registry: Registry, remote: RemoteMemory) -> None:
        self._registry, self._remote = registry, remote

    def handlers(self) -> dict[int, Handler]:
        """Return the handlers by number of the call."""
        found: dict[int, Handler] = {
            abi.SYS_FTRUNCATE: self._refuse_with(EINVAL),
            abi.SYS_FALLOCATE: self._fallocate,
            abi.SYS_FLOCK: self._refuse_with(0),
            abi.SYS_FCNTL: self._fcntl,
            abi.SYS_DUP: self._duplicate,
            abi.SYS_DUP2: self._duplicate,
            abi.SYS_DUP3: self._duplicate,
        }
        found |= {number: self._refuse_with(error) for number, error in _REFUSED.items()}
        found |= {number: self._refuse_mode(abi.O_WRONLY) for number in _READS}
        found |= {number: self._refuse_mode(abi.O_RDONLY) for number in _WRITES}
        found |= {number: self._refuse_any(names) for number, names in _BETWEEN.items()}
        return found

    def guard(self, thread: ProgramThread, descriptor: int) -> None:
        """Let calls that move data of a descriptor, or duplicate it, stop from now on."""
        watch_devices(thread)
        guarded = thread.process.guarded_descriptors
        if descriptor not in guarded and len(guarded) < _MOST_GUARDED:
            guarded.add(descriptor)
            add_filter(thread, build_descriptor_guard(descriptor))

    def open_memory(self, thread: ProgramThread) -> int:
        """Let the open of a ``/proc/PID/mem`` be made, and note its descriptor."""
        descriptor = thread.finish_syscall()
        if descriptor >= 0:
            self.guard(thread, descriptor)
            thread.process.memory_descriptors.add(descriptor)
        return descriptor

    # --- handlers -------------------------------------------------------------------------------

    def _refuse_with(self, error: int) -> Handler:
        return lambda thread: None if self._device(thread, thread.regs.rdi) is None else -error

    def _refuse_mode(self, without: int) -> Handler:
        """EBADF for a descriptor opened ``without`` the direction; the device has none of it."""

        def refuse(thread: ProgramThread) -> int | None:
            device = self._device(thread, thread.regs.rdi)
            if device is not None:
                return -EBADF if device.mode == without else -EINVAL
            if thread.regs.rdi & _INT32 in thread.process.memory_descriptors:
                return self._remote.transfer(thread)
            return None

        return refuse

    def _refuse_any(self, names: Iterable[str]) -> Handler:
        def refuse(thread: ProgramThread) -> int | None:
            descriptors = [getattr(thread.regs, name) for name in names]
            found = any(self._device(thread, descriptor) is not None for descriptor in descriptors)
            return -EINVAL if found else None

        return refuse

    def _fallocate(self, thread: ProgramThread) -> int | None:
        device = self._device(thread, thread.regs.rdi)
        if device is None:
            return None
        offset, length = thread.regs.rdx, thread.regs.r10
        if offset >> 63 or length >> 63 or not length:
            return -EINVAL
        return -EBADF if device.mode == abi.O_RDONLY else -ENODEV

    def _fcntl(self, thread: ProgramThread) -> int | None:
        command = thread.regs.rsi & _INT32
        if command in (abi.F_DUPFD, abi.F_DUPFD_CLOEXEC):
            return self._duplicate(thread)
        if command in (abi.F_ADD_SEALS, abi.F_GET_SEALS):
            return self._refuse_with(EINVAL)(thread)
        return None  # flags of descriptors, locks: the same for the memory file

    def _duplicate(self, thread: ProgramThread) -> int | None:
        descriptor = thread.regs.rdi & _INT32
        process = thread.process
        memory = descriptor in process.memory_descriptors
        device = self._device(thread, descriptor) is not None
        if descriptor not in process.guarded_descriptors or not (memory or device):
            return None
        duplicate = thread.finish_syscall()
        if duplicate >= 0:
            self.guard(thread, duplicate)
            if memory:
                process.memory_descriptors.add(duplicate)
        return duplicate

    def _device(self, thread: ProgramThread, descriptor: int) -> Device | None:
        return self._registry.of_descriptor(thread.tid, descriptor & _INT32)
