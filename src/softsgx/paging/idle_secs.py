"""A SECS whose last child has gone, waiting for the reclaimer.

Lock order: the enclave's lock, as for any page of it.

Source:
    ``sgx_reclaimer_write()``, main.c, which evicts a SECS with its last child.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.paging.swapspace import Reservation

if TYPE_CHECKING:
    from softsgx.paging.swap import EnclaveSwap

__all__ = ["IdleSecs"]


class IdleSecs:
    """A SECS without resident children, to the reclaimer a page like any other.

    Linux never has one: it evicts a SECS with its last child.  Here it happens when that failed,
    or when a SECS was loaded for a page that then was not.

    Attributes:
        reservation: while it is about to leave.
    """

    def __init__(self, swap: EnclaveSwap) -> None:
        self._swap = swap
        self.reservation: Reservation | None = None

    def get(self) -> bool:
        """Pin the enclave; ``False`` also when the SECS is needed: it is listed again later."""
        return not self._swap.children and self._swap.pin.get()

    def put(self) -> None:
        """Unpin it."""
        self._swap.pin.put()

    def age(self) -> bool:
        """Return ``True``: nobody uses it."""
        return True

    def prepare(self) -> bool:
        """Reserve backing and a VA slot, unless a child has come."""
        swap = self._swap
        with swap.lock:
            if swap.children or swap.secs is None:
                return False
            self.reservation = swap.reserve_secs()
            return self.reservation is not None

    def block(self) -> bool:
        """Return ``True``: EBLOCK is not for SECS pages."""
        return True

    def write(self) -> bool:
        """EWB, unless somebody has needed it meanwhile."""
        swap = self._swap
        with swap.lock:
            reservation, self.reservation = self.reservation, None
            if reservation is None or swap.secs is None:
                return False
            return swap.write_secs(reservation)

    def cancel_eviction(self) -> None:
        """Somebody needs the SECS: give up evicting it; the enclave's lock is held."""
        if self.reservation is not None:
            self._swap.cancel(self.reservation)
            self.reservation = None
