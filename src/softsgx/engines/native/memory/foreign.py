"""Ordinary memory that the program has mapped over pages of an enclave.

Enclave code that uses an address in ELRANGE takes #PF when no EPC page is there, even when other
memory is mapped there; code outside uses that memory.  So such memory loses every right in the
real page tables.  The supervisor then executes each instruction outside that uses it, one at a time
(see :mod:`softsgx.engines.native.faults.abort`).

Deviation: system calls fail with EFAULT on such memory.

Deviation: the supervisor finds only memory that mmap with MAP_FIXED or mremap has put over a
mapping of an enclave.  In a hole of ELRANGE that was never mapped, enclave code reads the ordinary
memory.

Source:
    SDM vol. 3D, "Access Control Requirements": a linear address in ELRANGE must be an EPC page.
"""

from __future__ import annotations

from collections.abc import Callable

from softsgx.engines.native import abi
from softsgx.engines.native.syscalls.registry import Device
from softsgx.ondemand import dataclass, replace

__all__ = ["ForeignMapping", "ForeignMappings"]


@dataclass(frozen=True, slots=True)
class ForeignMapping:
    """One range.

    Attributes:
        start: of the range.
        end: of the range.
        prot: PROT_* rights that the program asked for.
        device: the enclave that was mapped there.
    """

    start: int
    end: int
    prot: int
    device: Device


class ForeignMappings:
    """The foreign memory of one address space.

    Args:
        inject: makes the program execute system calls.
        known: ranges that the address space has from its start, after a fork.
    """

    def __init__(
        self,
        inject: Callable[[list[tuple[int, ...]]], None],
        known: tuple[ForeignMapping, ...] = (),
    ) -> None:
        self._inject = inject
        self.ranges = list(known)

    def find(self, linaddr: int) -> ForeignMapping | None:
        """Return the range that holds an address."""
        for each in self.ranges:
            if each.start <= linaddr < each.end:
                return each
        return None

    def within(self, start: int, end: int) -> list[ForeignMapping]:
        """Return the ranges that overlap ``[start, end)``, cut to it."""
        return [
            replace(each, start=max(each.start, start), end=min(each.end, end))
            for each in self.ranges
            if each.start < end and start < each.end
        ]

    def place(self, ranges: list[ForeignMapping]) -> None:
        """Memory is mapped at these ranges: take its rights away."""
        for each in ranges:
            self.forget(each.start, each.end)
        self.ranges += ranges
        self._protect([(each.start, each.end, abi.PROT_NONE) for each in ranges if each.prot])

    def forget(self, start: int, end: int) -> None:
        """The range holds no foreign memory any more."""
        kept = []
        for each in self.ranges:
            if each.start < start:
                kept.append(replace(each, end=min(each.end, start)))
            if end < each.end:
                kept.append(replace(each, start=max(each.start, end)))
        self.ranges = [each for each in kept if each.start < each.end]

    def give_back(self, start: int, end: int) -> None:
        """Return its rights to a range that is no enclave's any more, or is about to be moved."""
        parts = self.within(start, end)
        self.forget(start, end)
        self._protect([(each.start, each.end, each.prot) for each in parts if each.prot])

    def lift(self, page: int, prot: int) -> None:
        """Give one page ``prot`` until :meth:`lower`."""
        self._protect([(page, page + abi.PAGE, prot)])

    def lower(self, page: int) -> None:
        """Take the rights of a page away again."""
        self._protect([(page, page + abi.PAGE, abi.PROT_NONE)])

    def _protect(self, ranges: list[tuple[int, int, int]]) -> None:
        if ranges:
            self._inject(
                [(abi.SYS_MPROTECT, start, end - start, prot) for start, end, prot in ranges]
            )
