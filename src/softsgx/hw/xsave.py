"""XSAVE state: what an asynchronous exit stores in an SSA frame, and what ERESUME loads.

Pure functions over bytes in the non-compacted form.  A component whose XSTATE_BV bit is clear is
in its initial state, and its bytes mean nothing; MXCSR is the exception, which the standard form
carries in any case.

Source:
    SDM vol. 1, "XSAVE-managed state", "Operation of XSAVE", "Operation of XRSTOR"; vol. 3D,
    "Synthetic State on Asynchronous Enclave Exit".
"""

from __future__ import annotations

from softsgx.arch import XSAVE_LEGACY_BYTES, Vector, Xfrm
from softsgx.hw.config import MachineConfig
from softsgx.ondemand import dataclass

__all__ = ["XsaveLayout", "XsavePlan"]

_FCW_INIT = (0x037F).to_bytes(2, "little")
_HEADER = 512
_BV = slice(_HEADER, _HEADER + 8)
_MUST_BE_ZERO = slice(_HEADER + 8, _HEADER + 24)  # XCOMP_BV and the 8 bytes after it
_X87 = (slice(0, 24), slice(32, 160))
_MXCSR = slice(24, 32)  # with MXCSR_MASK
_XMM = slice(160, 416)
_MXCSR_RESERVED = 0xFFFF_0000


@dataclass(frozen=True, slots=True)
class XsavePlan:
    """The XSAVE layout of one XFRM.

    Attributes:
        xfrm: the components.
        size: bytes of the area.
        components: (number, offset, bytes) of the extended ones.
        spans: (offset, bytes) of what XSAVE writes, merged where they touch; bytes between
            them keep their values.
    """

    xfrm: int
    size: int
    components: tuple[tuple[int, int, int], ...]
    spans: tuple[tuple[int, int], ...]

    def save(self, xsave: bytes) -> bytes:
        """Return the area that XSAVE with this XFRM makes of a processor's state.

        Only the bytes in ``spans`` are defined.
        """
        state_bv = int.from_bytes(xsave[_BV], "little") & self.xfrm
        area = bytearray(self.size)
        self._copy(area, xsave, state_bv)
        area[_BV] = state_bv.to_bytes(8, "little")
        return bytes(area)

    def legal(self, area: bytes) -> bool:
        """Return whether XRSTOR with this XFRM takes ``area`` without #GP."""
        return (
            int.from_bytes(area[_BV], "little") & ~self.xfrm == 0
            and not any(area[_MUST_BE_ZERO])
            and int.from_bytes(area[24:28], "little") & _MXCSR_RESERVED == 0
        )

    def restore(self, xsave: bytes, area: bytes) -> bytes:
        """Return a processor's state after XRSTOR of a legal ``area``; ``xsave`` is it before."""
        state_bv = int.from_bytes(area[_BV], "little")
        return self._replaced(xsave, area, state_bv)

    def initialise(self, xsave: bytes, vector: int) -> bytes:
        """Return the synthetic state after an exit by ``vector``.

        Components outside XFRM keep their state.
        """
        area = bytearray(self.size)
        state_bv = int(Xfrm.SSE)  # MXCSR has not its reset value
        area[0:2] = _FCW_INIT
        area[24:28] = (0x1F01 if vector == Vector.XM else 0x1FB0).to_bytes(4, "little")
        area[28:32] = xsave[28:32]  # MXCSR_MASK is no state
        if vector == Vector.MF:
            state_bv |= Xfrm.X87
            area[0:4] = (0x8081_037E).to_bytes(4, "little")
        return self._replaced(xsave, area, state_bv)

    def _replaced(self, xsave: bytes, area: bytes | bytearray, state_bv: int) -> bytes:
        made = bytearray(xsave.ljust(self.size, b"\0"))
        self._copy(made, area, state_bv)
        kept_bv = int.from_bytes(xsave[_BV], "little") & ~self.xfrm
        made[_BV] = (kept_bv | state_bv).to_bytes(8, "little")
        return bytes(made)

    def _copy(self, to: bytearray, source: bytes | bytearray, state_bv: int) -> None:
        """Copy the components in ``state_bv`` and put the others of XFRM in initial state."""
        for place in _X87:
            length = place.stop - place.start
            to[place] = source[place] if state_bv & Xfrm.X87 else bytes(length)
        if not state_bv & Xfrm.X87:
            to[0:2] = _FCW_INIT
        to[_MXCSR] = source[_MXCSR]
        to[_XMM] = source[_XMM] if state_bv & Xfrm.SSE else bytes(256)
        for number, offset, length in self.components:
            held = source[offset : offset + length] if state_bv >> number & 1 else b""
            to[offset : offset + length] = held.ljust(length, b"\0")


class XsaveLayout:
    """The plans of one machine, made once for each XFRM."""

    def __init__(self, config: MachineConfig) -> None:
        self._config = config
        self._plans: dict[int, XsavePlan] = {}

    def plan(self, xfrm: int) -> XsavePlan:
        """Return where the components of ``xfrm`` are."""
        plan = self._plans.get(xfrm)
        if plan is None:
            plan = self._plans[xfrm] = self._make(xfrm)
        return plan

    def _make(self, xfrm: int) -> XsavePlan:
        components = tuple(
            (number, offset, length)
            for number, (length, offset) in sorted(self._config.xsave.items())
            if xfrm >> number & 1
        )
        spans = [(0, 416), (_HEADER, 24)]
        for _number, offset, length in sorted(components, key=lambda component: component[1]):
            start, held = spans[-1]
            if start + held == offset:
                spans[-1] = start, held + length
            else:
                spans.append((offset, length))
        size = self._config.xsave_bytes(xfrm)
        assert size >= XSAVE_LEGACY_BYTES, "an XSAVE area without its header"
        return XsavePlan(xfrm, size, components, tuple(spans))
