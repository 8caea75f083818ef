"""How the core refuses: what its callers turn into errno values.

None of these is an ``OSError``: which errno a shortage becomes is for whoever speaks to user space
to say.  The usual one stands beside each.
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
    """There is no EPC page and none can be reclaimed: ENOMEM.  Its text says why."""


class EpcBusy(PagingError):
    """There is no EPC page now, but reclaim may make one; try again: EBUSY.

    Attributes:
        outcomes: how often there had been news by then; for :meth:`EpcCore.wait_for_page`.
        group: in whose subtree a page has to leave first; ``None`` is the root.
        pause: whether another thread has its turn, so that the way to wait is a short sleep.
    """

    def __init__(
        self, outcomes: int = -1, group: Group | None = None, *, pause: bool = False
    ) -> None:
        super().__init__("no EPC page is free now")
        self.outcomes, self.group, self.pause = outcomes, group, pause


class Interrupted(PagingError):
    """A signal is pending in a caller that would have had to reclaim: ERESTARTSYS."""


class BackingError(PagingError):
    """The backing file has no room or no such page, or its disk fails: ENOMEM."""


class LoadFailed(PagingError):
    """ELDU refused a page, or its bytes were lost before: EFAULT, and SIGBUS for the enclave.

    Attributes:
        result: the code's name in the manual, the fault, or ``lost``.
    """

    def __init__(self, result: str) -> None:
        super().__init__(result)
        self.result = result


class MachineCheck(Exception):
    """EWB read poisoned memory: on silicon a machine check that nobody survives.

    Only a machine with a defect switched on by name raises it.
    """
