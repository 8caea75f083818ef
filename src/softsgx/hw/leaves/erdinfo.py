"""ENCLS[ERDINFO]: what an EPC page is."""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES, PageType, Pfec, RdInfo, RdInfoFlags, RdInfoStatus, Status
from softsgx.hw.faults import GeneralProtection, PageFault
from softsgx.hw.operands import Ref, misaligned
from softsgx.hw.processor import LogicalProcessor

__all__ = ["erdinfo"]


def erdinfo(cpu: LogicalProcessor, rbx: Ref | RdInfo, rcx: int) -> Status:
    """Report type, rights, state and enclave context of the EPC page at ``rcx``.

    Args:
        cpu: the processor it runs on.
        rbx: RDINFO, 32-byte aligned, written on success.
        rcx: the page, 4096-byte aligned.

    Returns:
        ``SUCCESS``, ``PG_NONEPC`` (no EPC page), ``PG_INVLD`` (not in use), ``EPC_PAGE_CONFLICT``.

    Raises:
        GeneralProtection: an operand is misaligned.
        PageFault: without the SGX bit, paging refuses an operand.

    Source:
        SDM vol. 3D, "ERDINFO", Operation.
    """
    # Operands
    if misaligned(rbx, RdInfo.ALIGN) or rcx % PAGE_BYTES:
        raise GeneralProtection
    hw = cpu.hw
    try:
        page = cpu.resolve(rcx)
    except PageFault as fault:
        if fault.code & Pfec.SGX:
            return Status.PG_NONEPC
        raise
    with hw.leaf_locks() as locks:
        # Locks
        if not locks.shared(page):
            return Status.EPC_PAGE_CONFLICT
        hw.point("ERDINFO")

        # Checks
        if not page.valid:
            return Status.PG_INVLD

        # What RDINFO reports
        flags = page.secinfo_flags() | (RdInfoFlags.BLOCKED if page.blocked else 0)
        status = context = 0
        if page.pt is PageType.SECS:
            enclave = page.owner
            context = enclave.context
            virtual = RdInfoStatus.VIRTCHILDPRESENT
            if cpu.epc_virtualization:
                virtual = RdInfoStatus.CHILDPRESENT
            if enclave.children:
                status |= RdInfoStatus.CHILDPRESENT
            if enclave.virt_children:
                status |= virtual
        elif page.secs is not None:
            context = page.owner.context
        report = RdInfo(status=status, flags=flags, enclave_context=context)

    # Commit
    if isinstance(rbx, RdInfo):
        rbx.status, rbx.flags, rbx.enclave_context = (
            report.status,
            report.flags,
            report.enclave_context,
        )
    else:
        cpu.write(rbx, report.pack())
    return Status.SUCCESS
