"""The handler of each system call that stops, by its number."""

from __future__ import annotations

from collections.abc import Callable
from errno import EACCES
from typing import TYPE_CHECKING

from softsgx.driver import Driver, EnclaveFile, ProvisionFile
from softsgx.engines.native import abi
from softsgx.engines.native.syscalls.advice import madvise, mlock
from softsgx.engines.native.syscalls.clone import clone, clone3
from softsgx.engines.native.syscalls.descriptors import DeviceDescriptors
from softsgx.engines.native.syscalls.mman import Mappings
from softsgx.engines.native.syscalls.paths import NamedFiles
from softsgx.engines.native.syscalls.remote import RemoteMemory
from softsgx.engines.native.syscalls.sched import Affinity
from softsgx.engines.native.tracing.program import ProgramThread

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.loop import Handler

__all__ = ["Opener", "make_handlers"]


class Opener:
    """Opens the driver's devices.

    Args:
        driver: has them.
        provision: whether the provision device may be opened.
    """

    def __init__(self, driver: Driver, *, provision: bool) -> None:
        self._driver, self._provision = driver, provision

    def open_enclave(self, thread: ProgramThread) -> EnclaveFile:
        """Open ``/dev/sgx_enclave``."""
        return self._driver.open(thread)

    def open_provision(self, thread: ProgramThread) -> ProvisionFile:
        """Open ``/dev/sgx_provision``."""
        if not self._provision:
            raise OSError(EACCES, "refused on demand")
        return self._driver.open_provision(thread)


def make_handlers(
    ioctl: Handler,
    files: NamedFiles,
    descriptors: DeviceDescriptors,
    mappings: Mappings,
    remote: RemoteMemory,
    affinity: Callable[[], Affinity | None],
) -> dict[int, Handler]:
    """Return the handlers, given the objects that they are methods of.

    ``ioctl`` does the ioctls of open devices; ``affinity`` returns what keeps the program on its
    processors while it runs.
    """

    def processors() -> Affinity:
        found = affinity()
        assert found is not None, "a program runs without its processors being seen to"
        return found

    return (
        descriptors.handlers()
        | files.handlers()
        | {
            abi.SYS_CLONE: clone,
            abi.SYS_CLONE3: clone3,
            abi.SYS_MMAP: mappings.mmap,
            abi.SYS_MPROTECT: mappings.mprotect,
            abi.SYS_PKEY_MPROTECT: mappings.mprotect,
            abi.SYS_MUNMAP: mappings.munmap,
            abi.SYS_MREMAP: mappings.mremap,
            abi.SYS_MADVISE: madvise,
            abi.SYS_MLOCK: mlock,
            abi.SYS_MLOCK2: mlock,
            abi.SYS_PROCESS_VM_READV: remote.process_vm,
            abi.SYS_PROCESS_VM_WRITEV: remote.process_vm,
            abi.SYS_IOCTL: ioctl,
            abi.SYS_SCHED_GETAFFINITY: lambda thread: processors().getaffinity(thread),
            abi.SYS_SCHED_SETAFFINITY: lambda thread: processors().setaffinity(thread),
        }
    )
