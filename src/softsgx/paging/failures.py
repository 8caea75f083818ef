"""Refusals of the core, which its callers turn into errno values.

None of these is an ``OSError``: the code that serves user space chooses the errno.  The docstring
of each names the usual one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softsgx.paging.interfaces import Group

__all__ = [
    "BackingError",
    "EpcBusy",
    "Interrupted",
    "LoadFailed",
    "MachineCheck",
    "NoEpc",
    "PagingError",
]


class PagingError(Exception):
    """Base of all refusals of the core; nothing has changed."""


class NoEpc(PagingError):
    """No EPC page is free and none can be reclaimed: ENOMEM.  The text says why."""


class EpcBusy(PagingError):
    """No EPC page is free now, but reclaim may free one; try again: EBUSY.

    Attributes:
        outcomes: ksgxd's ``outcomes`` at the refusal; for :meth:`EpcCore.wait_for_page`.
        group: a page of its subtree has to be evicted first; ``None`` is the root.
        pause: another thread holds its claim, so the caller sleeps for a short time.
    """

    def __init__(
        self, outcomes: int = -1, group: Group | None = None, *, pause: bool = False
    ) -> None:
        super().__init__("no EPC page is free now")
        self.outcomes, self.group, self.pause = outcomes, group, pause


class Interrupted(PagingError):
    """A signal is pending and the caller would have to reclaim: ERESTARTSYS."""


class BackingError(PagingError):
    """The backing file is full, has no such page, or its disk fails: ENOMEM."""


class LoadFailed(PagingError):
    """ELDU refused a page, or its content is lost: EFAULT; SIGBUS for an access of the enclave.

    Attributes:
        result: the code's name in the manual, the fault, or ``lost``.
    """

    def __init__(self, result: str) -> None:
        super().__init__(result)
        self.result = result


class MachineCheck(Exception):
    """EWB read poisoned memory: on silicon a fatal machine check.

    Raised only with a :class:`~softsgx.defects.Defect` switched on.
    """
