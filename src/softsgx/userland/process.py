"""A process of a simulated machine: memory, descriptors, system calls.

The driver sees a task; :mod:`.thread` has the threads that execute instructions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from errno import EACCES
from typing import TYPE_CHECKING

from softsgx.arch import SecInfo
from softsgx.driver import (
    MAP_FIXED,
    MAP_SHARED,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    AddPages,
    AddPagesFlags,
    Create,
    EnclaveFile,
    Init,
    Ioctl,
    Mm,
    ModifyTypes,
    Provision,
    ProvisionFile,
    RemovePages,
    RestrictPermissions,
)
from softsgx.image import EnclaveImage
from softsgx.layout import Structure
from softsgx.paging import Group
from softsgx.userland.enclave import LoadedEnclave, load_enclave
from softsgx.userland.memory import SoftMemory
from softsgx.userland.page_tables import MachineOrGuest, SoftPageTable
from softsgx.userland.thread import SoftThread

if TYPE_CHECKING:
    from softsgx.driver import Driver

__all__ = ["SoftProcess"]

_FRAMES, _FRAMES_BYTES = 1 << 51, 1 << 36  # physical memory above any EPC; 64 GiB a process
_PLACES = 0x10_0000_0000  # above the heap and its frames' addresses


class SoftProcess:
    """A process: a task to the driver, with memory, descriptors and threads.

    Args:
        machine: the machine or guest that it runs on.
        driver: it opens the devices of this driver.
        group: its EPC pages are charged to this group; the core's root when ``None``.
        name: in messages and schedules.
        may_provision: whether it may open ``/dev/sgx_provision``, which is a right of the file
            system on Linux.
        make_mm: makes its address space; an empty one when ``None``.

    Attributes:
        mm: its address space.
        memory: its ordinary memory.
        personality_read_implies_exec: settable.
        signal: a signal is pending; settable, or a function to ask.
    """

    def __init__(
        self,
        machine: MachineOrGuest,
        driver: Driver,
        *,
        group: Group | None = None,
        name: str = "",
        may_provision: bool = True,
        make_mm: Callable[[SoftProcess], Mm] | None = None,
    ) -> None:
        pid = driver.next_pid()
        self.name = name or f"process{pid}"
        self.machine, self.driver = machine, driver
        self.group: Group = driver.core.root if group is None else group
        self.ptes = SoftPageTable(machine)
        self.memory = SoftMemory(machine, self.ptes, _FRAMES + pid * _FRAMES_BYTES)
        self.mm = (
            driver.mm_type(driver.runtime, self.ptes, owner=self, name=self.name)
            if make_mm is None
            else make_mm(self)
        )
        self.may_provision = may_provision
        self.personality_read_implies_exec = False
        self._next_base = _PLACES
        self.signal: bool | Callable[[], bool] = False
        self._files: dict[int, EnclaveFile | ProvisionFile] = {}
        self._latch = driver.runtime.latch()

    # --- Task -----------------------------------------------------------------------------------

    def file(self, fd: int) -> EnclaveFile | ProvisionFile | None:
        """Return the open file of a descriptor."""
        return self._files.get(fd)

    def signal_pending(self) -> bool:
        """Return whether a signal is pending."""
        return self.signal if isinstance(self.signal, bool) else self.signal()

    @property
    def claim(self) -> None:
        """Return ``None``: its threads have claims."""
        return None

    # --- system calls ---------------------------------------------------------------------------

    def open(self) -> int:
        """Open ``/dev/sgx_enclave``; return the descriptor."""
        return self._descriptor(self.driver.open(self))

    def open_provision(self) -> int:
        """Open ``/dev/sgx_provision``; return the descriptor.

        Raises:
            OSError: EACCES: the process has no right to it.
        """
        if not self.may_provision:
            raise OSError(EACCES, "/dev/sgx_provision: the process may not open it")
        return self._descriptor(self.driver.open_provision(self))

    def _descriptor(self, file: EnclaveFile | ProvisionFile) -> int:
        with self._latch:
            fd = next(fd for fd in range(3, 1 << 20) if fd not in self._files)
            self._files[fd] = file
        return fd

    def enclave_file(self, fd: int) -> EnclaveFile:
        """Return the file of a descriptor that is ``/dev/sgx_enclave``."""
        file = self._files[fd]
        assert isinstance(file, EnclaveFile), f"descriptor {fd} is no enclave"
        return file

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        self._files.pop(fd).release()

    def ioctl(self, fd: int, cmd: int, args: Structure) -> None:
        """Make an ioctl whose structure lies in the process' memory; ``args`` receives the result.

        Raises:
            OSError: as :meth:`EnclaveFile.ioctl`; ``args`` is updated in this case, too.
        """
        with self.memory.mapped(args.pack()) as at:
            try:
                self.enclave_file(fd).ioctl(self, cmd, at)
            finally:
                after = type(args).unpack(self.memory.read(at, args.SIZE))
                for name in args.OFFSETS:
                    setattr(args, name, getattr(after, name))

    def create(self, fd: int, secs: bytes) -> None:
        """SGX_IOC_ENCLAVE_CREATE with a SECS of 4096 bytes."""
        with self.memory.mapped(secs) as src:
            self.ioctl(fd, Ioctl.ENCLAVE_CREATE, Create(src=src))

    def add_pages(
        self, fd: int, offset: int, data: bytes, flags: int, *, measure: bool = True
    ) -> AddPages:
        """SGX_IOC_ENCLAVE_ADD_PAGES of whole pages with SECINFO ``flags``."""
        mapped = self.memory.mapped
        with mapped(data) as src, mapped(SecInfo(flags=flags).pack()) as secinfo:
            args = AddPages(
                src=src,
                offset=offset,
                length=len(data),
                secinfo=secinfo,
                flags=int(AddPagesFlags.MEASURE) if measure else 0,
            )
            self.ioctl(fd, Ioctl.ENCLAVE_ADD_PAGES, args)
        return args

    def init(self, fd: int, sigstruct: bytes) -> None:
        """SGX_IOC_ENCLAVE_INIT with a SIGSTRUCT."""
        with self.memory.mapped(sigstruct) as at:
            self.ioctl(fd, Ioctl.ENCLAVE_INIT, Init(sigstruct=at))

    def provision(self, fd: int, provision_fd: int) -> None:
        """SGX_IOC_ENCLAVE_PROVISION."""
        self.ioctl(fd, Ioctl.ENCLAVE_PROVISION, Provision(fd=provision_fd))

    def restrict(self, fd: int, offset: int, length: int, permissions: int) -> RestrictPermissions:
        """SGX_IOC_ENCLAVE_RESTRICT_PERMISSIONS."""
        args = RestrictPermissions(offset=offset, length=length, permissions=permissions)
        self.ioctl(fd, Ioctl.ENCLAVE_RESTRICT_PERMISSIONS, args)
        return args

    def modify_types(self, fd: int, offset: int, length: int, page_type: int) -> ModifyTypes:
        """SGX_IOC_ENCLAVE_MODIFY_TYPES."""
        args = ModifyTypes(offset=offset, length=length, page_type=page_type)
        self.ioctl(fd, Ioctl.ENCLAVE_MODIFY_TYPES, args)
        return args

    def remove_pages(self, fd: int, offset: int, length: int) -> RemovePages:
        """SGX_IOC_ENCLAVE_REMOVE_PAGES."""
        args = RemovePages(offset=offset, length=length)
        self.ioctl(fd, Ioctl.ENCLAVE_REMOVE_PAGES, args)
        return args

    def mmap(
        self,
        fd: int,
        addr: int,
        length: int,
        prot: int = PROT_READ | PROT_WRITE | PROT_EXEC,
        flags: int = MAP_SHARED | MAP_FIXED,
    ) -> int:
        """Map an enclave."""
        return self.enclave_file(fd).mmap(self.mm, addr, length, prot, flags, task=self)

    def munmap(self, addr: int, length: int) -> None:
        """Unmap enclaves."""
        self.mm.munmap(addr, length)

    def mprotect(self, addr: int, length: int, prot: int) -> None:
        """Change the rights of mappings of enclaves."""
        self.mm.mprotect(addr, length, prot, task=self)

    def free_range(self, size: int) -> int:
        """Return the base of a free range of addresses, aligned to its size, a power of two."""
        base = -(-self._next_base // size) * size
        self._next_base = base + size
        return base

    def load(
        self,
        file: str | os.PathLike[str] | EnclaveImage,
        *,
        sigstruct: str | os.PathLike[str] | None = None,
        base: int | None = None,
        debug: bool | None = None,
    ) -> LoadedEnclave:
        """Create and initialise the enclave of a file; see :func:`.enclave.load_enclave`."""
        return load_enclave(self, file, sigstruct=sigstruct, base=base, debug=debug)

    def fork(self, *, name: str = "", fail: bool = False) -> SoftProcess:
        """Return a child process.

        Args:
            name: its name.
            fail: there is no memory to register it with the enclaves.
        """
        child = SoftProcess(
            self.machine,
            self.driver,
            group=self.group,
            name=name,
            may_provision=self.may_provision,
            make_mm=lambda child: self.mm.fork(
                child.ptes, owner=child, name=child.name, copy_entries=True, fail=fail
            ),
        )
        child._next_base = self._next_base
        self.memory.copy_to(child.memory)
        for fd, file in self._files.items():
            file.hold()
            child._files[fd] = file
        return child

    def exit(self) -> None:
        """End it: its address space, then its descriptors."""
        self.mm.exit()
        for fd in list(self._files):
            self.close(fd)

    def thread(self, cpu: int = 0) -> SoftThread:
        """Return a thread on a logical processor; no other thread may use that at the time."""
        return SoftThread(self, self.machine.cpus[cpu])
