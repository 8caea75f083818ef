"""Instructions on extended state that enclave code may not execute as this machine does.

They are UD2 in the code that is shown (:mod:`softsgx.engines.native.x86.forbidden`).  The thread
executes a copy out of line instead, with XFRM in its mask, where that does what the instruction
would do with XFRM in XCR0, faults included.  Otherwise the hardware model executes it.

Deviation: the header of XRSTOR is looked at before the copy is executed.  If another thread stores
there in between, state that XFRM does not have is ignored, where hardware may raise #GP.

Source:
    SDM vol. 3D, EENTER; vol. 1, "XSAVE", "XRSTOR": "RFBM"; the hardware model's ``extended_state``.
"""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES
from softsgx.engines.native.faults.faulting_instruction import LONGEST
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.vdso.out_of_line import OutOfLine
from softsgx.engines.native.x86.state import StateInsn, StateOperation, decode_state
from softsgx.hw import extended_state
from softsgx.hw.extended_state import SaveKind

__all__ = ["COPIES", "execute_by_model", "out_of_line", "replaced"]

_LOW_32 = 0xFFFF_FFFF
_REX_W = 8
_HEADER_AT, _HEADER_BYTES = 512, 64
_COMPACTED = 1 << 63

COPIES = {
    StateOperation.XSAVE: (b"\x0f\xae\x21", b"\x48\x0f\xae\x21"),
    StateOperation.XSAVEOPT: (b"\x0f\xae\x31", b"\x48\x0f\xae\x31"),
    StateOperation.XSAVEC: (b"\x0f\xc7\x21", b"\x48\x0f\xc7\x21"),
    StateOperation.XRSTOR: (b"\x0f\xae\x29", b"\x48\x0f\xae\x29"),
}
"""Each operation on the area at RCX, without and with REX.W."""

_KINDS = {
    StateOperation.XSAVE: SaveKind.XSAVE,
    StateOperation.XSAVEOPT: SaveKind.XSAVEOPT,
    StateOperation.XSAVEC: SaveKind.XSAVEC,
}


def replaced(thread: ProgramThread) -> StateInsn | None:
    """Return the instruction at RIP, registers loaded, if it is one that may not be executed."""
    image, rip = thread.image, thread.regs.rip
    memory = image.page_table.memory_at(rip)
    if memory is None or not image.page_table.is_shown(rip):
        return None
    marks, offset = memory.marked.get(rip & -PAGE_BYTES, ()), rip % PAGE_BYTES
    insn = decode_state(memory.read(rip, min(LONGEST, PAGE_BYTES - offset)))
    if insn is None:
        return None
    changed = offset + insn.opcode_at in marks or rip + insn.opcode_at in memory.trapped
    return insn if changed else None


def out_of_line(thread: ProgramThread, insn: StateInsn) -> OutOfLine | None:
    """Make ready how the thread executes it, on this processor and with the components of XFRM.

    The thread is inside, and its registers are loaded.  ``None``: the processor would do something
    else than with XFRM in XCR0.
    """
    cpu, image, regs = thread.cpu, thread.image, thread.regs
    assert cpu.inside is not None, "extended state of an enclave outside an enclave"
    enclave = cpu.inside.enclave
    if insn.operation is StateOperation.XGETBV:
        return None
    address, xfrm = insn.address(regs), enclave.xfrm
    moved = (regs.rax & _LOW_32 | (regs.rdx & _LOW_32) << 32) & xfrm & thread.areas.moved
    last = address + cpu.hw.config.xsave_bytes(xfrm) - 1
    # Memory of others has a meaning of its own for enclave code.
    if not enclave.covers(address) or not enclave.covers(last):
        return None
    if insn.operation is StateOperation.XRSTOR:
        if not _is_plain(image.read(address + _HEADER_AT, _HEADER_BYTES), xfrm, moved):
            return None
    elif moved and insn.operation is not StateOperation.XSAVEC:
        return None
    copy = COPIES[insn.operation][bool(insn.rex & _REX_W)]
    given = regs.rax & xfrm & _LOW_32, address, regs.rdx & xfrm >> 32
    return image.slots.fill(thread.tid, regs, insn.length, copy, given)


def execute_by_model(thread: ProgramThread, insn: StateInsn) -> None:
    """Let the hardware model execute it; the thread is inside, and its registers are loaded.

    Raises:
        Fault: as the instruction; registers are as before.
    """
    cpu, regs = thread.cpu, thread.regs
    cpu.flush_tlb()  # page tables may have lost entries since
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


def _is_plain(header: bytes, xfrm: int, moved: int) -> bool:
    """Return whether XRSTOR finds state of XFRM only behind this header, and where it looks for it.

    ``moved`` are those of its components that CPUID describes elsewhere: in the non-compacted form.
    """
    if len(header) < _HEADER_BYTES:
        return False
    held = int.from_bytes(header[:8], "little")
    form = int.from_bytes(header[8:16], "little")
    if (held | form & ~_COMPACTED) & ~xfrm:
        return False
    return bool(form & _COMPACTED) or not held & moved
