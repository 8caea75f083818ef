"""ENCLV[ESETCONTEXT]: name an enclave for its hypervisor."""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES, PageType, Status
from softsgx.hw.faults import GeneralProtection, PageFault
from softsgx.hw.operands import Ref, misaligned
from softsgx.hw.processor import LogicalProcessor

__all__ = ["esetcontext"]

_CONTEXT_BYTES = 8


def esetcontext(cpu: LogicalProcessor, rcx: int, rdx: Ref) -> Status:
    """Set the ENCLAVECONTEXT that ERDINFO and tracking-conflict VM exits report.

    Args:
        cpu: the processor it runs on.
        rcx: the SECS, 4096-byte aligned.
        rdx: the value, 8 bytes, 8-byte aligned.

    Returns:
        ``SUCCESS``, or ``EPC_PAGE_CONFLICT``: another leaf holds the page; nothing changed.

    Raises:
        GeneralProtection: an operand is misaligned.
        PageFault: ``rcx`` is no EPC page, or holds no SECS; or, without the SGX bit, the value
            cannot be read.

    Source:
        SDM vol. 3D, "ESETCONTEXT", Operation.
    """
    # Operands
    if rcx % PAGE_BYTES:
        raise GeneralProtection
    page = cpu.resolve(rcx)
    if misaligned(rdx, _CONTEXT_BYTES):
        raise GeneralProtection
    context = int.from_bytes(cpu.read(rdx, _CONTEXT_BYTES), "little")

    hw = cpu.hw
    with hw.leaf_locks() as locks:
        # Locks
        if not locks.shared(page):
            return Status.EPC_PAGE_CONFLICT
        hw.point("ESETCONTEXT")

        # Checks
        if not page.valid_as(PageType.SECS):
            raise PageFault(rcx)

        # Commit
        page.owner.context = context
        return Status.SUCCESS
