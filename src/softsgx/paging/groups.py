"""The group there is when nobody groups: everything is charged to it, nothing is refused."""

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
        """Charge nothing; never refuse."""
        return None

    def uncharge(self) -> None:
        """Nothing was charged."""

    def walk(self) -> Iterator[Group]:
        """Yield this group, for ever."""
        return repeat(self)

    def is_below(self, other: Group) -> bool:
        """Return whether ``other`` is this group."""
        return other is self

    def describe(self) -> str:
        """Return what it is."""
        return "the EPC"

    def has_reclaimable(self) -> bool:
        """Return whether the list has a page."""
        return len(self.lru) > 0

    def reclaim_failed(self) -> bool:
        """Return ``False``: nobody is killed."""
        return False
