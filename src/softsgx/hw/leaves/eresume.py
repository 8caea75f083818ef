"""ENCLU[ERESUME]: go back into an enclave after an asynchronous exit."""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES, GprSgx, TcsFlags, is_canonical
from softsgx.hw import cet, entry
from softsgx.hw.access import epc_operand
from softsgx.hw.epcm import EpcPage
from softsgx.hw.faults import GeneralProtection
from softsgx.hw.processor import LogicalProcessor, Registers
from softsgx.hw.space import READ

__all__ = ["eresume"]

_ALWAYS = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    "rip",
)
_MODE64 = ("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
# CF PF AF ZF SF DF OF NT AC ID RF come from the frame; TF is the debugger's, not the frame's.
_RESTORED = 0x0025_4CD5
_IF, _IOPL, _VM = 1 << 9, 3 << 12, 1 << 17


def eresume(cpu: LogicalProcessor, rbx: int, rcx: int) -> None:
    """Continue the thread of the TCS at ``rbx`` where its last asynchronous exit stopped it.

    If the thread asked to be notified (TCS.FLAGS.AEXNOTIFY, and bit 0 of the frame's AEXNOTIFY),
    it starts at its entry point on the next frame instead, as if by EENTER, and the frame of the
    exit stays in use until EDECCSSA.

    Args:
        cpu: the processor, outside an enclave; ``cpu.regs.rip`` is the address of the ENCLU.
        rbx: the TCS, 4096-byte aligned.
        rcx: AEP, where the next asynchronous exit goes.

    Raises:
        GeneralProtection: as for EENTER; or there is no frame to resume, or its RIP, bases or
            XSAVE area cannot be loaded.
        PageFault: as for EENTER.

    Source:
        SDM vol. 3D, "ERESUME", Operation.
    """
    if cpu.inside is not None:
        raise GeneralProtection

    # Operands
    entry.check_segments(cpu)
    if rbx % PAGE_BYTES:
        raise GeneralProtection
    page = epc_operand(cpu, rbx, READ, stores=True)
    if cpu.mode64 and not is_canonical(rcx):
        raise GeneralProtection

    with cpu.hw.leaf_locks() as locks:
        # Locks
        if not locks.shared(page):
            raise GeneralProtection
        with entry.Entry(cpu, page, rbx) as admitted:
            _check_and_commit(cpu, page, rbx, rcx, admitted)
            admitted.enclave.crossings.eresume += 1


def _check_and_commit(
    cpu: LogicalProcessor, page: EpcPage, rbx: int, rcx: int, admitted: entry.Entry
) -> None:
    # Checks: the TCS and the frame to resume; for a notification also the frame above it
    hw, secs, enclave = cpu.hw, admitted.secs, admitted.enclave
    tcs = entry.check_tcs(cpu, page, rbx, enclave)
    if not tcs.cssa:
        raise GeneralProtection
    index = tcs.cssa - 1
    frame = entry.find_frame(cpu, secs, enclave, entry.ssa_address(enclave, tcs, index))
    gpr = GprSgx.unpack(hw.store.read(frame.gpr, entry.GPR_OFFSET, GprSgx.SIZE))
    notify = bool(tcs.flags & TcsFlags.AEXNOTIFY and gpr.aexnotify & 1)
    if notify:
        if tcs.cssa >= tcs.nssa:
            raise GeneralProtection
        index = tcs.cssa
        frame = entry.find_frame(cpu, secs, enclave, entry.ssa_address(enclave, tcs, index))
    hw.point("ERESUME")

    # Checks: where the thread continues
    target = enclave.base + tcs.oentry if notify else gpr.rip
    fs_base, gs_base = enclave.base + tcs.ofs_base, enclave.base + tcs.ogs_base
    if cpu.mode64 and not notify:
        fs_base, gs_base = gpr.fs_base, gpr.gs_base
    entry.check_thread_segments(cpu, tcs, target, fs_base, gs_base)
    admitted.claim_tcs()
    slot = cet.find_slot(cpu, secs, enclave, tcs.ocetssa, index)

    # Commit of a notification
    if notify:
        entry.enter_enclave_mode(cpu, page, admitted, tcs, frame, slot, rcx, fs_base, gs_base)
        entry.start_at_entry_point(cpu, enclave, tcs, frame, target)
        return

    # Checks: the XSAVE area
    plan = hw.xsave.plan(enclave.xfrm)
    area = entry.read_frame(cpu, frame, plan.size)
    if not plan.legal(area):
        raise GeneralProtection

    # Commit of a plain resume
    entry.enter_enclave_mode(cpu, page, admitted, tcs, frame, slot, rcx, fs_base, gs_base)
    entry.write_cssa(cpu, page, index)
    cpu.regs.xsave = plan.restore(cpu.regs.xsave, area)
    _load_registers(cpu.regs, gpr, mode64=cpu.mode64)
    if slot is not None:
        cpu.ssp, cpu.u_cet = cet.read_slot(cpu, slot)
    elif cpu.cr4_cet:
        cpu.u_cet = 0


def _load_registers(regs: Registers, gpr: GprSgx, *, mode64: bool) -> None:
    for name in _ALWAYS + (_MODE64 if mode64 else ()):
        setattr(regs, name, getattr(gpr, name))
    mask = _RESTORED
    if regs.rflags & _IOPL == _IOPL:
        mask |= _IF
    regs.rflags = regs.rflags & ~(mask | _VM) | gpr.rflags & mask
