"""Fake owners of EPC pages with scripted results, which record their calls."""

from __future__ import annotations

from dataclasses import dataclass, field

from softsgx.arch import EpcAddr
from softsgx.paging import Lru, SgxEpcPage

__all__ = ["FakeOwner", "listed"]


@dataclass(eq=False)
class FakeOwner:
    """One page's owner.

    Attributes:
        log: receives ``name.call`` for each call.
        young: how many times ``age`` says that the page was used.
    """

    name: str
    log: list[str] = field(default_factory=list)
    dying: bool = False
    young: int = 0
    prepares: bool = True
    blocks: bool = True
    writes: bool = True
    pins: int = 0

    def _say(self, call: str) -> None:
        self.log.append(f"{self.name}.{call}" if self.name else call)

    def get(self) -> bool:
        self._say("get")
        self.pins += not self.dying
        return not self.dying

    def put(self) -> None:
        self._say("put")
        self.pins -= 1

    def age(self) -> bool:
        self._say("age")
        self.young -= 1
        return self.young < 0

    def prepare(self) -> bool:
        self._say("prepare")
        return self.prepares

    def block(self) -> bool:
        self._say("block")
        return self.blocks

    def write(self) -> bool:
        self._say("write")
        return self.writes


def listed(lru: Lru, *owners: FakeOwner) -> list[SgxEpcPage]:
    """Put a page of each owner on ``lru``, the first one oldest."""
    pages = []
    for number, owner in enumerate(owners):
        page = SgxEpcPage(EpcAddr(number * 4096), 0)
        page.owner = owner
        lru.add(page)
        pages.append(page)
    return pages
