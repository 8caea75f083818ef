"""Instructions of the vDSO that stand in for those of enclave code."""

from __future__ import annotations

import pytest

from softsgx.engines.native.abi import UserRegs
from softsgx.engines.native.faults.extended import _ORDER
from softsgx.engines.native.vdso.code import STATE_INSTRUCTIONS, STATE_STRIDE
from softsgx.engines.native.vdso.elf import build_vdso
from softsgx.engines.native.x86.state import decode_state


@pytest.mark.parametrize("index", range(len(STATE_INSTRUCTIONS)))
def test_each_instruction_is_the_operation_of_its_place_at_rcx(index: int) -> None:
    vdso = build_vdso({})
    at = vdso.state + STATE_STRIDE * index
    insn = decode_state(vdso.image[at : at + STATE_STRIDE])
    assert insn is not None and insn.operation is _ORDER[index // 2]
    assert bool(insn.rex & 8) == bool(index % 2)
    assert insn.address(UserRegs(rcx=0x1234_5678_9AC0)) == 0x1234_5678_9AC0
    assert vdso.image[at + insn.length] == 0xCC
