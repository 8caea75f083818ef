"""Pages by linear address: a mapping to objects, a set, and rights of pages.

The first two are dict and set of integers, or types of the compiled core that need no integer for a
page: those hold addresses of pages alone, and yield them in ascending order.

Rights are a byte a page, in blocks of 2 MiB of addresses.  Neighbours share a block, so that a page
which comes or goes changes a byte and no dictionary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, MutableMapping
from typing import Protocol, TypeVar, cast, overload

from softsgx import compiled
from softsgx.arch import PAGE_BYTES

__all__ = [
    "BLOCK_SHIFT",
    "INDEX_MASK",
    "INDEX_SHIFT",
    "PageMap",
    "PageRights",
    "PageSet",
    "page_map",
    "page_rights",
    "page_set",
]

BLOCK_SHIFT, INDEX_SHIFT, INDEX_MASK = 21, 12, 511
_BLOCK_BYTES = 1 << BLOCK_SHIFT
_EMPTY = bytes(INDEX_MASK + 1)
_FEW = 64


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


class PageRights(MutableMapping[int, int]):
    """A mapping from pages to their rights, which are not 0; see the module.

    Attributes:
        blocks: by linear address divided by 2 MiB, the rights of each page; 0: the page is not in
            the mapping.
    """

    __slots__ = ("_room", "blocks")

    def __init__(self) -> None:
        self.blocks: dict[int, bytearray] = {}
        self._room = _FEW  # blocks, until those without pages are dropped

    def __getitem__(self, linaddr: int) -> int:
        block = self.blocks.get(linaddr >> BLOCK_SHIFT, _EMPTY)
        rights = block[linaddr >> INDEX_SHIFT & INDEX_MASK]
        if not rights:
            raise KeyError(linaddr)
        return rights

    def __setitem__(self, linaddr: int, rights: int) -> None:
        assert rights, f"page {linaddr:#x} is there without rights"
        block = self.blocks.get(linaddr >> BLOCK_SHIFT)
        if block is None:
            block = self._new_block(linaddr)
        block[linaddr >> INDEX_SHIFT & INDEX_MASK] = rights

    def _new_block(self, linaddr: int) -> bytearray:
        """Make the block of a page; programs may have enclaves at ever new addresses."""
        if len(self.blocks) >= self._room:
            self.blocks = {at: block for at, block in self.blocks.items() if block != _EMPTY}
            self._room = 2 * len(self.blocks) + _FEW
        block = self.blocks[linaddr >> BLOCK_SHIFT] = bytearray(_EMPTY)
        return block

    def __delitem__(self, linaddr: int) -> None:
        block = self.blocks.get(linaddr >> BLOCK_SHIFT)
        if block is None or not block[linaddr >> INDEX_SHIFT & INDEX_MASK]:
            raise KeyError(linaddr)
        block[linaddr >> INDEX_SHIFT & INDEX_MASK] = 0

    def __iter__(self) -> Iterator[int]:
        return iter(self.within(0, 1 << 64))

    def __len__(self) -> int:
        return sum(len(block) - block.count(0) for block in self.blocks.values())

    def discard(self, linaddr: int) -> None:
        """Remove a page, if it is there."""
        block = self.blocks.get(linaddr >> BLOCK_SHIFT)
        if block is not None:
            block[linaddr >> INDEX_SHIFT & INDEX_MASK] = 0

    def within(self, start: int, end: int) -> dict[int, int]:
        """Return the rights of the pages in a range, huge and sparse perhaps, lowest first."""
        found: dict[int, int] = {}
        for number in sorted(self._blocks_within(start, end)):
            first = number << BLOCK_SHIFT
            low, high = max(first, start), min(first + _BLOCK_BYTES, end)
            block = self.blocks[number]
            for page in range(low, high, PAGE_BYTES):
                rights = block[page >> INDEX_SHIFT & INDEX_MASK]
                if rights:
                    found[page] = rights
        return found

    def _blocks_within(self, start: int, end: int) -> list[int]:
        """Return the numbers of the blocks that overlap a range."""
        first, behind = start >> BLOCK_SHIFT, (end - 1 >> BLOCK_SHIFT) + 1
        if behind - first < len(self.blocks):
            return [number for number in range(first, behind) if number in self.blocks]
        return [number for number in self.blocks if first <= number < behind]


def page_rights() -> PageRights:
    """Return an empty mapping, in the form that is in use."""
    return _Rights()


_Map: type = dict
_Set: type = set
_Rights = PageRights
if compiled.speedups is not None:
    _Map, _Set = compiled.speedups.PageMap, compiled.speedups.PageSet

    class CompiledPageRights(
        compiled.speedups.RightsMap,  # type: ignore[name-defined,misc]
        MutableMapping[int, int],
    ):
        """As :class:`PageRights`, in C; it has no :attr:`~PageRights.blocks`."""

        __slots__ = ()

    _Rights = cast(type[PageRights], CompiledPageRights)
    compiled.speedups.give("PageRights", CompiledPageRights)
