"""A SECS without resident children, as the reclaimer sees it.

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
    """The :class:`~softsgx.paging.Reclaimable` of a SECS without resident children.

    Deviation: Linux evicts a SECS with its last child and never puts it on a list.  Here it is put
    on its list when that eviction failed, or when it was loaded for a page whose load then failed.

    Attributes:
        reservation: backing and VA slot while it is being evicted; else ``None``.
    """

    def __init__(self, swap: EnclaveSwap) -> None:
        self._swap = swap
        self.reservation: Reservation | None = None

    def get(self) -> bool:
        """Pin the enclave; ``False`` also when the SECS has a resident child."""
        return not self._swap.children and self._swap.pin.get()

    def put(self) -> None:
        """Unpin it."""
        self._swap.pin.put()

    def age(self) -> bool:
        """Return ``True``: no processor uses a SECS without resident children."""
        return True

    def prepare(self) -> bool:
        """Reserve backing and a VA slot, unless a child has become resident."""
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
        """EWB, unless the eviction was cancelled because a load needs the SECS."""
        swap = self._swap
        with swap.lock:
            reservation, self.reservation = self.reservation, None
            if reservation is None or swap.secs is None:
                return False
            return swap.write_secs(reservation)

    def cancel_eviction(self) -> None:
        """Keep the SECS resident for a load; the enclave's lock is held."""
        if self.reservation is not None:
            self._swap.cancel(self.reservation)
            self.reservation = None
