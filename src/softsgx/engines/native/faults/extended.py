"""Instructions on extended state that enclave code may not execute as this machine does.

They are UD2 in the code that is shown (:mod:`softsgx.engines.native.x86.forbidden`); here software
executes them, with the enclave's XFRM for XCR0.

Source:
    SDM vol. 3D, EENTER; the hardware model's ``extended_state``.
"""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES
from softsgx.engines.native.faults.culprit import LONGEST
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.x86.state import StateInsn, StateOperation, decode_state
from softsgx.hw import extended_state
from softsgx.hw.extended_state import SaveKind

__all__ = ["execute", "replaced"]

_LOW_32 = 0xFFFF_FFFF
_REX_W = 8
_KINDS = {
    StateOperation.XSAVE: SaveKind.XSAVE,
    StateOperation.XSAVEOPT: SaveKind.XSAVEOPT,
    StateOperation.XSAVEC: SaveKind.XSAVEC,
}


def replaced(thread: ProgramThread) -> StateInsn | None:
    """Return the instruction at RIP, registers loaded, if it is one and UD2 is shown for it."""
    image, rip = thread.image, thread.regs.rip
    memory = image.space.memory_at(rip)
    marks = None if memory is None else memory.marked.get(rip & -PAGE_BYTES)
    if memory is None or not marks or not image.space.is_shown(rip):
        return None
    offset = rip % PAGE_BYTES
    insn = decode_state(memory.read(rip, min(LONGEST, PAGE_BYTES - offset)))
    return insn if insn is not None and offset + insn.opcode_at in marks else None


def execute(thread: ProgramThread, insn: StateInsn) -> None:
    """Execute it; the thread is inside, and its registers are loaded.

    Raises:
        Fault: as the instruction; registers are as before.
    """
    cpu, regs = thread.cpu, thread.regs
    cpu.flush_tlb()  # nobody tells it of what page tables have lost since
    wide = bool(insn.rex & _REX_W)
    requested = regs.rax & _LOW_32 | (regs.rdx & _LOW_32) << 32
    cpu.regs.xsave = thread.machine_xstate()
    match insn.operation:
        case StateOperation.XGETBV:
            value = extended_state.xgetbv(cpu, regs.rcx & _LOW_32)
            regs.rax, regs.rdx = value & _LOW_32, value >> 32
        case StateOperation.XRSTOR:
            extended_state.xrstor(cpu, insn.address(regs), requested, wide=wide)
            thread.set_machine_xstate(cpu.regs.xsave)
        case operation:
            kind = _KINDS[operation]
            extended_state.xsave(cpu, insn.address(regs), requested, kind, wide=wide)
    regs.rip += insn.length
    thread.store()
