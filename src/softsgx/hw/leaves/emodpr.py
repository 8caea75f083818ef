"""ENCLS[EMODPR]: restrict the rights of an enclave page."""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES, PageType, SecInfo, SecInfoFlags, Status
from softsgx.hw.checks import secinfo_reserved_zero
from softsgx.hw.faults import GeneralProtection, PageFault
from softsgx.hw.operands import Ref, misaligned
from softsgx.hw.processor import LogicalProcessor

__all__ = ["emodpr"]

_R, _W, _RWX = int(SecInfoFlags.R), int(SecInfoFlags.W), int(SecInfoFlags.RWX)


def emodpr(cpu: LogicalProcessor, rbx: Ref | SecInfo, rcx: int) -> Status:
    """Take away every right of the page at ``rcx`` that SECINFO does not have.

    The page stays accessible with what is left; TLBs keep the old rights until their processors
    leave the enclave, which is what EACCEPT makes sure of.

    Args:
        cpu: the processor it runs on.
        rbx: SECINFO, 64-byte aligned; only R, W, X matter.
        rcx: a REG page, 4096-byte aligned.

    Returns:
        ``SUCCESS``.  Unchanged otherwise: ``EPC_PAGE_CONFLICT`` (another leaf changes its state),
        ``PAGE_NOT_MODIFIABLE`` (pending or modified).

    Raises:
        GeneralProtection: an operand is misaligned, SECINFO is not legal, the enclave is not
            initialised, or another leaf holds the page alone.
        PageFault: ``rcx`` is no EPC page, not in use, or no REG page.

    Source:
        SDM vol. 3D, "EMODPR", Operation.
    """
    # Operands
    if misaligned(rbx, SecInfo.ALIGN) or rcx % PAGE_BYTES:
        raise GeneralProtection
    page = cpu.resolve(rcx)
    secinfo = cpu.sec_info(rbx)
    rights = secinfo.flags & _RWX
    w_without_r = rights & _W and not rights & _R
    if not secinfo_reserved_zero(secinfo) or w_without_r:
        raise GeneralProtection

    hw = cpu.hw
    with hw.leaf_locks() as locks:
        # Locks, and the checks that come between them
        if not locks.shared(page):
            raise GeneralProtection
        if not page.valid:
            raise PageFault(rcx)
        if not locks.modify(page):
            return Status.EPC_PAGE_CONFLICT
        hw.point("EMODPR")

        # Checks
        if page.pending or page.modified:
            return Status.PAGE_NOT_MODIFIABLE
        if page.pt is not PageType.REG:
            raise PageFault(rcx)
        enclave = page.owner
        if not enclave.initialized:
            raise GeneralProtection

        # Commit: under the latch, since EBLOCK shares the page and writes its epoch too.
        with hw.latch:
            page.pr = True
            page.rwx &= rights
            page.bepoch = enclave.epoch
        return Status.SUCCESS
