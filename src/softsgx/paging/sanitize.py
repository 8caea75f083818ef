"""Sanitizing: EREMOVE of EPC pages that an earlier kernel may have left in use.

There are two passes.  EREMOVE refuses a SECS page that has children; the second pass frees the SECS
pages whose children the first pass has freed.  Pages become available one by one, while the system
runs.

Source:
    ``__sgx_sanitize_pages()`` and the start of ``ksgxd()``, main.c.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from softsgx.arch import PAGE_BYTES, EpcAddr, Status
from softsgx.hw import Fault
from softsgx.runtime import Runtime

__all__ = ["Sanitizer"]

_PAGES_PER_TURN = 32


class Sanitizer:
    """The dirty pages: they cannot be allocated before EREMOVE has freed them.

    Args:
        ranges: (start, end) addresses of the dirty pages.
        eremove: the leaf.
        clean: called with the address of each page that is free now, or poisoned.
        poisoned: returns whether a page is poisoned; EREMOVE is not executed on such a page.
        runtime: lets other tasks run.
        report_stopped: :attr:`Defect.STOPPED_SANITIZE_REPORTED`: pages that are left when the work
            is stopped are reported as a failure.
    """

    def __init__(
        self,
        ranges: Iterable[tuple[int, int]],
        *,
        eremove: Callable[[int], Status],
        clean: Callable[[EpcAddr], None],
        poisoned: Callable[[EpcAddr], bool],
        runtime: Runtime,
        report_stopped: bool = False,
    ) -> None:
        self._ranges = deque(list(pair) for pair in ranges)
        self._left: deque[EpcAddr] = deque()  # EREMOVE refused them in this pass
        self._current: EpcAddr | None = None
        self._eremove, self._clean, self._poisoned = eremove, clean, poisoned
        self._runtime = runtime
        self._report_stopped = report_stopped
        self._stopping = False

    def stop(self) -> None:
        """End :meth:`run` after the current page."""
        self._stopping = True

    def allow(self) -> None:
        """Let :meth:`run` work again after :meth:`stop`."""
        self._stopping = False

    def run(self) -> int:
        """Do both passes.

        Returns:
            How many pages are still dirty after the second pass; 0 when the work was stopped, which
            is no failure.
        """
        for _pass in range(2):
            for done, addr in enumerate(self._take_dirty(), 1):
                self._current = addr
                if self._poisoned(addr) or self._removed(addr):
                    self._clean(addr)
                else:
                    self._left.append(addr)
                self._current = None
                if done % _PAGES_PER_TURN == 0:
                    self._runtime.yield_now()
                if self._stopping:
                    return self.pages() if self._report_stopped else 0
        return self.pages()

    def _take_dirty(self) -> Iterator[EpcAddr]:
        """Yield every dirty page once; each is ``_current`` until the next one is yielded."""
        while self._ranges:
            pair = self._ranges[0]
            self._current = EpcAddr(pair[0])
            pair[0] += PAGE_BYTES
            if pair[0] == pair[1]:
                self._ranges.popleft()
            yield self._current
            if not self._ranges:
                return
        for _ in range(len(self._left)):
            self._current = self._left.popleft()
            yield self._current

    def _removed(self, addr: EpcAddr) -> bool:
        try:
            return self._eremove(addr) is Status.SUCCESS
        except Fault:
            return False

    def __contains__(self, addr: int) -> bool:
        if addr in self._left or addr == self._current:
            return True
        return any(start <= addr < end for start, end in self._ranges)

    def pages(self) -> int:
        """Return how many pages are still dirty."""
        ranged = sum(end - start for start, end in self._ranges) // PAGE_BYTES
        return len(self._left) + ranged + (self._current is not None)
