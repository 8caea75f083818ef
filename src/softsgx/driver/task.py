"""What the driver asks of whoever made a system call or caused a fault.

A task belongs to an address space, has memory that ``copy_from_user`` reads, descriptors, signals
and a control group.  The native engine implements it with a real thread, ``userland`` with a
simulated one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from softsgx.driver.mm import Mm
    from softsgx.paging import Claim, Group

__all__ = ["BadAddress", "Task", "UserMemory", "VmaInfo"]


class BadAddress(Exception):
    """User memory is not there, or not accessible so: the system call fails with EFAULT."""


@dataclass(frozen=True, slots=True)
class VmaInfo:
    """What ADD_PAGES wants to know of the mapping that holds a source page.

    Attributes:
        start, end: a range of the mapping, as large as is known.
        may_exec: VM_MAYEXEC: the mapping could be made executable; false on a noexec mount.
    """

    start: int
    end: int
    may_exec: bool = True


class UserMemory(Protocol):
    """Ordinary memory of one address space."""

    def read(self, address: int, size: int) -> bytes:
        """Return ``size`` bytes.

        Raises:
            BadAddress: some of it is not readable.
        """

    def read_pages(self, address: int, count: int) -> list[bytes]:
        """Return the bytes of up to ``count`` pages, fewer where that is cheaper, but one at least.

        Raises:
            BadAddress: the first of them is not readable.
        """

    def write(self, address: int, data: bytes) -> None:
        """Store ``data``.

        Raises:
            BadAddress: some of it is not writable.
        """

    def vma_info(self, address: int) -> VmaInfo | None:
        """Return the mapping that holds ``address``, ``None`` where there is none."""


class Task(Protocol):
    """A thread of a process, as system calls see ``current``.

    The attributes are read-only for the driver.
    """

    @property
    def mm(self) -> Mm:
        """Its address space."""

    @property
    def memory(self) -> UserMemory:
        """The ordinary memory of that address space."""

    @property
    def group(self) -> Group:
        """Who pays for the EPC pages that it makes the driver allocate."""

    @property
    def claim(self) -> Claim | None:
        """What this thread needs resident at once; ``None`` for what executes no instructions."""

    @property
    def personality_read_implies_exec(self) -> bool:
        """Whether its personality has READ_IMPLIES_EXEC."""

    def file(self, fd: int) -> object | None:
        """Return what ``fd`` stands for, ``None`` when it is not open."""

    def signal_pending(self) -> bool:
        """Return whether a signal is waiting to be delivered."""
