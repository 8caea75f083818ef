"""Asynchronous enclave exit: what an event does to a processor that is inside an enclave.

It is no leaf.  It checks nothing and cannot fault: the entry has checked the SSA frame, and
tracking keeps the frame's pages in the EPC while a processor is inside.

Source:
    SDM vol. 3D, "Asynchronous Enclave Exit", Operation and "Synthetic State".
"""

from __future__ import annotations

import struct

from softsgx.arch import (
    EXINFO_BYTES,
    PAGE_BYTES,
    ExInfo,
    ExitType,
    GprSgx,
    MiscSelect,
    Pfec,
    Vector,
)
from softsgx.hw import cet, entry
from softsgx.hw.epcm import EpcPage
from softsgx.hw.events import AsynchronousExit
from softsgx.hw.faults import Fault, PageFault
from softsgx.hw.processor import EnclaveMode, LogicalProcessor

__all__ = ["RESCHEDULE_VECTOR", "aex", "deliver", "interrupt"]

RESCHEDULE_VECTOR = 0xFD
"""The default vector of an inter-processor interrupt."""

_FIRST_INTERRUPT = 32
_ALWAYS_REPORTED = frozenset(
    {
        *(Vector.DE, Vector.DB, Vector.BP, Vector.BR, Vector.UD),
        *(Vector.MF, Vector.AC, Vector.XM),
    }
)
# Faults push RFLAGS with RF set, so that an instruction breakpoint does not fire twice.
_FAULTS = frozenset(Vector) - {Vector.DB, Vector.NMI, Vector.BP, Vector.OF, Vector.DF, Vector.MC}
_ERRCD = int(Pfec.P | Pfec.W | Pfec.U | Pfec.RSVD | Pfec.I | Pfec.PK | Pfec.SS | Pfec.SGX)
_VALID = 1 << 31
_TF, _RF = 1 << 8, 1 << 16
_CLEARED = 0x0001_08D5  # CF PF AF ZF SF OF RF
_EXINFO_OFFSET = entry.GPR_OFFSET - EXINFO_BYTES
_GPRS = struct.Struct("<18Q")
_PAIR = struct.Struct("<QQ")
_DWORD = struct.Struct("<I")


def aex(
    cpu: LogicalProcessor, vector: int, code: int = 0, address: int = 0, *, vm_exit: bool = False
) -> None:
    """Leave the enclave for an event; afterwards ``cpu.regs`` holds the synthetic state.

    The caller then delivers the event as if the processor had been at the AEP; for #PF,
    ``cpu.cr2`` has the address without its low 12 bits.

    Args:
        cpu: a processor inside an enclave, at the instruction that did not complete.
        vector: of the exception, NMI (2) or interrupt (from 32).
        code: its error code; for #PF :class:`~softsgx.arch.Pfec` bits.
        address: for #PF, the linear address, exact.
        vm_exit: the event goes to a hypervisor instead of the guest; CR2 stays as it is.

    Source:
        SDM vol. 3D, "Asynchronous Enclave Exit", Operation.
    """
    with cpu.busy:
        assert cpu.inside is not None, "an asynchronous exit outside an enclave"
        cr2 = cpu.cr2
        _leave(cpu, cpu.inside, vector, code, address)
        if vm_exit:
            cpu.cr2 = cr2


def deliver(cpu: LogicalProcessor, fault: Fault) -> bool:
    """Deliver a fault: leave the enclave if the processor is in one, and set CR2.

    Returns:
        Whether an enclave was left.
    """
    address = fault.address if isinstance(fault, PageFault) else 0
    with cpu.busy:
        if cpu.inside is not None:
            _leave(cpu, cpu.inside, fault.vector, fault.code, address)
            return True
        if isinstance(fault, PageFault):
            cpu.cr2 = address
        return False


def interrupt(cpu: LogicalProcessor, vector: int = RESCHEDULE_VECTOR) -> bool:
    """Send an interrupt and wait until it is taken: an ENCLU in flight completes first.

    On a processor outside an enclave it has no effect here.

    Returns:
        Whether an enclave was left.
    """
    with cpu.busy:
        if cpu.inside is None:
            return False
        _leave(cpu, cpu.inside, vector, 0, 0)
        return True


def _leave(
    cpu: LogicalProcessor, inside: EnclaveMode, vector: int, code: int, address: int
) -> None:
    regs, hw = cpu.regs, cpu.hw
    gpr = inside.frame.gpr
    tcs = entry.read_tcs(cpu, inside.tcs)

    # 1. Save, through the pages that entry cached.
    plan = hw.xsave.plan(inside.enclave.xfrm)
    area = plan.save(regs.xsave)
    for offset, length in plan.spans:
        entry.write_frame(cpu, inside.frame, offset, area[offset : offset + length])
    _save_registers(cpu, gpr, vector)
    _save_reason(cpu, inside, vector, code, address)
    if inside.cet_slot is not None:
        cet.write_slot(cpu, inside.cet_slot)

    # 2. The synthetic state: no register keeps a value of the enclave.
    at = entry.GPR_OFFSET + GprSgx.OFFSETS["ursp"]
    ursp, urbp = _PAIR.unpack(hw.store.read(gpr, at, _PAIR.size))
    regs.rax, regs.rbx, regs.rcx = 3, inside.tcs_linaddr, tcs.aep
    regs.rdx = regs.rsi = regs.rdi = 0
    if cpu.mode64:
        regs.r8 = regs.r9 = regs.r10 = regs.r11 = regs.r12 = regs.r13 = regs.r14 = regs.r15 = 0
    regs.rsp, regs.rbp, regs.rip = ursp, urbp, tcs.aep
    regs.rflags &= ~_CLEARED
    regs.xsave = plan.initialise(regs.xsave, vector)

    # 3. Exit: the frame is in use now, so CSSA grows; ERESUME takes the frame at CSSA - 1.
    entry.write_cssa(cpu, inside.tcs, tcs.cssa + 1)
    entry.leave_enclave_mode(cpu)
    inside.enclave.crossings.aex += 1
    if vector == Vector.MC:
        inside.enclave.machine_check = True
    if vector == Vector.PF:
        cpu.cr2 = address & -PAGE_BYTES
    if hw.tracer is not None:
        number = int(vector) if vector < _FIRST_INTERRUPT else -1
        hw.tracer(AsynchronousExit(cpu.index, inside.enclave.eid, inside.tcs_linaddr, number))


def _save_registers(cpu: LogicalProcessor, page: EpcPage, vector: int) -> None:
    """Fill GPRSGX except URSP and URBP, which the entry wrote, and AEXNOTIFY."""
    regs, store = cpu.regs, cpu.hw.store
    rflags = regs.rflags & ~_TF
    if vector in _FAULTS:
        rflags |= _RF
    gprs = _GPRS.pack(
        *(regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi),
        *(regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15),
        *(rflags, regs.rip),
    )
    store.write(page, entry.GPR_OFFSET, gprs)
    bases = _PAIR.pack(regs.fs_base, regs.gs_base)
    store.write(page, entry.GPR_OFFSET + GprSgx.OFFSETS["fs_base"], bases)


def _save_reason(
    cpu: LogicalProcessor, inside: EnclaveMode, vector: int, code: int, address: int
) -> None:
    """Write EXITINFO, and EXINFO if MISCSELECT has it."""
    store, page = cpu.hw.store, inside.frame.gpr
    selected = inside.enclave.miscselect
    match vector:
        case Vector.GP:
            reported = bool(selected & MiscSelect.EXINFO)
        case Vector.PF:
            # A fault of supervisor code is not reported to the enclave.
            reported = bool(selected & MiscSelect.EXINFO and code & Pfec.U)
        case Vector.CP:
            reported = bool(selected & MiscSelect.CPINFO)
        case _:
            reported = vector in _ALWAYS_REPORTED
    exitinfo = 0
    if reported:
        kind = ExitType.SOFTWARE if vector == Vector.BP else ExitType.HARDWARE
        exitinfo = _VALID | kind << 8 | vector
        if vector in (Vector.GP, Vector.PF, Vector.CP) and selected & MiscSelect.EXINFO:
            exact = address if vector == Vector.PF else 0
            exinfo = ExInfo(maddr=exact, errcd=code & _ERRCD if vector == Vector.PF else code)
            store.write(page, _EXINFO_OFFSET, exinfo.pack())
    at = entry.GPR_OFFSET + GprSgx.OFFSETS["exitinfo"]
    store.write(page, at, _DWORD.pack(exitinfo))
