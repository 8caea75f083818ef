"""Where the contents of hidden pages are: with the recorder, or in a finite EPC and behind it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from softsgx.engines.ordinary.contents import Contents

if TYPE_CHECKING:
    from softsgx.engines.ordinary.space import AddressSpace

__all__ = ["Pager", "Unlimited"]


class Pager(Protocol):
    """What an address space asks about the contents of its pages, which are addresses // 4096."""

    @property
    def is_finite(self) -> bool:
        """Whether present pages belong to the pager, and their place matters."""

    def opened(self, space: AddressSpace) -> None:
        """An address space is new."""

    def closed(self, space: AddressSpace) -> None:
        """An address space has ended."""

    def need(self, space: AddressSpace, page: int) -> None:
        """Have the content of a hidden page in ``hidden``: the program accesses it.

        A content that is as at first need not be there.

        Raises:
            SoftSgxError: there is no room for it.
        """

    def evicted(self, space: AddressSpace) -> Iterable[int]:
        """Return pages whose content is neither present nor in ``hidden``."""

    def forgotten(self, space: AddressSpace, page: int) -> bool:
        """The program has given up a content; return whether ``hidden`` keeps it all the same."""

    def take(self, space: AddressSpace, page: int) -> int | None:
        """Return the content of a hidden page, shared; ``None``: it is as at first."""

    def give(self, space: AddressSpace, page: int, content: int) -> None:
        """Give a hidden page another content."""

    def forked(self, space: AddressSpace) -> None:
        """Fork has made an address space, whose present pages are those that it has copied."""


class Unlimited:
    """All contents are with the recorder; see :class:`Pager` for the methods."""

    is_finite = False

    def __init__(self, contents: Contents) -> None:
        self._contents = contents

    def opened(self, space: AddressSpace) -> None:
        """Nothing to prepare."""

    def closed(self, space: AddressSpace) -> None:
        """Nothing to release."""

    def need(self, space: AddressSpace, page: int) -> None:
        """It is there."""

    def evicted(self, space: AddressSpace) -> Iterable[int]:
        """None are."""
        return ()

    def forgotten(self, space: AddressSpace, page: int) -> bool:
        """It is released."""
        return False

    def take(self, space: AddressSpace, page: int) -> int | None:
        """Share what ``hidden`` has."""
        content = space.hidden.get(page)
        if content is not None:
            self._contents.share(content)
        return content

    def give(self, space: AddressSpace, page: int, content: int) -> None:
        """Keep it in ``hidden``."""
        space.hidden[page] = content

    def forked(self, space: AddressSpace) -> None:
        """They stay present."""
