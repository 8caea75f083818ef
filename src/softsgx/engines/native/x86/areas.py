"""XSAVE areas in two layouts: this machine's own, and the one its CPUID describes to the program.

CPUID.0DH gives the offset of each component in the non-compacted form, and vendors have chosen
different ones.  SSA frames must have the layout of the CPUID that the program sees.

Source:
    SDM vol. 1, "XSAVE-managed state", "Standard Format".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["AreaLayouts", "Move"]

_EXTENDED = 576


class Move(NamedTuple):
    """A component that is elsewhere.

    Attributes:
        number: its bit in XCR0.
        size: bytes.
        real, described: its offsets on this machine and as the program sees it.
    """

    number: int
    size: int
    real: int
    described: int


class AreaLayouts:
    """Converts between the two layouts.

    Args:
        real: XSAVE component: (bytes, offset) on this machine.
        described: the same as the program sees it; the same components, as large.

    Attributes:
        moves: the components that are elsewhere.  The compacted form is the same in both.
        moved: the same as bits of XCR0.
        same: whether there are none.
        xcr0: the components that the program sees, as XCR0 has them.
    """

    def __init__(
        self, real: Mapping[int, tuple[int, int]], described: Mapping[int, tuple[int, int]]
    ) -> None:
        places = [
            (size, offset, described[number][1])
            for number, (size, offset) in real.items()
            if number in described
        ]
        self.moves = tuple(
            [
                Move(number, size, offset, described[number][1])
                for number, (size, offset) in real.items()
                if number in described and offset != described[number][1]
            ]
        )
        self.moved = sum(1 << move.number for move in self.moves)
        self.same = not self.moved
        self.xcr0 = 3 | sum(1 << number for number in described)  # x87 and SSE are always there
        self._places = places
        self._size = max((at + size for size, _real, at in places), default=_EXTENDED)

    def described(self, area: bytes) -> bytes:
        """Return an area of this machine as the program shall find it."""
        if self.same:
            return area
        made = bytearray(area[:_EXTENDED].ljust(self._size, b"\0"))
        for size, real_at, at in self._places:
            made[at : at + size] = area[real_at : real_at + size].ljust(size, b"\0")
        return bytes(made)

    def real(self, area: bytes, before: bytes) -> bytes:
        """Return ``before``, an area of this machine, with the state of a described area."""
        if self.same:
            return area
        made = bytearray(before)
        made[:_EXTENDED] = area[:_EXTENDED]
        for size, real_at, at in self._places:
            made[real_at : real_at + size] = area[at : at + size].ljust(size, b"\0")
        return bytes(made)
