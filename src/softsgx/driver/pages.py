"""The pages of an enclave by index: eight bytes a page where the enclave is dense.

A dictionary has 36 to 68 bytes for each page.  Iteration is in the order of indices, as that of the
kernel's XArray is, and allows that pages are added or removed meanwhile.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, MutableMapping, ValuesView
from typing import TypeVar

from softsgx.driver.page import EnclavePage
from softsgx.paging.sparse import MASK, SHIFT

__all__ = ["EnclavePages"]

_T = TypeVar("_T")


class EnclavePages(MutableMapping[int, EnclavePage]):
    """See the module.

    Attributes:
        chunks: by ``index >> 7``, the pages of 128 indices; hot callers read them, to save calls.
        latest: of the compiled core: the chunk that it has used last.
    """

    __slots__ = ("_count", "chunks", "latest")

    def __init__(self) -> None:
        self.chunks: dict[int, list[EnclavePage | None]] = {}
        self._count = 0
        self.latest: object = None

    def get(self, index: int, default: _T | None = None) -> EnclavePage | _T | None:  # type: ignore[override]
        """Return a page; ``default``: the enclave has none at ``index``."""
        chunk = self.chunks.get(index >> SHIFT)
        page = None if chunk is None else chunk[index & MASK]
        return default if page is None else page

    def __getitem__(self, index: int) -> EnclavePage:
        page = self.get(index)
        if page is None:
            raise KeyError(index)
        return page

    def __setitem__(self, index: int, page: EnclavePage) -> None:
        chunk = self.chunks.get(index >> SHIFT)
        if chunk is None:
            chunk = self.chunks[index >> SHIFT] = [None] * (MASK + 1)
        if chunk[index & MASK] is None:
            self._count += 1
        chunk[index & MASK] = page

    def __delitem__(self, index: int) -> None:
        chunk = self.chunks.get(index >> SHIFT)
        if chunk is None or chunk[index & MASK] is None:
            raise KeyError(index)
        chunk[index & MASK] = None
        self._count -= 1
        if not any(chunk):
            self.latest = None
            del self.chunks[index >> SHIFT]

    def __contains__(self, index: object) -> bool:
        return isinstance(index, int) and self.get(index) is not None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        for index, _page in self._walk():
            yield index

    def values(self) -> ValuesView[EnclavePage]:
        """Return the pages."""
        return _Values(self)

    def items(self) -> ItemsView[int, EnclavePage]:
        """Return index and page of each page."""
        return _Items(self)

    def _walk(self) -> Iterator[tuple[int, EnclavePage]]:
        for high in sorted(self.chunks):
            for low, page in enumerate(self.chunks.get(high, ())):
                if page is not None:
                    yield high << SHIFT | low, page

    def drain(self) -> Iterator[EnclavePage]:
        """Yield every page; remove the pages of a chunk as it is reached, to free their memory."""
        for high in sorted(self.chunks):
            self.latest = None
            pages = [page for page in self.chunks.pop(high, ()) if page is not None]
            self._count -= len(pages)
            yield from pages

    def clear(self) -> None:
        """Remove every page."""
        self.latest = None
        self.chunks.clear()
        self._count = 0


class _Values(ValuesView[EnclavePage]):
    _mapping: EnclavePages

    def __iter__(self) -> Iterator[EnclavePage]:
        return (page for _index, page in self._mapping._walk())


class _Items(ItemsView[int, EnclavePage]):
    _mapping: EnclavePages

    def __iter__(self) -> Iterator[tuple[int, EnclavePage]]:
        return self._mapping._walk()
