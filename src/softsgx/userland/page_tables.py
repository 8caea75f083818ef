"""Page tables of a simulated machine: what ``hw`` walks, with accessed bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from softsgx.arch import PAGE_BYTES
from softsgx.driver import PROT_READ
from softsgx.hw import LogicalProcessor, PageTables, interrupt
from softsgx.runtime import Runtime

__all__ = ["MachineOrGuest", "SoftPageTable"]


class MachineOrGuest(Protocol):
    """What simulated processes run on: a :class:`softsgx.hw.Machine`, or a guest."""

    @property
    def cpus(self) -> Sequence[LogicalProcessor]:
        """Its processors."""

    @property
    def runtime(self) -> Runtime:
        """Its runtime."""

    def ram_read(self, physical: int, size: int) -> bytes:
        """Read its memory: EPC reads as ones."""

    def ram_write(self, physical: int, data: bytes) -> None:
        """Write its memory: EPC ignores the write."""

    def ram_discard(self, physical: int) -> None:
        """Free the memory of one ordinary page, which then reads as zero."""


class SoftPageTable(PageTables):
    """The page tables of one simulated process; give it to a processor as its ``space``.

    It holds the process' other pages too (:meth:`map`).

    Deviation: Linux flushes a page's translations when it removes its entry, and the interrupt
        makes every thread leave the enclave.  Here removing an entry only waits for instructions in
        flight; stale translations are harmless because of the tracking of the hardware.

    Args:
        machine: its processors may run it.
    """

    def __init__(self, machine: MachineOrGuest) -> None:
        super().__init__()
        self._machine = machine
        self._interleaves = machine.runtime.interleaves
        self._accessed: set[int] = set()

    def install(self, linaddr: int, epc_addr: int, prot: int) -> None:
        """As :meth:`Ptes.install`."""
        # No x86 entry can be written or executed, but not read.
        self._entries[linaddr] = epc_addr, prot | PROT_READ if prot else 0
        self._accessed.discard(linaddr)

    def zap(self, linaddr: int) -> None:
        """As :meth:`Ptes.zap`; an instruction that has read the entry completes first."""
        if self._entries.pop(linaddr, None) is None:
            return
        self._accessed.discard(linaddr)
        if self._interleaves:
            # A leaf that has read the entry must end before the EPC page is blocked: its fault
            # would find no entry to repair.
            for cpu in self._running():
                with cpu.busy:
                    pass

    def protect(self, start: int, end: int, prot: int) -> None:
        """As :meth:`Ptes.protect`."""
        rights = prot | PROT_READ if prot else 0
        for linaddr in [at for at in list(self._entries) if start <= at < end]:
            entry = self.entry(linaddr)
            if entry is not None:
                self.map(linaddr, entry[0], rights)

    def test_and_clear_accessed(self, linaddr: int) -> bool:
        """As :meth:`Ptes.test_and_clear_accessed`; an entry in the TLB hides accesses."""
        young = linaddr in self._accessed
        self._accessed.discard(linaddr)
        return young

    def zap_pages(self, linaddrs: list[int]) -> None:
        """As :meth:`Ptes.zap_pages`."""
        for linaddr in linaddrs:
            self.zap(linaddr)

    def test_and_clear_pages(self, linaddrs: list[int]) -> list[bool]:
        """As :meth:`Ptes.test_and_clear_pages`."""
        return [self.test_and_clear_accessed(linaddr) for linaddr in linaddrs]

    def kick(self) -> None:
        """As :meth:`Ptes.kick`."""
        for cpu in self._running():
            if not interrupt(cpu):
                with cpu.busy:
                    cpu.flush_tlb()

    def _running(self) -> list[LogicalProcessor]:
        return [cpu for cpu in self._machine.cpus if cpu.space is self]

    def translate(self, linaddr: int, access: int, *, user: bool) -> int:
        """As :meth:`AddressSpace.translate`; sets the accessed bit."""
        physical = super().translate(linaddr, access, user=user)
        self._accessed.add(linaddr & -PAGE_BYTES)
        return physical
