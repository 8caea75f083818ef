"""Where the contents of hidden pages are: with the recorder, or in a finite EPC and its backing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from softsgx.engines.ordinary.contents import Contents

if TYPE_CHECKING:
    from softsgx.engines.ordinary.space import AddressSpace

__all__ = ["Pager", "Unlimited"]


class Pager(Protocol):
    """What an address space needs of the owner of its contents.  A page is an address // 4096."""

    @property
    def is_finite(self) -> bool:
        """Whether pages are in a finite EPC: then a page that moves has to be hidden before."""

    def opened(self, space: AddressSpace) -> None:
        """An address space is new."""

    def closed(self, space: AddressSpace) -> None:
        """An address space has ended."""

    def need(self, space: AddressSpace, page: int) -> None:
        """Put the content of a hidden page into ``hidden``: the program accesses the page.

        A page that was not written to may stay out of ``hidden``: zeros, or bytes of its file.

        Raises:
            SoftSgxError: there is no room for it.
        """

    def evicted(self, space: AddressSpace) -> Iterable[int]:
        """Return pages whose content is neither present nor in ``hidden``."""

    def forgotten(self, space: AddressSpace, page: int) -> bool:
        """The program has dropped a content; return whether it stays in ``hidden`` nevertheless."""

    def take(self, space: AddressSpace, page: int) -> int | None:
        """Return the content of a hidden page, shared; ``None``: its initial content."""

    def give(self, space: AddressSpace, page: int, content: int) -> None:
        """Give a hidden page another content."""

    def forked(self, space: AddressSpace) -> None:
        """Fork has made an address space; its present pages are those that fork has copied."""


class Unlimited:
    """The recorder has all contents; see :class:`Pager` for the methods."""

    is_finite = False

    def __init__(self, contents: Contents) -> None:
        self._contents = contents

    def opened(self, space: AddressSpace) -> None:
        """Nothing to prepare."""

    def closed(self, space: AddressSpace) -> None:
        """Nothing to release."""

    def need(self, space: AddressSpace, page: int) -> None:
        """Do nothing: ``hidden`` has every content."""

    def evicted(self, space: AddressSpace) -> Iterable[int]:
        """Return no pages: none are evicted."""
        return ()

    def forgotten(self, space: AddressSpace, page: int) -> bool:
        """Return ``False``: the content is released."""
        return False

    def take(self, space: AddressSpace, page: int) -> int | None:
        """Return the content in ``hidden``, shared."""
        content = space.hidden.get(page)
        if content is not None:
            self._contents.share(content)
        return content

    def give(self, space: AddressSpace, page: int, content: int) -> None:
        """Put the content into ``hidden``."""
        space.hidden[page] = content

    def forked(self, space: AddressSpace) -> None:
        """Do nothing: copied pages stay present."""
