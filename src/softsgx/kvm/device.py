"""``/dev/sgx_vepc``: every virtual EPC of one machine, and pages that remain after their file.

Source:
    sgx_vepc_open(), sgx_vepc_release(), arch/x86/kernel/cpu/sgx/virt.c.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING

from softsgx.defects import Defect
from softsgx.kvm.vepc import Vepc
from softsgx.paging import Backing, EpcCore, memory_backing

if TYPE_CHECKING:
    from softsgx.kvm.monitor import Monitor
    from softsgx.kvm.page import VepcPage

__all__ = ["VepcDevice"]


class VepcDevice:
    """The device of one machine.

    Args:
        core: the EPC core.
        backing: makes the backing file of a virtual EPC from its size in pages.
        defects: the defects to switch on; those of package ``kvm`` have an effect.

    Attributes:
        zombies: SECS pages of closed files that EREMOVE refused, since their children are in
            files that are still open.
        vepcs: the open files, and the closed ones that have zombies.
    """

    def __init__(
        self,
        core: EpcCore,
        *,
        backing: Callable[[int], Backing] = memory_backing,
        defects: frozenset[Defect] = frozenset(),
    ) -> None:
        self.core, self.backing = core, backing
        self.defects = defects
        self.zombies: list[VepcPage] = []
        self.vepcs: list[Vepc] = []
        self._numbers = count(1)

    def next_number(self) -> int:
        """Return an unused number for a guest, from 1."""
        return next(self._numbers)

    def open(self, monitor: Monitor, *, base: int = 0) -> Vepc:
        """Open the device: return a new, empty virtual EPC.

        Args:
            monitor: of the guest; its VMM opens the device.
            base: guest-physical address of its first page.
        """
        return Vepc(self, monitor, base)

    def power_lost(self) -> None:
        """Empty every virtual EPC after the machine has lost power.

        Called while no task runs, as a kernel's resume callback is.  Guests continue, and see the
        effects of their own loss of power.
        """
        for vepc in list(self.vepcs):
            with vepc.monitor.lock:
                vepc.power_lost()
        gone, self.zombies = self.zombies, []
        for page in gone:
            with page.vepc.monitor.lock:
                page.vepc.forget_if_empty()

    def retry_zombies(self) -> None:
        """Free the zombies that have no children any more."""
        for page in list(self.zombies):
            monitor = page.vepc.monitor
            with monitor.lock, monitor.host_working():
                gone = page in self.zombies and page.vepc.remove(page)
                if gone:
                    self.zombies.remove(page)
                    page.vepc.forget_if_empty()
