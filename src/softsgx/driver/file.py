"""Open files of the two devices, and the dispatch of ioctls.

Source:
    sgx_open(), sgx_release(), sgx_mmap() of driver.c; sgx_ioctl() of ioctl.c; the provision device
    of main.c.
"""

from __future__ import annotations

from errno import EBUSY, EFAULT, EINTR, EINVAL, ENOMEM, ENOTTY
from typing import TYPE_CHECKING, Any

from softsgx import compiled
from softsgx.arch import PAGE_BYTES
from softsgx.defects import Defect
from softsgx.driver.enclave import Enclave
from softsgx.driver.events import IoctlDone
from softsgx.driver.mm import EnclaveVma, Mm, put_files
from softsgx.driver.task import BadAddress, Task
from softsgx.driver.uapi import (
    ERESTARTSYS,
    MAP_PRIVATE,
    MAP_SHARED,
    MAP_SHARED_VALIDATE,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    Ioctl,
    refuse,
)
from softsgx.paging import EpcBusy, Interrupted, NoEpc, RefCounted

if TYPE_CHECKING:
    from softsgx.driver.driver import Driver

__all__ = ["EnclaveFile", "ProvisionFile"]

_MAP_TYPE = 3


class _File(RefCounted):
    """An open file; descriptor tables and mappings reference it.

    Attributes:
        memory: what the engine maps where the file is mapped; ``None``: it maps nothing.
    """

    __slots__ = ("_driver", "memory")

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver.runtime)
        self._driver = driver
        self.memory: Any = None

    def hold(self) -> None:
        """Take another reference."""
        alive = self.get()
        assert alive, "a file without references is referenced"


class ProvisionFile(_File):
    """An open ``/dev/sgx_provision``: a descriptor of it is the permission for PROVISION."""

    __slots__ = ()

    def release(self) -> None:
        """Close it: the last descriptor in one table was closed."""
        self.put()

    def _destroy(self) -> None:
        self._driver.forget_file(self)


class EnclaveFile(_File):
    """An open ``/dev/sgx_enclave``: one enclave.

    Its descriptor table references it (:meth:`release` drops that), and so does each mapping.  The
    last reference releases the enclave, which exists while an address space or a reclaim batch
    references it.

    Attributes:
        enclave: the enclave, created or not.
    """

    __slots__ = ("_in_ioctl", "enclave")

    def __init__(self, driver: Driver, enclave: Enclave) -> None:
        super().__init__(driver)
        self.enclave = enclave
        self._in_ioctl = False

    # --- references -----------------------------------------------------------------------------

    def _destroy(self) -> None:
        self.enclave.release_file()
        self._driver.forget_file(self)

    def release(self) -> None:
        """Close it: the last descriptor in one table was closed; mappings still reference it."""
        self.put()

    # --- system calls ---------------------------------------------------------------------------

    def ioctl(self, task: Task, cmd: int, arg: int) -> int:
        """Execute an ioctl.

        Args:
            task: the calling task.
            cmd: the command's number.
            arg: address of its structure.

        Returns:
            0; the results are in the structure.

        Raises:
            OSError: ``errno`` may be :data:`~softsgx.driver.ERESTARTSYS`.  Counts in the structure
                are valid then too.
        """
        with self._latch:
            busy, self._in_ioctl = self._in_ioctl, True
        if busy:
            refuse(EBUSY, "another ioctl runs on this file")
        errno, count = 0, 0
        try:
            count = self._dispatch(task, cmd, arg)
        except OSError as error:
            errno = error.errno or 0
            raise
        finally:
            self._in_ioctl = False
            tracer = self._driver.tracer
            if tracer is not None:
                tracer(IoctlDone(self.enclave.number, _name(cmd), errno, count))
        return 0

    def _dispatch(self, task: Task, cmd: int, arg: int) -> int:
        from softsgx.driver.ioctls import COMMANDS

        command = COMMANDS.get(cmd)
        if command is None:
            refuse(ENOTTY, f"ioctl {cmd:#x}")
        try:
            return command(self.enclave, task, arg)
        except BadAddress as error:
            refuse(EFAULT, str(error))
        except NoEpc as error:
            refuse(ENOMEM, str(error))
        except EpcBusy:
            refuse(EBUSY, "no EPC page is free without reclaim")
        except Interrupted:
            # EINTR instead of ERESTARTSYS: the kernel does not restart the system call.
            errno = EINTR if Defect.CREATE_NOT_RESTARTED in self._driver.defects else ERESTARTSYS
            refuse(errno)

    def mmap(
        self,
        mm: Mm,
        addr: int,
        length: int,
        prot: int,
        flags: int,
        *,
        task: Task | None = None,
    ) -> int:
        """Map the enclave into an address space.

        Args:
            mm: the address space.
            addr: the address, or a hint.
            length: bytes; rounded up to whole pages.
            prot: PROT_* rights.
            flags: MAP_SHARED, with MAP_FIXED or MAP_FIXED_NOREPLACE.
            task: the calling task; by default the owner of ``mm``.

        Returns:
            The address.

        Raises:
            OSError: EINVAL: not shared, or a bad address or length; EACCES: a page of the enclave
                does not allow a right, or the range leaves an initialized enclave; ENOMEM;
                EEXIST.
        """
        length = -(-length // PAGE_BYTES) * PAGE_BYTES
        kind = flags & _MAP_TYPE
        private_is_fine = Defect.MAP_PRIVATE_ACCEPTED in self._driver.defects
        if length <= 0 or kind not in (MAP_SHARED, MAP_SHARED_VALIDATE, MAP_PRIVATE):
            refuse(EINVAL, f"mmap of {length:#x} bytes with flags {flags:#x}")
        if kind == MAP_PRIVATE and not private_is_fine:
            refuse(EINVAL, "an enclave can only be mapped MAP_SHARED")
        prot &= PROT_READ | PROT_WRITE | PROT_EXEC
        with mm.mmap_lock.writing():
            start = mm.place(addr, length, flags)
            # Deviation: Linux removes the old mapping before this check; here a refused mapping
            # leaves it in place.
            self.enclave.may_map(start, start + length, prot, task or mm.owner)
            if not self.enclave.add_mm(mm):
                refuse(ENOMEM, "the address space cannot be registered")
            self.hold()
            gone = mm.insert(EnclaveVma(start, start + length, prot, self, self.enclave))
        put_files(gone)
        return start

    # --- control --------------------------------------------------------------------------------

    def kill(self) -> int:
        """Free every EPC page of the enclave; accesses are SIGBUS from now on.

        Returns:
            EPC pages freed at once.  Pages in a reclaim batch follow when it ends.
        """
        return self.enclave.kill()


def _name(cmd: int) -> str:
    try:
        return f"SGX_IOC_{Ioctl(cmd).name}"
    except ValueError:
        return f"{cmd:#x}"


if compiled.speedups is not None:
    compiled.speedups.bind("EnclaveFile", EnclaveFile)
