"""EWB, ELDUC and ELDBC between EPC pages and the backing of one virtual EPC.

:class:`~softsgx.paging.SwapSpace` keeps the records, as for any owner.  A virtual EPC has no SECS:
each page may belong to another enclave of the guest.  Every method is called with the guest's lock
held, unless its docstring says otherwise.

Source:
    ``__sgx_virt_epc_write()``, ``sgx_virt_epc_page_load()``, arch/x86/kernel/cpu/sgx/virt.c of
    intel/kvm-sgx.
"""

from __future__ import annotations

from collections.abc import Callable

from softsgx.arch import Status
from softsgx.hw import PageInfoArgs
from softsgx.paging import LeafResult, LoadFailed, Reservation, SwapEntry, SwapSpace

__all__ = ["RunLeaf", "VepcSwap"]

RunLeaf = Callable[[Callable[[], Status]], LeafResult]
"""Executes a leaf of the host: :meth:`softsgx.kvm.monitor.Monitor.host_leaf`."""


class VepcSwap(SwapSpace):
    """The swapping of one virtual EPC."""

    def ewb(self, run: RunLeaf, addr: int, reservation: Reservation) -> tuple[LeafResult, int]:
        """EWB the page at ``addr`` once; the reservation stays valid.

        Returns:
            The code or fault; and on success the page's linear address, which EWB returns.
        """
        pinned, slot = reservation.pinned, reservation.slot
        assert pinned is not None, "a reservation without backing"
        info = PageInfoArgs(0, pinned.data, pinned.pcmd_bytes, 0)
        result = run(lambda: self._leaves.ewb(info, addr, slot.addr))
        if slot.accepted(result):
            return Status.SUCCESS, info.linaddr
        return result, 0

    def eld(
        self,
        run: RunLeaf,
        entry: SwapEntry,
        addr: int,
        *,
        linaddr: int,
        secs: int,
        blocked: bool,
    ) -> LeafResult:
        """ELDUC or ELDBC an evicted page into the free EPC page at ``addr``.

        Its VA page is resident: :meth:`load_va_page`.

        Returns:
            The code or fault; on success ``entry`` is invalid, otherwise nothing has changed.

        Raises:
            LoadFailed: the page is lost, or the backing store cannot read it.
        """
        slot = entry.slot
        if slot is None:
            raise LoadFailed("lost")
        pinned = self.pin_backing(entry)
        leaf = self._leaves.eldbc if blocked else self._leaves.elduc
        info = PageInfoArgs(linaddr, pinned.data, pinned.pcmd_bytes, secs)
        result = run(lambda: leaf(info, addr, slot.addr))
        if result is Status.SUCCESS:
            self.loaded(slot, pinned)
        else:
            self.not_loaded(pinned)
        return result
