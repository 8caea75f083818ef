"""Backing and VA slots of one virtual EPC: EWB out, ELDUC or ELDBC in.

The bookkeeping is an enclave's (:class:`~softsgx.paging.EnclaveSwap`), but there is no SECS of
one's own: whose enclave a page belongs to differs from page to page.  Every method is called with
the guest's lock held, unless it says otherwise.

Source:
    ``__sgx_virt_epc_write()``, ``sgx_virt_epc_page_load()``, arch/x86/kernel/cpu/sgx/virt.c of
    intel/kvm-sgx.
"""

from __future__ import annotations

from collections.abc import Callable

from softsgx.arch import Status
from softsgx.hw import Fault, PageInfoArgs
from softsgx.paging import BackingError, Claim, EnclaveSwap, LoadFailed, Reservation, SwapEntry

__all__ = ["Run", "VepcSwap"]

Run = Callable[[Callable[[], Status]], Status | Fault]
"""Executes a leaf of the host: :meth:`softsgx.kvm.monitor.Monitor.leaf`."""


class VepcSwap(EnclaveSwap):
    """One virtual EPC's half of paging; what is not here is as for enclaves."""

    def write_out(
        self, run: Run, addr: int, reservation: Reservation
    ) -> tuple[Status | Fault, int]:
        """EWB the page at ``addr`` once.

        Returns:
            The code or fault; and on success the page's linear address, which EWB tells.
        """
        pinned, slot = reservation.pinned, reservation.slot
        assert pinned is not None, "a reservation without backing"
        info = PageInfoArgs(0, pinned.content.data, pinned.pcmd_bytes, 0)
        ending = run(lambda: self._leaves.ewb(info, addr, slot.addr))
        if slot.accepted(ending):
            return Status.SUCCESS, info.linaddr
        return ending, 0

    def written(self, reservation: Reservation) -> SwapEntry:
        """EWB has succeeded: end the reservation."""
        assert reservation.pinned is not None, "a reservation without backing"
        self._file.written(reservation.pinned)
        self.va.keep(reservation.slot)
        return SwapEntry(reservation.index, reservation.slot)

    def read_in(
        self,
        run: Run,
        entry: SwapEntry,
        addr: int,
        *,
        linaddr: int,
        secs: int,
        blocked: bool,
    ) -> Status | Fault:
        """ELDUC or ELDBC an evicted page into the free EPC page at ``addr``; see :meth:`fetch_va`.

        Returns:
            The code or fault; on success ``entry`` is spent, otherwise nothing has changed.

        Raises:
            LoadFailed: its backing is gone.
        """
        slot = entry.slot
        assert slot is not None, "a page without a version is loaded"
        try:
            pinned = self._file.open(entry.index)
        except BackingError as error:
            raise LoadFailed(str(error)) from error
        leaf = self._leaves.eldbc if blocked else self._leaves.elduc
        info = PageInfoArgs(linaddr, pinned.content.data, pinned.pcmd_bytes, secs)
        ending = run(lambda: leaf(info, addr, slot.addr))
        if ending is Status.SUCCESS:
            self._file.loaded(pinned)
            self.va.emptied(slot)
            self._counters.eldu += 1
        else:
            self._file.close(pinned)
            self._counters.eldu_failed += 1
        return ending

    def fetch_va(self, entry: SwapEntry, claim: Claim | None) -> None:
        """Make the VA page of an evicted page resident.

        Raises:
            EpcBusy, NoEpc: no EPC page for it now, or at all.
            LoadFailed: it cannot be loaded.
        """
        if entry.slot is None:
            raise LoadFailed("lost")
        self.va.bring_in(entry.slot.page, claim)
