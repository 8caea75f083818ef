"""The invariants of the EPC core: each EPC page is in exactly one place, each count is right."""

from __future__ import annotations

from collections.abc import Iterable

from softsgx.arch import PAGE_BYTES
from softsgx.paging.counters import Counters
from softsgx.paging.free_pages import FreePages
from softsgx.paging.lru import Lru
from softsgx.paging.nodes import Node
from softsgx.paging.page import SgxEpcPage
from softsgx.paging.sanitize import Sanitizer

__all__ = ["check_pages"]


def check_pages(
    *,
    pool: FreePages,
    dirty: Sanitizer,
    counters: Counters,
    idle: bool,
) -> None:
    """Count the EPC pages again from raw state, and compare.

    Args:
        pool: the page records, the free lists, and the free count.
        dirty: the pages that are not sanitized yet.
        counters: the counts of held and leaked pages.
        idle: whether no batch runs, so that every tracked page must be on a list.

    Raises:
        AssertionError: says which count or page is wrong.
    """
    records, nodes = pool.records, pool.nodes.values()
    epc_pages = sum(pool.node_pages().values())
    free, counted_free = _count_free(nodes), pool.count.value
    assert free == counted_free, f"free count is {counted_free}, the lists have {free}"
    quarantined = [page for node in nodes for page in node.quarantine]
    for page in quarantined:
        assert page.poisoned and page.free, f"{page!r} is in quarantine"
    assert len(set(quarantined)) == len(quarantined), "a page is in quarantine twice"

    held: list[SgxEpcPage] = []
    leaked: list[SgxEpcPage] = []
    kinds: dict[str, int] = {}
    for page in records.values():
        if page.leaked:
            leaked.append(page)
        elif page.group is not None:
            held.append(page)
            kinds[page.kind] = kinds.get(page.kind, 0) + 1
        else:
            continue
        assert not page.free, f"{page!r} is free and in use"
    counted = {kind: count for kind, count in counters.held.items() if count}
    assert counted == kinds, f"held counts are {counted}, recounted {kinds}"
    assert counters.leaked == len(leaked), f"{counters.leaked} leaked, recounted {len(leaked)}"

    total = free + len(quarantined) + len(held) + len(leaked) + dirty.pages()
    assert total == epc_pages, (
        f"{free} free + {len(quarantined)} in quarantine + {len(held)} held + {len(leaked)} leaked"
        f" + {dirty.pages()} dirty = {total}, the EPC has {epc_pages}"
    )
    _check_lists(held, idle=idle)


def _count_free(nodes: Iterable[Node]) -> int:
    """Count the free lists, and see that no page is on them twice."""
    spans = sorted(span for node in nodes for span in node.listed())
    end = 0
    for start, stop in spans:
        assert start >= end, f"page {start:#x} is on a free list twice"
        end = stop
    return sum(stop - start for start, stop in spans) // PAGE_BYTES


def _check_lists(held: list[SgxEpcPage], *, idle: bool) -> None:
    lists: set[Lru] = {page.group.lru for page in held if page.group is not None}
    entries = [page for lru in lists for page in lru]
    listed = set(entries)
    assert len(listed) == len(entries), "a page is on two lists"
    for page in held:
        where = page.lru
        assert page.tracked == (where is not None), f"{page!r}: tracked but on no list, or not"
        if page in listed:
            assert where is not None and page in where, f"{page!r} is on a list it does not name"
        else:
            assert not (page.tracked and idle), f"{page!r} is tracked, but on no list"
    stray = listed.difference(held)
    assert not stray, f"pages on a list that are not allocated: {stray}"
