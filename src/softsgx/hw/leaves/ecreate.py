"""ENCLS[ECREATE]: begin an enclave."""

from __future__ import annotations

import hashlib

from softsgx.arch import (
    EXINFO_BYTES,
    GPRSGX_BYTES,
    PAGE_BYTES,
    AttributesFlags,
    CetAttributes,
    MiscSelect,
    PageInfo,
    PageType,
    SecInfo,
    Secs,
    ecreate_block,
    is_canonical,
)
from softsgx.hw.checks import secinfo_reserved_zero, xfrm_legal
from softsgx.hw.faults import GeneralProtection, PageFault
from softsgx.hw.operands import PageInfoArgs, Ref, misaligned
from softsgx.hw.processor import LogicalProcessor
from softsgx.hw.secs import Crossings, ResidentSecs

__all__ = ["ecreate"]

_SMALLEST_ENCLAVE = 2 * PAGE_BYTES


def ecreate(cpu: LogicalProcessor, rbx: Ref | PageInfoArgs, rcx: int) -> None:
    """Make the free EPC page at ``rcx`` the SECS of a new enclave and begin its measurement.

    Args:
        cpu: the processor it runs on.
        rbx: PAGEINFO, 32-byte aligned: SRCPGE the SECS to be, SECINFO of type PT_SECS; LINADDR
            and SECS zero.
        rcx: a free EPC page, 4096-byte aligned.

    Raises:
        GeneralProtection: an operand is misaligned, SECINFO or the SECS is not legal on this
            machine, or another leaf holds the page.
        PageFault: ``rcx`` is no EPC page, or is in use.
        VmExit: in a guest with EPC virtualization, instead of #GP for a held page.

    Source:
        SDM vol. 3D, "ECREATE", Operation.  The check of MISCSELECT is printed as a negated AND;
        a subset is meant.  An enclave of exactly the size that CPUID gives as the maximum is
        refused, as printed.
    """
    # Operands
    if misaligned(rbx, PageInfo.ALIGN) or rcx % PAGE_BYTES:
        raise GeneralProtection
    page = cpu.resolve(rcx)
    info = cpu.page_info(rbx)
    if misaligned(info.srcpge, PAGE_BYTES) or misaligned(info.secinfo, SecInfo.ALIGN):
        raise GeneralProtection
    if info.linaddr or info.secs:
        raise GeneralProtection
    secinfo = cpu.sec_info(info.secinfo)
    if not secinfo_reserved_zero(secinfo) or secinfo.page_type != PageType.SECS:
        raise GeneralProtection

    hw = cpu.hw
    with hw.leaf_locks() as locks:
        # Locks
        if not locks.exclusive(page):
            cpu.conflict_exception(rcx)
        hw.point("ECREATE")

        # Checks
        if page.valid:
            raise PageFault(rcx)
        secs = cpu.load(Secs, info.srcpge)
        if not _legal(cpu, secs):
            raise GeneralProtection

        # Commit
        context = cpu.space.paging_address(rcx)
        eid = hw.next_eid()
        enclave = ResidentSecs(secs, eid, context, hw.crossings.setdefault(eid, Crossings()))
        enclave.mrenclave = bytes(32)
        enclave.isv_prod_id = enclave.isv_svn = 0
        # Without CET the offset is zero, which is what the block then has in its place.
        hw.measurements[enclave.eid] = hashlib.sha256(
            ecreate_block(secs.ssa_frame_size, secs.size, secs.cet_leg_bitmap_offset)
        )
        page.fill(PageType.SECS)
        page.enclave = enclave


def _legal(cpu: LogicalProcessor, secs: Secs) -> bool:
    """Return whether the machine can run such an enclave; checks in the manual's order."""
    config = cpu.hw.config
    flags, xfrm = secs.attributes.flags, secs.attributes.xfrm
    mode64 = bool(flags & AttributesFlags.MODE64BIT)
    if not xfrm_legal(xfrm, config.xcr0, xsave_enabled=cpu.cr4_osxsave):
        return False
    if not _cet_legal(secs, mode64=mode64):
        return False
    # int(): the complement of a flag has named bits only, and would let reserved ones through.
    settable, states = int(config.attributes), int(config.xfrm)
    if secs.miscselect & ~int(config.miscselect):
        return False
    misc_bytes = EXINFO_BYTES if secs.miscselect & MiscSelect.EXINFO else 0
    if secs.ssa_frame_size * PAGE_BYTES < config.xsave_bytes(xfrm) + GPRSGX_BYTES + misc_bytes:
        return False
    if not _address_legal(secs.base, mode64=mode64):
        return False
    if secs.size > 1 << (config.max_size_64 if mode64 else config.max_size_32):
        return False
    if secs.size < _SMALLEST_ENCLAVE or secs.size & (secs.size - 1):
        return False
    if secs.base % secs.size:
        return False
    if flags & ~settable or flags & AttributesFlags.INIT or xfrm & ~states:
        return False
    if any(secs.reserved1 + secs.reserved2 + secs.reserved3 + secs.reserved4):
        return False
    return bool(flags & AttributesFlags.KSS) or not (any(secs.config_id) or secs.config_svn)


def _cet_legal(secs: Secs, *, mode64: bool) -> bool:
    """Return whether the CET fields agree with ATTRIBUTES.CET.

    A machine with CET has both its parts, shadow stacks and branch tracking; on one without, CET
    is no legal attribute, so these fields are zero.
    """
    offset = secs.cet_leg_bitmap_offset
    if not secs.attributes.flags & AttributesFlags.CET:
        return secs.cet_attributes == 0 and offset == 0
    return (
        _address_legal(secs.base + offset, mode64=mode64)
        and not secs.cet_attributes & CetAttributes.RESERVED
        and offset % PAGE_BYTES == 0
    )


def _address_legal(address: int, *, mode64: bool) -> bool:
    return is_canonical(address) if mode64 else address < 1 << 32
