"""EPCM locks: what two leaves that overlap on a page do to each other.

A leaf takes its locks without waiting and gives them back when it ends; whoever finds a lock
taken gets the outcome of the concurrency table.  On cooperative runtimes taking a lock cannot be
interrupted; on threads a latch makes it atomic.

Source:
    SDM vol. 3D, "Concurrency and Leaf Functions", tables of base and additional restrictions.
"""

from __future__ import annotations

from softsgx.hw.enclave import Enclave
from softsgx.hw.epcm import EpcPage
from softsgx.runtime import Lock

__all__ = ["LatchedLocks", "PageLocks"]


class PageLocks:
    """Locks where only one leaf makes a step at a time."""

    def exclusive(self, page: EpcPage) -> bool:
        """Take the base lock alone; ``False`` when anyone holds it."""
        if page.lock:
            return False
        page.lock = -1
        return True

    def shared(self, page: EpcPage) -> bool:
        """Take the base lock with others; ``False`` when one leaf holds it alone."""
        if page.lock < 0:
            return False
        page.lock += 1
        return True

    def release(self, page: EpcPage) -> None:
        """Give one base lock back."""
        assert page.lock, f"{page!r} is not locked"
        page.lock = 0 if page.lock < 0 else page.lock - 1

    def restrict(self, page: EpcPage) -> bool:
        """Take lock A of a page: EACCEPT, EACCEPTCOPY, EMODPE, EMODPR, EMODT."""
        if page.lock_a:
            return False
        page.lock_a = True
        return True

    def measure(self, enclave: Enclave) -> bool:
        """Take lock B of an enclave: EADD, EEXTEND, EINIT.  Release by clearing ``lock_b``."""
        if enclave.lock_b:
            return False
        enclave.lock_b = True
        return True

    def track(self, enclave: Enclave) -> bool:
        """Take lock T of an enclave: ETRACK, ETRACKC, EWB.  Release by clearing ``lock_t``."""
        if enclave.lock_t:
            return False
        enclave.lock_t = True
        return True

    def count_child(self, enclave: Enclave, change: int) -> None:
        """Add to CHLDCNT."""
        enclave.children += change
        assert enclave.children >= 0, f"enclave {enclave.eid} has {enclave.children} children"


class LatchedLocks(PageLocks):
    """The same on real threads: each step under the machine's latch."""

    def __init__(self, latch: Lock) -> None:
        self._latch = latch

    def exclusive(self, page: EpcPage) -> bool:
        """As :meth:`PageLocks.exclusive`, atomically."""
        with self._latch:
            return super().exclusive(page)

    def shared(self, page: EpcPage) -> bool:
        """As :meth:`PageLocks.shared`, atomically."""
        with self._latch:
            return super().shared(page)

    def release(self, page: EpcPage) -> None:
        """As :meth:`PageLocks.release`, atomically."""
        with self._latch:
            super().release(page)

    def restrict(self, page: EpcPage) -> bool:
        """As :meth:`PageLocks.restrict`, atomically."""
        with self._latch:
            return super().restrict(page)

    def measure(self, enclave: Enclave) -> bool:
        """As :meth:`PageLocks.measure`, atomically."""
        with self._latch:
            return super().measure(enclave)

    def track(self, enclave: Enclave) -> bool:
        """As :meth:`PageLocks.track`, atomically."""
        with self._latch:
            return super().track(enclave)

    def count_child(self, enclave: Enclave, change: int) -> None:
        """As :meth:`PageLocks.count_child`, atomically."""
        with self._latch:
            super().count_child(enclave, change)
