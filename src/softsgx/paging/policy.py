"""Policies: which pages are evicted, how many, when; and which pages are loaded ahead.

A policy is an argument of the core; Linux's is the default.  A policy sees accessed bits, through
``Reclaimable.age``, and the order in which pages were allocated or loaded.

Source:
    ``SGX_NR_TO_SCAN``, ``SGX_NR_LOW_PAGES``, ``SGX_NR_HIGH_PAGES``, main.c; ageing is ignored
    after failed passes as in the EPC cgroup series before v6.
"""

from __future__ import annotations

from collections.abc import Iterable

from softsgx.ondemand import dataclass
from softsgx.paging.interfaces import Reclaimable

__all__ = ["Clock", "Fifo", "LeastRecentlyUsed", "LinuxPolicy", "Policy", "Prefetching"]

_SCALE = 16  # a batch is at most this part of the EPC


@dataclass(frozen=True)
class Policy:
    """Linux's policy; a subclass changes parts of it.

    Attributes:
        batch_pages: pages that one batch evicts at most.
        scan_pages: pages that one batch scans at most.
        low_pages: fewer free pages than this wake ksgxd.
        high_pages: free pages at which ksgxd goes back to sleep.
        patience_passes: batches without a freed page after which accessed bits are ignored.
        evict_va: whether VA pages may be evicted.
    """

    batch_pages: int = 16
    scan_pages: int = 16
    low_pages: int = 32
    high_pages: int = 64
    patience_passes: int = 5
    evict_va: bool = True

    def low(self, epc_pages: int) -> int:
        """Return the low watermark of an EPC of that size, in pages."""
        # Deviation: Linux uses the constants for every size. In an EPC of a few dozen pages its
        # ksgxd would evict every page as soon as it was loaded.
        return max(1, min(self.low_pages, epc_pages // _SCALE))

    def high(self, epc_pages: int) -> int:
        """Return the high watermark of an EPC of that size, in pages."""
        return max(2, min(self.high_pages, epc_pages // _SCALE * 2))

    def batch(self, epc_pages: int) -> int:
        """Return how many pages one batch evicts at most."""
        return max(1, min(self.batch_pages, epc_pages // _SCALE))

    def old(self, owner: Reclaimable) -> bool:
        """Return whether an isolated page may be evicted; ``False`` puts it back on its list."""
        return owner.age()

    def neighbours(self, index: int, pages: int) -> Iterable[int]:
        """Yield indices to load with page ``index`` of an enclave of ``pages``, best first.

        The driver loads those that are evicted, as long as EPC pages are free.
        """
        return ()


class LinuxPolicy(Policy):
    """Linux's: scans the oldest 16 pages; those accessed since the last scan stay."""


class Fifo(Policy):
    """First in, first out: accessed bits are ignored.

    A kernel learns of an access only by a fault, so this is also "least recently used" without
    accessed bits.
    """

    def old(self, owner: Reclaimable) -> bool:
        """Return ``True``."""
        return True


@dataclass(frozen=True)
class LeastRecentlyUsed(Fifo):
    """Evicts the page that was not accessed for the longest time, one page a batch.

    It is exact where an engine sees every access and calls :meth:`EpcCore.mark_accessed`, as the
    replay of a trace does.  One page of the EPC stays free for the next fault.
    """

    batch_pages: int = 1
    low_pages: int = 1
    high_pages: int = 1
    evict_va: bool = False

    def high(self, epc_pages: int) -> int:
        """Return 1."""
        return self.high_pages


@dataclass(frozen=True)
class Clock(Policy):
    """The clock hand moves until it has found a whole batch of pages that were not accessed.

    Attributes:
        scan_pages: how far the hand goes for one batch.
    """

    scan_pages: int = 1024


@dataclass(frozen=True)
class Prefetching(Policy):
    """Loads the pages that follow the one asked for.

    Attributes:
        window_pages: how many.
    """

    window_pages: int = 4

    def neighbours(self, index: int, pages: int) -> Iterable[int]:
        """Return the next ``window_pages`` indices."""
        return range(index + 1, min(index + 1 + self.window_pages, pages))
