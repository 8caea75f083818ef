"""EPCM locks: what two leaves that overlap on a page do to each other.

A leaf takes its locks one by one, never waits for one, and releases all of them when it ends.  A
leaf that finds a lock taken ends with the outcome that the concurrency tables give for it.  On
cooperative runtimes no other task runs while a lock is taken; on threads the machine's latch makes
each step atomic.

Source:
    SDM vol. 3D, "Concurrency and Leaf Functions", tables of base and additional restrictions.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from softsgx.hw.epcm import EpcPage
from softsgx.runtime import Lock

if TYPE_CHECKING:
    from softsgx.hw.secs import ResidentSecs

__all__ = ["LatchedLeafLocks", "LeafLocks"]


class LeafLocks:
    """The locks that one leaf holds, on runtimes that run one task at a time.

    A context manager: its end releases every lock that the leaf has taken.  Each method takes one
    lock and returns whether it was free; a leaf takes each kind but the shared one at most once.
    """

    __slots__ = ("_measured", "_modified", "_pages", "_tracked")

    def __init__(self) -> None:
        self._pages: list[EpcPage] = []
        self._modified: EpcPage | None = None
        self._measured: ResidentSecs | None = None
        self._tracked: ResidentSecs | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._tracked is not None:
            self._tracked.tracking_lock = False
        if self._measured is not None:
            self._measured.measurement_lock = False
        if self._modified is not None:
            self._modified.modification_lock = False
        for page in self._pages:
            assert page.lock, f"{page!r} is not locked"
            page.lock = 0 if page.lock < 0 else page.lock - 1

    def exclusive(self, page: EpcPage) -> bool:
        """Take the base lock of a page alone; ``False`` while any leaf holds it."""
        if page.lock:
            return False
        page.lock = -1
        self._pages.append(page)
        return True

    def shared(self, page: EpcPage) -> bool:
        """Take the base lock of a page with others; ``False`` while one leaf holds it alone."""
        if page.lock < 0:
            return False
        page.lock += 1
        self._pages.append(page)
        return True

    def modify(self, page: EpcPage) -> bool:
        """Lock a page's state against EACCEPT, EACCEPTCOPY, EMODPE, EMODPR and EMODT."""
        if page.modification_lock:
            return False
        page.modification_lock = True
        self._modified = page
        return True

    def measure(self, enclave: ResidentSecs) -> bool:
        """Lock an enclave's measurement against EADD, EEXTEND and EINIT."""
        if enclave.measurement_lock:
            return False
        enclave.measurement_lock = True
        self._measured = enclave
        return True

    def track(self, enclave: ResidentSecs) -> bool:
        """Lock an enclave's tracking facility against ETRACK, ETRACKC and EWB."""
        if enclave.tracking_lock:
            return False
        enclave.tracking_lock = True
        self._tracked = enclave
        return True


class LatchedLeafLocks(LeafLocks):
    """The same on real threads: each step under the machine's latch."""

    __slots__ = ("_latch",)

    def __init__(self, latch: Lock) -> None:
        super().__init__()
        self._latch = latch

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._latch:
            super().__exit__(kind, error, traceback)

    def exclusive(self, page: EpcPage) -> bool:
        """As :meth:`LeafLocks.exclusive`, atomically."""
        with self._latch:
            return super().exclusive(page)

    def shared(self, page: EpcPage) -> bool:
        """As :meth:`LeafLocks.shared`, atomically."""
        with self._latch:
            return super().shared(page)

    def modify(self, page: EpcPage) -> bool:
        """As :meth:`LeafLocks.modify`, atomically."""
        with self._latch:
            return super().modify(page)

    def measure(self, enclave: ResidentSecs) -> bool:
        """As :meth:`LeafLocks.measure`, atomically."""
        with self._latch:
            return super().measure(enclave)

    def track(self, enclave: ResidentSecs) -> bool:
        """As :meth:`LeafLocks.track`, atomically."""
        with self._latch:
            return super().track(enclave)
