"""Free EPC pages: one list a NUMA node, and the walk over nodes when one is empty.

A page that was never allocated is part of a range and has no record; it gets one when it is first
taken.  So a terabyte of unused EPC is a handful of ranges.

Deviation: Linux keeps one list, first in, first out, so that a freed page comes last.  Here freed
pages are taken first, in the order in which they were freed: memory and time depend on the pages in
use, not on the size of the EPC.

Invariants: a poisoned page is never taken; ``free`` and ``poisoned`` of a record are written under
its node's latch.

Source:
    ``sgx_numa_nodes``, ``__sgx_alloc_epc_page()``, ``sgx_free_epc_page()``, main.c.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from softsgx.arch import PAGE_BYTES, EpcAddr
from softsgx.compiled import record
from softsgx.paging.page import SgxEpcPage
from softsgx.paging.page_list import PageQueue
from softsgx.runtime import Runtime

__all__ = ["AtomicCount", "Node", "TornCount", "walk_once", "walk_until_back"]


@record
class AtomicCount:
    """A number that several tasks add to."""

    __slots__ = (
        "_latch",
        "value",
    )

    def __init__(self, runtime: Runtime) -> None:
        self._latch = runtime.latch() if runtime.concurrent else None
        self.value = 0

    def add(self, change: int) -> None:
        """Add ``change``, atomically."""
        if self._latch is None:
            self.value += change
        else:
            with self._latch:
                self.value += change


class TornCount(AtomicCount):
    """:attr:`Defect.FREE_COUNT_WITHOUT_LOCK`: read and written back without a lock."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self._point = runtime.point

    def add(self, change: int) -> None:
        """Add ``change``; changes by other tasks at the same time are lost."""
        value = self.value
        self._point("free count")
        self.value = value + change


class _Range:
    """Pages that were never allocated, from ``next`` up to ``end``."""

    __slots__ = ("end", "next")

    def __init__(self, start: int, end: int) -> None:
        self.next, self.end = start, end


class Node:
    """The free pages of one NUMA node.

    Args:
        number: the node's number.
        runtime: for its latch.
        pages: all page records by address; shared by all nodes.

    Attributes:
        epc_pages: pages of all its sections.
        freed: pages that were in use, in the order in which they were freed; a page that was
            poisoned meanwhile is still among them.
        quarantine: poisoned pages that are not in use.
    """

    __slots__ = (
        "_fresh",
        "_latch",
        "_pages",
        "epc_pages",
        "freed",
        "number",
        "quarantine",
    )

    def __init__(self, number: int, runtime: Runtime, pages: dict[int, SgxEpcPage]) -> None:
        self.number = number
        self.epc_pages = 0
        self.quarantine: list[SgxEpcPage] = []
        self._latch = runtime.latch()
        self._pages = pages
        self.freed = PageQueue()
        self._fresh: deque[_Range] = deque()

    def take(self) -> SgxEpcPage | None:
        """Return the page that was freed first, or an unused one; ``None``: no page is free."""
        freed = self.freed
        self._latch.acquire()
        try:
            while freed:
                page = freed.popleft()
                # A poisoned page is in quarantine already; only its place in the queue remains.
                if not page.poisoned:
                    page.free = False
                    return page
            return self._take_fresh()
        finally:
            self._latch.release()

    def _take_fresh(self) -> SgxEpcPage | None:
        pages = self._pages
        while self._fresh:
            head = self._fresh[0]
            addr = head.next
            head.next += PAGE_BYTES
            if head.next == head.end:
                self._fresh.popleft()
            if addr not in pages:
                page = pages[addr] = SgxEpcPage(EpcAddr(addr), self.number)
                return page
            assert pages[addr].poisoned, f"{pages[addr]!r} has a record, but was never used"
        return None

    def give(self, page: SgxEpcPage) -> bool:
        """Put ``page`` at the tail, or into quarantine when it is poisoned.

        Returns:
            Whether it can be taken.
        """
        self._latch.acquire()
        try:
            assert not page.free, f"{page!r} is freed twice"
            page.free = True
            if page.poisoned:
                self.quarantine.append(page)
                return False
            self.freed.append(page)
            return True
        finally:
            self._latch.release()

    def give_clean(self, addr: EpcAddr) -> bool:
        """Put a sanitized page at the tail, as :meth:`give`."""
        with self._latch:
            page = self._pages.get(addr)
            if page is None:
                self._append_range(addr, addr + PAGE_BYTES)
                return True
            assert page.poisoned and not page.free, f"{page!r} is sanitized, but has a record"
            page.free = True
            self.quarantine.append(page)
            return False

    def give_fresh(self, start: int, end: int) -> None:
        """Put pages without a record at the tail: addresses ``start`` up to ``end``."""
        with self._latch:
            self._append_range(start, end)

    def _append_range(self, start: int, end: int) -> None:
        tail = self._fresh[-1] if self._fresh else None
        if tail is not None and tail.end == start:
            tail.end = end
        else:
            self._fresh.append(_Range(start, end))

    def poison(self, addr: EpcAddr, *, dirty: bool) -> tuple[SgxEpcPage, bool] | None:
        """Mark a page poisoned; a free one goes into quarantine.

        Args:
            addr: the page.
            dirty: whether it is still to be sanitized, so that without a record it is not free.

        Returns:
            Its record and whether it was free; ``None`` when it was poisoned before.
        """
        with self._latch:
            page = self._pages.get(addr)
            if page is None:
                page = self._pages[addr] = SgxEpcPage(addr, self.number)
                page.free = not dirty
            if page.poisoned:
                return None
            page.poisoned = True
            if page.free:
                self.quarantine.append(page)
            return page, page.free

    def listed(self) -> Iterable[tuple[int, int]]:
        """Yield (start, end) of all pages that can be taken; for checkers."""
        for page in list(self.freed):
            if not page.poisoned:
                yield page.addr, page.addr + PAGE_BYTES
        poisoned = sorted(page.addr for page in self.quarantine)
        for item in list(self._fresh):
            start = item.next
            for addr in poisoned:
                if start <= addr < item.end:
                    if start < addr:
                        yield start, addr
                    start = addr + PAGE_BYTES
            if start < item.end:
                yield start, item.end


Walk = Callable[[Sequence[Node], int], Iterable[Node]]


def walk_once(nodes: Sequence[Node], cpu_node: int) -> Iterable[Node]:
    """Return every node once, beginning with the processor's own or the next one that has EPC.

    Args:
        nodes: the nodes that have EPC, by number.
        cpu_node: the node of the calling processor.
    """
    start = next((at for at, node in enumerate(nodes) if node.number >= cpu_node), 0)
    return (*nodes[start:], *nodes[:start])


def walk_until_back(
    nodes: Sequence[Node], cpu_node: int, point: Callable[[str], None]
) -> Iterable[Node]:
    """:attr:`Defect.NODE_WALK_WITHOUT_END`: end only at ``cpu_node``, which may have no EPC."""
    at = next((at for at, node in enumerate(nodes) if node.number >= cpu_node), 0)
    while True:
        yield nodes[at]
        at = (at + 1) % len(nodes)
        point("NUMA walk")
        if nodes[at].number == cpu_node:
            return
