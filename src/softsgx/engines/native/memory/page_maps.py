"""Pages by linear address: a mapping to objects, and a set.

They are dict and set of integers, or types of the compiled core that need no integer for a page:
those hold addresses of pages alone, and yield them in ascending order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol, TypeVar, cast, overload

from softsgx import compiled

__all__ = ["PageMap", "PageSet", "page_map", "page_set"]

_T = TypeVar("_T")
_Default = TypeVar("_Default")


class PageMap(Collection[int], Protocol[_T]):
    """A mapping from addresses of pages; see the module."""

    @overload
    def get(self, page: int, /) -> _T | None: ...
    @overload
    def get(self, page: int, default: _T, /) -> _T: ...
    @overload
    def pop(self, page: int, /) -> _T: ...
    @overload
    def pop(self, page: int, default: _Default, /) -> _T | _Default: ...
    def clear(self) -> None:
        """Remove all pages."""

    def __getitem__(self, page: int, /) -> _T: ...
    def __setitem__(self, page: int, value: _T, /) -> None: ...
    def __delitem__(self, page: int, /) -> None: ...


class PageSet(Collection[int], Protocol):
    """A set of addresses of pages; see the module."""

    def add(self, page: int, /) -> None:
        """Add a page."""

    def discard(self, page: int, /) -> None:
        """Remove a page, if it is there."""

    def update(self, pages: Iterable[int], /) -> None:
        """Add pages."""

    def difference_update(self, pages: Iterable[int], /) -> None:
        """Remove pages, as far as they are there."""

    def clear(self) -> None:
        """Remove all pages."""


def page_map() -> PageMap[_T]:
    """Return an empty mapping."""
    return cast(PageMap[_T], _Map())


def page_set() -> PageSet:
    """Return an empty set."""
    return cast(PageSet, _Set())


_Map: type = dict
_Set: type = set
if compiled.speedups is not None:
    _Map, _Set = compiled.speedups.PageMap, compiled.speedups.PageSet
