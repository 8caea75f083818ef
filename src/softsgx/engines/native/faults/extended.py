"""Instructions on extended state that enclave code may not execute as this machine does.

They are UD2 in the code that is shown (:mod:`softsgx.engines.native.x86.forbidden`).  The thread
executes an instruction of the vDSO instead, with XFRM in its mask, where that cannot fault and does
what it would do with XFRM in XCR0.  Otherwise the hardware model executes it.

Source:
    SDM vol. 3D, EENTER; vol. 1, "XSAVE", "XRSTOR": "RFBM"; the hardware model's ``extended_state``.
"""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES
from softsgx.engines.native import abi
from softsgx.engines.native.faults.faulting_instruction import LONGEST
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.vdso.code import STATE_INSTRUCTIONS, STATE_STRIDE
from softsgx.engines.native.x86.state import StateInsn, StateOperation, decode_state
from softsgx.hw import READ, WRITE, extended_state
from softsgx.hw.extended_state import SaveKind

__all__ = ["execute", "replaced"]

_LOW_32 = 0xFFFF_FFFF
_REX_W = 8
_ALIGN, _HEADER_END = 64, 576
_MXCSR_RESERVED = 0xFFFF_0000
#: As ``vdso/code.py`` has them.
_ORDER = (
    StateOperation.XSAVE,
    StateOperation.XSAVEOPT,
    StateOperation.XSAVEC,
    StateOperation.XRSTOR,
)
_KINDS = {
    StateOperation.XSAVE: SaveKind.XSAVE,
    StateOperation.XSAVEOPT: SaveKind.XSAVEOPT,
    StateOperation.XSAVEC: SaveKind.XSAVEC,
}


def replaced(thread: ProgramThread) -> StateInsn | None:
    """Return the instruction at RIP, registers loaded, if it is one and UD2 is shown for it."""
    image, rip = thread.image, thread.regs.rip
    memory = image.page_table.memory_at(rip)
    marks = None if memory is None else memory.marked.get(rip & -PAGE_BYTES)
    if memory is None or not marks or not image.page_table.is_shown(rip):
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
    cpu.flush_tlb()  # page tables may have lost entries since
    wide = bool(insn.rex & _REX_W)
    requested = regs.rax & _LOW_32 | (regs.rdx & _LOW_32) << 32
    if insn.operation is not StateOperation.XGETBV and _by_thread(thread, insn, requested):
        regs.rip += insn.length
        thread.store()
        return
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


def _by_thread(thread: ProgramThread, insn: StateInsn, requested: int) -> bool:
    """Let the thread execute it on this processor, with the components of XFRM only.

    ``False``: it could fault, or do something else than with XFRM in XCR0; nothing has changed.
    """
    cpu, image = thread.cpu, thread.image
    assert cpu.inside is not None, "extended state of an enclave outside an enclave"
    xfrm, address = cpu.inside.enclave.xfrm, insn.address(thread.regs)
    loads = insn.operation is StateOperation.XRSTOR
    end = address + cpu.hw.config.xsave_bytes(xfrm)
    if address % _ALIGN or not thread.areas.same or end > abi.TASK_SIZE:
        return False
    rights = READ if loads else READ | WRITE
    pages = range(address & -PAGE_BYTES, end, PAGE_BYTES)
    if not all(_is_usable(thread, page, rights) for page in pages):
        return False
    if loads and not _is_plain(image.read(address, _HEADER_END), xfrm):
        return False
    for page in pages:
        image.pager.touched(page)  # a page that is watched for use may have no rights just now
    mask = requested & xfrm
    index = 2 * _ORDER.index(insn.operation) + bool(insn.rex & _REX_W)
    start = image.vdso_base + image.vdso.state + STATE_STRIDE * index
    size = len(bytes.fromhex(STATE_INSTRUCTIONS[index]))
    thread.borrow(start, start + size + 1, rax=mask & _LOW_32, rdx=mask >> 32, rcx=address)
    return True


def _is_usable(thread: ProgramThread, linaddr: int, rights: int) -> bool:
    """Return whether the enclave's page is there for such accesses, and will be for a while."""
    image, inside = thread.image, thread.cpu.inside
    entry = image.page_table.entry(linaddr)
    if entry is None or rights & ~entry[1] or image.is_covered(linaddr):
        return False
    page = thread.cpu.hw.page_at(entry[0])
    return (
        image.page_table.is_shown(linaddr)
        and page is not None
        and inside is not None
        and page.secs is inside.secs
        and not rights & ~page.rwx
    )


def _is_plain(area: bytes, xfrm: int) -> bool:
    """Return whether XRSTOR takes this legacy region and header, in the standard form."""
    held = int.from_bytes(area[512:520], "little")
    return (
        len(area) == _HEADER_END
        and not held & ~xfrm
        and not any(area[520:536])
        and not int.from_bytes(area[24:28], "little") & _MXCSR_RESERVED
    )
