"""XGETBV, XSAVE and XRSTOR inside an enclave know of the components in its XFRM, and of no others.

Method: a processor whose state has everything, in an enclave with XFRM 7.  That the bytes are the
real instructions' is for ``tests/differential/test_extended_state.py``.
"""

from __future__ import annotations

import pytest
from tests.support.threads import DATA, GP, Border, ended

from softsgx.hw.access import load, store
from softsgx.hw.extended_state import SaveKind, xgetbv, xrstor, xsave

XFRM = 7
EVERYTHING = 0x602E7
SIZE = 2816 + 8192
BV, FORM = 512, 520


class Scene:
    """A processor inside an enclave, and an area of ``5A`` in its memory."""

    def __init__(self) -> None:
        border = Border(xfrm=XFRM)
        self.cpu = border.cpu
        self.cpu.regs.xcr0 = EVERYTHING
        self.cpu.enclu.eenter(border.rbx, border.rcx)
        self.area = border.base + DATA
        state = bytearray(number * 7 % 251 for number in range(SIZE))
        state[24:28] = (0x1F80).to_bytes(4, "little")
        state[512:576] = EVERYTHING.to_bytes(8, "little") + bytes(56)
        self.cpu.regs.xsave = self.state = bytes(state)
        store(self.cpu, self.area, b"\x5a" * 512 + bytes(64) + b"\x5a" * (4096 - 576))

    def memory(self, start: int, end: int) -> bytes:
        return load(self.cpu, self.area + start, end - start)


def test_xcr0_is_xfrm() -> None:
    scene = Scene()
    assert xgetbv(scene.cpu, 0) == XFRM
    assert xgetbv(scene.cpu, 1) == XFRM
    assert ended(lambda: xgetbv(scene.cpu, 2)) == GP


@pytest.mark.parametrize("kind", SaveKind)
def test_no_component_outside_xfrm_is_saved(kind: SaveKind) -> None:
    scene = Scene()
    xsave(scene.cpu, scene.area, (1 << 64) - 1, kind)
    assert scene.memory(576, 832) == scene.state[576:832], "AVX state"
    assert scene.memory(832, 4096) == b"\x5a" * (4096 - 832), "behind it"
    assert int.from_bytes(scene.memory(BV, BV + 8), "little") == XFRM
    form = XFRM | 1 << 63 if kind is SaveKind.XSAVEC else 0
    assert int.from_bytes(scene.memory(FORM, FORM + 8), "little") == form


def test_components_that_are_not_requested_keep_memory_and_bit() -> None:
    scene = Scene()
    store(scene.cpu, scene.area + BV, (4).to_bytes(8, "little"))
    xsave(scene.cpu, scene.area, 2, SaveKind.XSAVE)
    assert int.from_bytes(scene.memory(BV, BV + 8), "little") == 6
    assert scene.memory(576, 832) == b"\x5a" * 256
    assert scene.memory(160, 416) == scene.state[160:416]
    assert scene.memory(32, 160) == b"\x5a" * 128, "x87"


def test_restoring_changes_what_is_requested_and_in_xfrm_only() -> None:
    scene = Scene()
    xsave(scene.cpu, scene.area, XFRM, SaveKind.XSAVE)
    store(scene.cpu, scene.area + 576, b"\x11" * 256)
    store(scene.cpu, scene.area + BV, (6).to_bytes(8, "little"))
    xrstor(scene.cpu, scene.area, (1 << 64) - 1)
    after = scene.cpu.regs.xsave
    assert after[576:832] == b"\x11" * 256
    assert after[0:2] == b"\x7f\x03", "x87 is in its initial state"
    assert after[832:] == scene.state[832:], "what XFRM does not have"
    assert int.from_bytes(after[BV : BV + 8], "little") == EVERYTHING & ~1


@pytest.mark.parametrize(
    ("at", "value"),
    [
        pytest.param(BV, 0x20, id="a component outside XFRM"),
        pytest.param(FORM, 1, id="XCOMP_BV of the standard form"),
        pytest.param(FORM + 8, 1, id="the eight bytes behind"),
        pytest.param(FORM, 1 << 63 | 0x20, id="compacted, a component outside XFRM"),
        pytest.param(24, 1 << 16 | 0x1F80, id="a reserved bit of MXCSR"),
    ],
)
def test_what_the_manual_forbids_is_refused(at: int, value: int) -> None:
    scene = Scene()
    xsave(scene.cpu, scene.area, XFRM, SaveKind.XSAVE)
    store(scene.cpu, scene.area + at, value.to_bytes(8, "little"))
    assert ended(lambda: xrstor(scene.cpu, scene.area, XFRM)) == GP
    assert scene.cpu.regs.xsave == scene.state, "nothing is loaded"


def test_areas_are_aligned() -> None:
    scene = Scene()
    assert ended(lambda: xrstor(scene.cpu, scene.area + 8, 7)) == GP
    assert ended(lambda: xsave(scene.cpu, scene.area + 8, 7, SaveKind.XSAVE)) == GP
