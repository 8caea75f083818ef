"""The free EPC pages of all nodes, their count, and the poisoned pages.

Invariant: ``count`` is the number of pages that can be taken from the nodes, unless a defect is
switched on that breaks it.

Source:
    ``__sgx_alloc_epc_page()``, ``sgx_free_epc_page()``, ``sgx_page_cache_init()``, main.c.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from softsgx.arch import PAGE_BYTES, EpcAddr
from softsgx.defects import Defect
from softsgx.hw import EpcSection
from softsgx.paging.nodes import AtomicCount, Node, TornCount, Walk, walk_once, walk_until_back
from softsgx.paging.page import SgxEpcPage
from softsgx.runtime import Runtime

__all__ = ["FreePages"]


class FreePages:
    """The free pages of all nodes; none until they are given.

    Args:
        sections: the EPC sections.
        runtime: for latches.
        defects: those to switch on.

    Attributes:
        records: every page that was ever allocated or poisoned, by address.
        nodes: by number.
        count: pages that can be taken.
        latest: of the compiled core: a processor's node, and its first node with EPC.
    """

    __slots__ = (
        "_counts_poisoned",
        "_orders",
        "_sections",
        "_walk",
        "_walks_without_end",
        "count",
        "latest",
        "nodes",
        "records",
    )

    def __init__(
        self, sections: Sequence[EpcSection], runtime: Runtime, *, defects: frozenset[Defect]
    ) -> None:
        self._sections = sections
        self.latest: object = None
        self.records: dict[int, SgxEpcPage] = {}
        nodes: dict[int, Node] = {}
        for section in sections:
            if section.node not in nodes:
                nodes[section.node] = Node(section.node, runtime, self.records)
            nodes[section.node].epc_pages += section.pages
        self.nodes = dict(sorted(nodes.items()))
        self.count = (
            TornCount(runtime)
            if Defect.FREE_COUNT_WITHOUT_LOCK in defects
            else AtomicCount(runtime)
        )
        self._walks_without_end = Defect.NODE_WALK_WITHOUT_END in defects
        self._counts_poisoned = Defect.POISONED_PAGES_COUNTED_FREE in defects
        walk: Walk = walk_once
        if self._walks_without_end:
            walk = partial(walk_until_back, point=runtime.point)
        self._walk = walk
        self._orders: dict[int, tuple[Node, ...]] = {}

    # --- taking ---------------------------------------------------------------------------------

    def first(self, cpu_node: int) -> Node:
        """Return the node whose pages are taken first."""
        order = self._orders.get(cpu_node)
        return next(iter(self._order(cpu_node))) if order is None else order[0]

    def take(self, cpu_node: int) -> SgxEpcPage | None:
        """Return a page of the first node that has one; ``None``: no page is free."""
        for node in self._orders.get(cpu_node) or self._order(cpu_node):
            page = node.take()
            if page is not None:
                self.count.add(-1)
                return page
        return None

    def _order(self, cpu_node: int) -> Iterable[Node]:
        nodes = list(self.nodes.values())
        if self._walks_without_end:
            return self._walk(nodes, cpu_node)
        order = self._orders[cpu_node] = tuple(self._walk(nodes, cpu_node))
        return order

    # --- freeing --------------------------------------------------------------------------------

    def give(self, page: SgxEpcPage) -> None:
        """Free a page; a poisoned one goes into quarantine."""
        if self.nodes[page.node].give(page) or self._counts_poisoned:
            self.count.add(1)

    def give_clean(self, addr: EpcAddr) -> None:
        """Free a sanitized page; a poisoned one goes into quarantine."""
        section = self.section_of(addr)
        assert section is not None, f"sanitized {addr:#x} is no EPC page"
        if self.nodes[section.node].give_clean(addr):
            self.count.add(1)

    def give_all_but(self, dirty: Sequence[int]) -> None:
        """Free every page except those at the sorted addresses ``dirty``."""
        for section in self._sections:
            node = self.nodes[section.node]
            start, end = section.base, section.base + section.size
            for addr in [*(addr for addr in dirty if start <= addr < end), end]:
                if start < addr:
                    node.give_fresh(start, addr)
                    self.count.add((addr - start) // PAGE_BYTES)
                start = addr + PAGE_BYTES

    # --- poisoned pages -------------------------------------------------------------------------

    def poison(self, addr: EpcAddr, node: int, *, dirty: bool) -> tuple[SgxEpcPage, bool] | None:
        """As :meth:`Node.poison`; a free page is no longer counted."""
        found = self.nodes[node].poison(addr, dirty=dirty)
        if found is not None and found[1] and not self._counts_poisoned:
            self.count.add(-1)
        return found

    def is_poisoned(self, addr: EpcAddr) -> bool:
        """Return whether the page at ``addr`` is poisoned."""
        page = self.records.get(addr)
        return page is not None and page.poisoned

    def poisoned_pages(self) -> int:
        """Return how many pages are poisoned, counted from the records."""
        return sum(page.poisoned for page in list(self.records.values()))

    # --- nodes and sections ---------------------------------------------------------------------

    def node_pages(self) -> dict[int, int]:
        """Return how many pages each node has, free or not."""
        return {number: node.epc_pages for number, node in self.nodes.items()}

    def section_of(self, physical: int) -> EpcSection | None:
        """Return the section that a physical address is in."""
        sections = self._sections
        return next((s for s in sections if s.base <= physical < s.base + s.size), None)
