"""Copies of instructions on extended state, which threads execute out of line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from softsgx.engines.native.abi import UserRegs
from softsgx.engines.native.faults.extended import COPIES, out_of_line
from softsgx.engines.native.x86.state import StateOperation, decode_state


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("operation", COPIES)
def test_each_copy_is_the_operation_at_rcx(operation: StateOperation, wide: bool) -> None:
    copy = COPIES[operation][wide]
    insn = decode_state(copy)
    assert insn is not None and insn.operation is operation and insn.length == len(copy)
    assert bool(insn.rex & 8) == wide
    assert insn.address(UserRegs(rcx=0x1234_5678_9AC0)) == 0x1234_5678_9AC0


AREA, COMPACTED = 0x8000, 1 << 63
AMD = 0xE0  # AVX-512 is elsewhere


class Scene:
    """A thread in front of an instruction on the area at RCX, in an enclave with XFRM E7H."""

    def __init__(self, held: int = 0, form: int = 0, *, xfrm: int = 0xE7) -> None:
        self.regs = UserRegs(rax=0xFFFF_FFFF, rcx=AREA, rdx=0xFFFF_FFFF)
        header = held.to_bytes(8, "little") + form.to_bytes(8, "little") + bytes(48)
        enclave = SimpleNamespace(xfrm=xfrm, covers=lambda _address: True)
        config = SimpleNamespace(xsave_bytes=lambda _xfrm: 2688)
        self.given: tuple[int, int, int] | None = None
        self.thread: Any = SimpleNamespace(
            tid=1,
            regs=self.regs,
            areas=SimpleNamespace(moved=AMD),
            cpu=SimpleNamespace(
                inside=SimpleNamespace(enclave=enclave), hw=SimpleNamespace(config=config)
            ),
            image=SimpleNamespace(
                read=lambda _address, _size: header, slots=SimpleNamespace(fill=self.fill)
            ),
        )

    def fill(self, *arguments: Any) -> object:
        self.given = arguments[-1]
        return object()

    def executed(self, operation: StateOperation) -> bool:
        """Return whether the processor executes it."""
        insn = decode_state(COPIES[operation][True])
        assert insn is not None
        return out_of_line(cast(Any, self.thread), insn) is not None


SAVES = (StateOperation.XSAVE, StateOperation.XSAVEOPT)


@pytest.mark.parametrize(
    ("held", "form", "xfrm", "mask", "restored"),
    [
        (0, 0, 0xE7, 0xE7, True),
        (7, 0, 0xE7, 0xE7, True),
        (0x20, 0, 0xE7, 0xE7, False),
        (0xE7, 0, 0xE7, 0xE7, False),
        (0xE7, 0, 0xE7, 7, True),  # what is elsewhere is not loaded
        (0xE7, COMPACTED | 0xE7, 0xE7, 0xE7, True),
        (7, COMPACTED | 0x207, 0xE7, 0xE7, False),
        (8, 0, 0xE7, 0xE7, False),
        (7, 0, 7, 0xE7, True),
        (0x20, 0, 7, 0xE7, False),
    ],
)
def test_the_processor_executes_what_has_nothing_elsewhere(
    held: int, form: int, xfrm: int, mask: int, restored: bool
) -> None:
    scene = Scene(held, form, xfrm=xfrm)
    scene.regs.rax, scene.regs.rdx = mask | 0x5_0000_0000, 0
    assert scene.executed(StateOperation.XRSTOR) == restored
    assert scene.executed(StateOperation.XSAVEC)
    assert scene.given == (mask & xfrm, AREA, 0)
    for operation in SAVES:
        assert scene.executed(operation) == (not mask & xfrm & AMD)
