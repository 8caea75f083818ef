"""ENCLS[EAUG]: add a zeroed page to an enclave that runs."""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES, SHADOW_STACK_TYPES, PageInfo, PageType, SecInfo, SecInfoFlags
from softsgx.hw.checks import secinfo_reserved_zero, shadow_stack_token, touches_range_end
from softsgx.hw.faults import GeneralProtection, PageFault
from softsgx.hw.operands import PageInfoArgs, Ref, misaligned
from softsgx.hw.processor import LogicalProcessor

__all__ = ["eaug"]

_RW = SecInfoFlags.R | SecInfoFlags.W
_SHADOW_STACK = {int(pt): pt for pt in SHADOW_STACK_TYPES}
_ZEROES = bytes(PAGE_BYTES)


def eaug(cpu: LogicalProcessor, rbx: Ref | PageInfoArgs, rcx: int) -> None:
    """Add a zeroed page, pending, to an initialised enclave; the enclave then accepts it.

    Args:
        cpu: the processor it runs on.
        rbx: PAGEINFO, 32-byte aligned: LINADDR where in the enclave, SECS the EPC page of its
            SECS, SRCPGE zero, SECINFO zero for a REG page or a shadow-stack page's.
        rcx: a free EPC page, 4096-byte aligned.

    Raises:
        GeneralProtection: an operand is misaligned, SRCPGE is given, SECINFO is not legal,
            LINADDR is outside the enclave, the enclave is not initialised, or another leaf holds
            a page.
        PageFault: an operand is no EPC page, ``rcx`` is in use, PAGEINFO.SECS holds no SECS.
        VmExit: in a guest with EPC virtualization, instead of #GP for a held ``rcx``.

    Source:
        SDM vol. 3D, "EAUG", Operation.
    """
    # Operands
    if misaligned(rbx, PageInfo.ALIGN) or rcx % PAGE_BYTES:
        raise GeneralProtection
    page = cpu.resolve(rcx)
    info = cpu.page_info(rbx)
    if misaligned(info.secinfo, SecInfo.ALIGN):
        raise GeneralProtection
    if info.secs % PAGE_BYTES or info.linaddr % PAGE_BYTES:
        raise GeneralProtection
    if info.srcpge != 0:
        raise GeneralProtection
    secs = cpu.resolve(info.secs)

    hw = cpu.hw
    with hw.leaf_locks() as locks:
        # Locks, and the checks that come between them
        if not locks.exclusive(page):
            cpu.conflict_exception(rcx)
        if page.valid:
            raise PageFault(rcx)
        pt = _page_type(cpu, info)
        if not locks.shared(secs):
            raise GeneralProtection
        hw.point("EAUG")

        # Checks
        if not secs.valid_as(PageType.SECS):
            raise PageFault(info.secs)
        enclave = secs.owner
        if not enclave.initialized or not enclave.covers(info.linaddr):
            raise GeneralProtection
        data = _ZEROES
        if pt is not PageType.REG:
            if touches_range_end(enclave, info.linaddr):
                raise GeneralProtection
            if pt is PageType.SS_FIRST:
                data = _ZEROES[:-8] + shadow_stack_token(enclave, info.linaddr)

        # Commit
        linaddr = info.linaddr
        page.fill(pt, rwx=int(_RW), secs=secs, linaddr=linaddr, pending=True, valid=False)
        hw.fill_page(page, data)
        hw.count_child(enclave, 1)
        page.valid = True


def _page_type(cpu: LogicalProcessor, info: PageInfoArgs) -> PageType:
    """Return the type that PAGEINFO.SECINFO asks for.

    Raises:
        GeneralProtection: EAUG makes no such page, or not while CR4.CET is 0.
    """
    if info.secinfo == 0:
        return PageType.REG
    secinfo = cpu.sec_info(info.secinfo)
    pt = _SHADOW_STACK.get(secinfo.page_type)
    if not secinfo_reserved_zero(secinfo) or not cpu.hw.config.cet or pt is None:
        raise GeneralProtection
    if secinfo.flags & SecInfoFlags.RWX != _RW or not cpu.cr4_cet:
        raise GeneralProtection
    return pt
