"""Copies of instructions on extended state, which threads execute out of line."""

from __future__ import annotations

import pytest

from softsgx.engines.native.abi import UserRegs
from softsgx.engines.native.faults.extended import COPIES
from softsgx.engines.native.x86.state import StateOperation, decode_state


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("operation", COPIES)
def test_each_copy_is_the_operation_at_rcx(operation: StateOperation, wide: bool) -> None:
    copy = COPIES[operation][wide]
    insn = decode_state(copy)
    assert insn is not None and insn.operation is operation and insn.length == len(copy)
    assert bool(insn.rex & 8) == wide
    assert insn.address(UserRegs(rcx=0x1234_5678_9AC0)) == 0x1234_5678_9AC0
