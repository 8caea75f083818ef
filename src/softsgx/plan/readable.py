"""The replacement policies of ``plan`` as their papers describe them; tests compare kernels to it.

Each function takes pages in order of access and a capacity in pages, and returns the misses.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Sequence

from softsgx.plan.scene import GOES, MOST_PAGES

__all__ = ["clock", "distances", "fifo", "lru", "opt", "s3fifo"]


def distances(pages: Sequence[int]) -> Counter[int]:
    """Return how many accesses have which LRU stack distance, -1 for first accesses."""
    stack: list[int] = []  # the page that was accessed last is first
    counts: Counter[int] = Counter()
    for page in pages:
        distance = stack.index(page) if page in stack else -1
        counts[distance] += 1
        if distance >= 0:
            del stack[distance]
        stack.insert(0, page)
    return counts


def lru(pages: Sequence[int], capacity: int) -> int:
    """Evict the page that was not accessed for the longest time; pages may go (``GOES``)."""
    resident: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for page in pages:
        if page >= GOES:
            resident.pop(page & MOST_PAGES - 1, None)
            continue
        if page in resident:
            resident.move_to_end(page)
            continue
        misses += 1
        if len(resident) == capacity:
            resident.popitem(last=False)
        resident[page] = None
    return misses


def fifo(pages: Sequence[int], capacity: int) -> int:
    """Evict the page that was loaded first."""
    queue: deque[int] = deque()
    misses = 0
    for page in pages:
        if page in queue:
            continue
        misses += 1
        if len(queue) == capacity:
            queue.popleft()
        queue.append(page)
    return misses


def clock(pages: Sequence[int], capacity: int) -> int:
    """Evict the oldest page that was not accessed since the hand passed it; load it unmarked.

    Source:
        F. J. Corbató, "A paging experiment with the Multics system" (1968).
    """
    queue: deque[int] = deque()  # the hand is at the left end
    accessed: dict[int, bool] = {}
    misses = 0
    for page in pages:
        if page in accessed:
            accessed[page] = True
            continue
        misses += 1
        if len(queue) == capacity:
            while accessed[queue[0]]:
                accessed[queue[0]] = False
                queue.rotate(-1)
            del accessed[queue.popleft()]
        queue.append(page)
        accessed[page] = False
    return misses


class _S3Fifo:
    """The three queues of S3-FIFO; the oldest page of each is the first.

    Attributes:
        uses: of each resident page since it was loaded, at most 3.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._small_pages = max(1, capacity // 10)
        self._main_pages = self._ghost_pages = capacity - self._small_pages
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._ghosts: deque[int] = deque()
        self.uses: dict[int, int] = {}

    def load(self, page: int) -> None:
        while len(self._small) + len(self._main) >= self._capacity:
            if len(self._small) >= self._small_pages:
                self._evict_from_small()
            else:
                self._evict_from_main()
        if page in self._ghosts:
            self._ghosts.remove(page)
            self._main.append(page)
        else:
            self._small.append(page)
        self.uses[page] = 0

    def _evict_from_small(self) -> None:
        while self._small:
            page = self._small.popleft()
            if self.uses[page] <= 1:
                del self.uses[page]
                self._ghosts.append(page)
                if len(self._ghosts) > self._ghost_pages:
                    self._ghosts.popleft()
                return
            full = len(self._main) >= self._main_pages
            if full:
                self._evict_from_main()
            self._main.append(page)
            if full:
                return

    def _evict_from_main(self) -> None:
        while self._main:
            page = self._main.popleft()
            if self.uses[page] == 0:
                del self.uses[page]
                return
            self.uses[page] -= 1
            self._main.append(page)


def s3fifo(pages: Sequence[int], capacity: int) -> int:
    """A small queue for new pages, a main queue, and ghosts of pages that left the small queue.

    The small queue has a tenth of the capacity, at least a page.  The queue of ghosts has as many
    entries as the main queue.

    Source:
        J. Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1.
    """
    queues = _S3Fifo(capacity)
    misses = 0
    for page in pages:
        if page in queues.uses:
            queues.uses[page] = min(queues.uses[page] + 1, 3)
        else:
            misses += 1
            queues.load(page)
    return misses


def opt(pages: Sequence[int], capacity: int) -> int:
    """Evict the page that will not be accessed for the longest time; no policy misses less.

    Source:
        L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM
        Systems Journal 5 (1966).
    """
    never = len(pages)
    next_use = [never] * len(pages)
    seen: dict[int, int] = {}
    for index in reversed(range(len(pages))):
        next_use[index] = seen.get(pages[index], never)
        seen[pages[index]] = index
    resident: dict[int, int] = {}  # page and when it is accessed next
    misses = 0
    for index, page in enumerate(pages):
        if page not in resident:
            misses += 1
            if len(resident) == capacity:
                del resident[max(resident, key=lambda other: resident[other])]
        resident[page] = next_use[index]
    return misses
