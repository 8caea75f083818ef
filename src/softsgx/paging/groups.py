"""The group of a core without limits: every page is charged to it, no charge is refused."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

from softsgx.paging.interfaces import Group
from softsgx.paging.lru import Lru
from softsgx.runtime import Runtime

__all__ = ["Ungrouped"]


class Ungrouped:
    """A :class:`~softsgx.paging.Group` without limits or children: one global LRU list."""

    def __init__(self, runtime: Runtime) -> None:
        self.lru = Lru(runtime)

    def try_charge(self) -> Group | None:
        """Return ``None``: no charge is refused."""
        return None

    def uncharge(self, pages: int = 1) -> None:
        """Do nothing."""

    def walk(self) -> Iterator[Group]:
        """Yield this group without end."""
        return repeat(self)

    def is_below(self, other: Group) -> bool:
        """Return whether ``other`` is this group."""
        return other is self

    def describe(self) -> str:
        """Return what limits it, for messages."""
        return "the EPC"

    def has_reclaimable(self) -> bool:
        """Return whether the list has a page."""
        return len(self.lru) > 0

    def reclaim_failed(self) -> bool:
        """Return ``False``: nothing can be killed."""
        return False
