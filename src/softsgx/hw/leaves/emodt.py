"""ENCLS[EMODT]: change the type of an enclave page."""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES, SHADOW_STACK_TYPES, PageType, SecInfo, Status
from softsgx.hw.checks import secinfo_reserved_zero
from softsgx.hw.faults import GeneralProtection, PageFault
from softsgx.hw.operands import Ref, misaligned
from softsgx.hw.processor import LogicalProcessor

__all__ = ["emodt"]

_TARGETS = {int(pt): pt for pt in (PageType.TCS, PageType.TRIM)}
_TRIMMABLE = SHADOW_STACK_TYPES | {PageType.TCS}


def emodt(cpu: LogicalProcessor, rbx: Ref | SecInfo, rcx: int) -> Status:
    """Make the page at ``rcx`` a TCS or a trimmed page; its enclave accepts that with EACCEPT.

    Args:
        cpu: the processor it runs on.
        rbx: SECINFO, 64-byte aligned, of type TCS or TRIM.
        rcx: a REG page, or one of another type that is to be trimmed; 4096-byte aligned.

    Returns:
        ``SUCCESS``.  Unchanged otherwise: ``EPC_PAGE_CONFLICT`` (another leaf holds the page),
        ``PAGE_NOT_MODIFIABLE`` (pending or modified).

    Raises:
        GeneralProtection: an operand is misaligned, SECINFO is not legal, or the enclave is not
            initialised.
        PageFault: ``rcx`` is no EPC page, not in use, or of a type that cannot become this one.
        VmExit: in a guest with EPC virtualization, when another leaf holds the page.

    Source:
        SDM vol. 3D, "EMODT", Operation.
    """
    # Operands
    if misaligned(rbx, SecInfo.ALIGN) or rcx % PAGE_BYTES:
        raise GeneralProtection
    page = cpu.resolve(rcx)
    secinfo = cpu.sec_info(rbx)
    target = _TARGETS.get(secinfo.page_type)
    if not secinfo_reserved_zero(secinfo) or target is None:
        raise GeneralProtection

    hw = cpu.hw
    with hw.leaf_locks() as locks:
        # Locks, and the checks that come between them
        if not locks.exclusive(page):
            return cpu.conflict_error(rcx)
        if not page.valid:
            raise PageFault(rcx)
        # EACCEPTCOPY and EMODPE take this lock without the page's base lock.
        if not locks.modify(page):
            return Status.EPC_PAGE_CONFLICT
        hw.point("EMODT")

        # Checks
        trimming = target is PageType.TRIM and page.pt in _TRIMMABLE
        if page.pt is not PageType.REG and not trimming:
            raise PageFault(rcx)
        if page.pending or page.modified:
            return Status.PAGE_NOT_MODIFIABLE
        enclave = page.owner
        if not enclave.initialized:
            raise GeneralProtection

        # Commit
        with hw.latch:
            page.pr, page.modified = False, True
            page.rwx, page.pt = 0, target
            page.bepoch = enclave.epoch
        return Status.SUCCESS
