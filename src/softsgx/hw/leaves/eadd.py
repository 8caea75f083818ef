"""ENCLS[EADD]: add a page to an enclave that is being built."""

from __future__ import annotations

from softsgx.arch import (
    PAGE_BYTES,
    SHADOW_STACK_TYPES,
    PageInfo,
    PageType,
    SecInfo,
    SecInfoFlags,
    Tcs,
    eadd_block,
    tcs_as_added,
    tcs_ok,
)
from softsgx.hw.checks import secinfo_reserved_zero, shadow_stack_token, touches_range_end
from softsgx.hw.epcm import EpcPage
from softsgx.hw.faults import GeneralProtection, PageFault
from softsgx.hw.operands import PageInfoArgs, Ref, misaligned
from softsgx.hw.processor import LogicalProcessor
from softsgx.hw.secs import ResidentSecs

__all__ = ["eadd"]

_TYPES = {int(pt): pt for pt in (PageType.REG, PageType.TCS)}
_CET_TYPES = _TYPES | {int(pt): pt for pt in SHADOW_STACK_TYPES}
_RWX = int(SecInfoFlags.RWX)
_W_WITHOUT_R = (SecInfoFlags.W, SecInfoFlags.W | SecInfoFlags.X)


def eadd(cpu: LogicalProcessor, rbx: Ref | PageInfoArgs, rcx: int) -> None:
    """Copy a page into the free EPC page at ``rcx``, bind it to an enclave, measure its place.

    Its bytes are measured by EEXTEND only.

    Args:
        cpu: the processor it runs on.
        rbx: PAGEINFO, 32-byte aligned: SRCPGE 4096 bytes, SECINFO type and rights, LINADDR where
            in the enclave, SECS the EPC page of its SECS.
        rcx: a free EPC page, 4096-byte aligned.

    Raises:
        GeneralProtection: an operand is misaligned; SECINFO or a TCS or shadow-stack page is not
            legal; LINADDR is outside the enclave; the enclave is initialised; or another leaf
            holds a page or the measurement.
        PageFault: an operand is no EPC page, ``rcx`` is in use, PAGEINFO.SECS holds no SECS.
        VmExit: in a guest with EPC virtualization, instead of #GP for a held ``rcx``.

    Source:
        SDM vol. 3D, "EADD", Operation.
    """
    # Operands
    if misaligned(rbx, PageInfo.ALIGN) or rcx % PAGE_BYTES:
        raise GeneralProtection
    page = cpu.resolve(rcx)
    info = cpu.page_info(rbx)
    if misaligned(info.srcpge, PAGE_BYTES) or info.secs % PAGE_BYTES or info.linaddr % PAGE_BYTES:
        raise GeneralProtection
    if misaligned(info.secinfo, SecInfo.ALIGN):
        raise GeneralProtection
    secs = cpu.resolve(info.secs)
    secinfo = cpu.sec_info(info.secinfo)
    hw = cpu.hw
    pt = (_CET_TYPES if hw.config.cet else _TYPES).get(secinfo.page_type)
    if pt is None or not secinfo_reserved_zero(secinfo):
        raise GeneralProtection
    if pt in SHADOW_STACK_TYPES and not cpu.cr4_cet:
        raise GeneralProtection

    with hw.leaf_locks() as locks:
        # Locks, and the checks that come between them
        if not locks.exclusive(page):
            cpu.conflict_exception(rcx)
        if page.valid:
            raise PageFault(rcx)
        if not locks.shared(secs):
            raise GeneralProtection
        if not secs.valid_as(PageType.SECS):
            raise PageFault(info.secs)
        enclave = secs.owner
        data, rwx = _checked(cpu, info, pt, secinfo.flags & _RWX, enclave)
        if not enclave.covers(info.linaddr):
            raise GeneralProtection
        if not locks.measure(enclave):
            raise GeneralProtection
        hw.point("EADD")

        # Checks
        if enclave.initialized:
            raise GeneralProtection

        _commit(cpu, page, secs, pt, rwx, info.linaddr, data)


def _checked(
    cpu: LogicalProcessor, info: PageInfoArgs, pt: PageType, rwx: int, enclave: ResidentSecs
) -> tuple[bytes, int]:
    """Copy the source; return what the page will hold, and its rights.

    Raises:
        GeneralProtection: the content is not legal for this page type.
    """
    data = bytes(cpu.read(info.srcpge, PAGE_BYTES))
    if pt is PageType.REG:
        if rwx in _W_WITHOUT_R:
            raise GeneralProtection
        return data, rwx
    if pt is PageType.TCS:
        tcs = Tcs.unpack(data)
        if not tcs_ok(tcs, mode64=enclave.mode64, cet=cpu.hw.config.cet):
            raise GeneralProtection
        # A TCS has no rights, whatever SECINFO says: only leaves access it.
        return tcs_as_added(tcs).pack(), 0
    token = shadow_stack_token(enclave, info.linaddr) if pt is PageType.SS_FIRST else bytes(8)
    if touches_range_end(enclave, info.linaddr) or data != bytes(PAGE_BYTES - 8) + token:
        raise GeneralProtection
    if rwx != SecInfoFlags.R | SecInfoFlags.W:
        raise GeneralProtection
    return data, rwx


def _commit(
    cpu: LogicalProcessor,
    page: EpcPage,
    secs: EpcPage,
    pt: PageType,
    rwx: int,
    linaddr: int,
    data: bytes,
) -> None:
    """Fill the page, measure, and write the EPCM entry, VALID last; locks are held."""
    # Commit
    hw, enclave = cpu.hw, secs.owner
    page.fill(pt, rwx=rwx, secs=secs, linaddr=linaddr, valid=False)
    hw.fill_page(page, data)
    hw.measurements[enclave.eid].update(eadd_block(linaddr - enclave.base, pt << 8 | rwx))
    hw.count_child(enclave, 1)
    page.valid = True
