"""The task that makes a system call or causes a fault, as the driver sees it.

A task has an address space, memory that ``copy_from_user`` reads, descriptors, signals and a
control group.  The native engine implements it for real threads, ``userland`` for simulated ones.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol

from softsgx.ondemand import dataclass

if TYPE_CHECKING:
    from softsgx.driver.mm import Mm
    from softsgx.paging import Claim, Group

__all__ = ["BadAddress", "Task", "UserMemory", "VmaInfo", "first_node", "own_group"]


class BadAddress(Exception):
    """User memory is not mapped or does not allow the access: EFAULT."""


@dataclass(frozen=True, slots=True)
class VmaInfo:
    """The mapping that holds a source page of ADD_PAGES.

    Attributes:
        start, end: a range of the mapping, which may be larger.
        may_exec: VM_MAYEXEC: mprotect may make it executable; false on a noexec mount.
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
        """Return the bytes of at least one and at most ``count`` pages.

        Raises:
            BadAddress: the first of them is not readable.
        """

    def write(self, address: int, data: bytes) -> None:
        """Store ``data``.

        Raises:
            BadAddress: some of it is not writable.
        """

    def vma_info(self, address: int) -> VmaInfo | None:
        """Return the mapping that holds ``address``; ``None``: nothing is mapped there."""


class Task(Protocol):
    """A thread of a process: ``current`` of a system call.

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
        """The group that is charged for its EPC pages."""

    @property
    def claim(self) -> Claim | None:
        """The claim of this thread; ``None`` for a task that executes no enclave code."""

    @property
    def personality_read_implies_exec(self) -> bool:
        """Whether its personality has READ_IMPLIES_EXEC."""

    def file(self, fd: int) -> object | None:
        """Return the open file of ``fd``; ``None``: it is not open."""

    def signal_pending(self) -> bool:
        """Return whether a signal is waiting to be delivered."""


own_group: Callable[[Task], Group] = attrgetter("group")
"""Returns the group of a task itself."""


def first_node(task: Task) -> int:
    """Return NUMA node 0, where each task runs on a machine with one node."""
    return 0
