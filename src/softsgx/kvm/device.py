"""``/dev/sgx_vepc``: every virtual EPC of one machine, and what is left of closed ones.

Source:
    sgx_vepc_open(), sgx_vepc_release(), arch/x86/kernel/cpu/sgx/virt.c.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING

from softsgx.defects import Defect
from softsgx.kvm.vepc import Vepc
from softsgx.paging import BackingFile, EpcCore, MemoryBacking

if TYPE_CHECKING:
    from softsgx.kvm.monitor import Monitor
    from softsgx.kvm.page import VepcPage

__all__ = ["VepcDevice"]


def _memory(pages: int) -> BackingFile:
    return MemoryBacking()


class VepcDevice:
    """The device of one machine.

    Args:
        core: the EPC core.
        backing: makes the backing file of a virtual EPC.
        defects: those to switch on; it has the broken forms of package ``kvm``.

    Attributes:
        zombies: pages of files that are closed, which EREMOVE refused: SECS pages whose children
            are in files that are not closed.
        vepcs: every file of which something is left.
    """

    def __init__(
        self,
        core: EpcCore,
        *,
        backing: Callable[[int], BackingFile] = _memory,
        defects: frozenset[Defect] = frozenset(),
    ) -> None:
        self.core, self.backing = core, backing
        self.defects = defects
        self.zombies: list[VepcPage] = []
        self.vepcs: list[Vepc] = []
        self._numbers = count(1)

    def next_number(self) -> int:
        """Return a number for a guest, from 1."""
        return next(self._numbers)

    def open(self, monitor: Monitor, *, base: int = 0) -> Vepc:
        """Open it: one new, empty virtual EPC.

        Args:
            monitor: whose VMM opens it.
            base: guest-physical address at which the guest will see it.
        """
        return Vepc(self, monitor, base)

    def power_lost(self) -> None:
        """The machine has lost power and is back: every virtual EPC is empty.

        Called while no task runs, as a kernel's resume callback is.  Guests see what their own
        loss of power would show them; they go on.
        """
        for vepc in list(self.vepcs):
            with vepc.monitor.lock:
                vepc.power_lost()
        gone, self.zombies = self.zombies, []
        for page in gone:
            with page.vepc.monitor.lock:
                page.vepc.end()

    def retry_zombies(self) -> None:
        """See which zombies have lost their last child."""
        for page in list(self.zombies):
            monitor = page.vepc.monitor
            with monitor.lock, monitor.working():
                gone = page in self.zombies and page.vepc.remove(page)
                if gone:
                    self.zombies.remove(page)
                    page.vepc.end()
