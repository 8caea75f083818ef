"""Isolating pages of a list: the compiled form against the readable one."""

from __future__ import annotations

from typing import Any

import pytest

from softsgx import compiled
from softsgx.arch import PAGE_BYTES
from softsgx.paging.lru import Lru
from softsgx.paging.optimised import CompiledReclaimer
from softsgx.paging.page import SgxEpcPage
from softsgx.paging.reclaim import Reclaimer
from softsgx.runtime import InlineRuntime

pytestmark = pytest.mark.skipif(compiled.speedups is None, reason="needs the compiled core")


class Owner:
    """Of a page; it is being destroyed if ``alive`` is false."""

    def __init__(self, alive: bool) -> None:
        self.alive, self.pins = alive, 0

    def get(self) -> bool:
        """Pin it, if it is alive."""
        self.pins += self.alive
        return self.alive


def isolate(reclaimer: Any, alive: str, count: int) -> tuple[object, ...]:
    """Isolate pages of owners, of which those with a 1 are alive; return what can be seen."""
    lru = Lru(InlineRuntime())
    pages: list[Any] = []
    for number, each in enumerate(alive):
        page: Any = SgxEpcPage(number * PAGE_BYTES, 0)  # type: ignore[arg-type]
        page.owner = Owner(each == "1")
        lru.add(page)
        pages.append(page)
    isolated, dying = reclaimer._isolate(object.__new__(reclaimer), lru, count)
    seen = [(page.tracked, page.lru is lru, page.owner.pins, page in lru) for page in pages]
    return [pages.index(page) for page in isolated], dying, seen, len(lru)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("alive", ["", "1", "0", "101", "0110", "000"])
def test_the_oldest_pages_are_isolated_and_those_of_dying_owners_dropped(
    alive: str, count: int
) -> None:
    assert isolate(CompiledReclaimer, alive, count) == isolate(Reclaimer, alive, count)


@pytest.mark.parametrize("reclaimer", [Reclaimer, CompiledReclaimer])
def test_a_page_without_an_owner_is_on_no_list(reclaimer: Any) -> None:
    lru = Lru(InlineRuntime())
    lru.add(SgxEpcPage(0, 0))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="has no owner"):
        reclaimer._isolate(object.__new__(reclaimer), lru, 1)
