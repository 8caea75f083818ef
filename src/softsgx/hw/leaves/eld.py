"""ENCLS[ELDB], ENCLS[ELDU], ENCLS[ELDBC], ENCLS[ELDUC]: load an evicted page."""

from __future__ import annotations

import struct

from softsgx.arch import (
    CHILD_TYPES,
    PAGE_BYTES,
    VA_SLOT_BYTES,
    VA_SLOTS,
    Encls,
    PageType,
    Pcmd,
    Status,
    page_of,
)
from softsgx.hw.enclave import Enclave
from softsgx.hw.epcm import EpcPage
from softsgx.hw.faults import GeneralProtection, PageFault
from softsgx.hw.operands import Buffer, PageInfoArgs, Ref, misaligned
from softsgx.hw.processor import LogicalProcessor
from softsgx.hw.tracking import TRACKED_AGE

__all__ = ["eldb", "eldbc", "eldu", "elduc"]

_SLOTS = struct.Struct(f"<{VA_SLOTS}Q")
_FLAGS = struct.Struct("<Q")
_PAGE_TYPES = {int(pt): pt for pt in PageType}


def eldu(cpu: LogicalProcessor, rbx: Ref | PageInfoArgs, rcx: int, rdx: int) -> Status:
    """Load an evicted page, unblocked, into the free EPC page at ``rcx``.

    Args:
        cpu: the processor it runs on.
        rbx: PAGEINFO, 32-byte aligned: SRCPGE the ciphertext, PCMD its metadata, LINADDR the
            address it had, SECS the EPC page of its enclave's SECS (0 for SECS and VA pages).
        rcx: a free EPC page, 4096-byte aligned.
        rdx: the VA slot with the page's version, 8-byte aligned; emptied on success.

    Returns:
        ``SUCCESS``, or ``MAC_COMPARE_FAIL``: the page, its metadata, its address, its enclave or
        its version is not what EWB sealed; slot and EPCM are unchanged and a retry with the right
        ones succeeds.

    Raises:
        GeneralProtection: an operand is misaligned, the page type is none, SECS is given for a
            page that has none, or another leaf holds a page.
        PageFault: an operand is not an EPC page, ``rcx`` is in use, ``rdx`` is in no VA page,
            or PAGEINFO.SECS holds no SECS.
        VmExit: in a guest with EPC virtualization, when another leaf holds ``rcx``.

    Source:
        SDM vol. 3D, "ELDB/ELDU/ELDBC/ELDUC", Operation.  The edition of 2016 writes the version
        back to the slot after it has checked that it is zero; later ones and we empty the slot.
    """
    return _load(cpu, Encls.ELDU, rbx, rcx, rdx)


def eldb(cpu: LogicalProcessor, rbx: Ref | PageInfoArgs, rcx: int, rdx: int) -> Status:
    """Load an evicted page and leave it blocked; everything else as :func:`eldu`."""
    return _load(cpu, Encls.ELDB, rbx, rcx, rdx)


def elduc(cpu: LogicalProcessor, rbx: Ref | PageInfoArgs, rcx: int, rdx: int) -> Status:
    """As :func:`eldu`, but a page that another leaf holds gives ``EPC_PAGE_CONFLICT``."""
    return _load(cpu, Encls.ELDUC, rbx, rcx, rdx)


def eldbc(cpu: LogicalProcessor, rbx: Ref | PageInfoArgs, rcx: int, rdx: int) -> Status:
    """As :func:`eldb`, but a page that another leaf holds gives ``EPC_PAGE_CONFLICT``."""
    return _load(cpu, Encls.ELDBC, rbx, rcx, rdx)


def _load(
    cpu: LogicalProcessor, leaf: Encls, rbx: Ref | PageInfoArgs, rcx: int, rdx: int
) -> Status:
    if misaligned(rbx, 32) or rcx % PAGE_BYTES:
        raise GeneralProtection
    page = cpu.resolve(rcx)
    if rdx % VA_SLOT_BYTES:
        raise GeneralProtection
    va_page = cpu.resolve(rdx)
    info = cpu.page_info(rbx)
    if misaligned(info.secinfo, Pcmd.ALIGN) or misaligned(info.srcpge, PAGE_BYTES):
        raise GeneralProtection

    hw = cpu.hw
    coded = leaf is Encls.ELDBC or leaf is Encls.ELDUC
    if not hw.locks.exclusive(page):
        if coded:
            return cpu.conflict_error(rcx)
        cpu.conflict_exception(rcx)
    try:
        if not hw.locks.shared(va_page):
            if coded:
                return Status.EPC_PAGE_CONFLICT
            raise GeneralProtection
        try:
            if page.valid:
                raise PageFault(rcx)
            if not va_page.valid or va_page.pt is not PageType.VA:
                raise PageFault(rdx)
            pcmd = bytes(cpu.read(info.secinfo, Pcmd.SIZE))  # type: ignore[arg-type]
            pt = _PAGE_TYPES.get(pcmd[1])

            if pt not in CHILD_TYPES:
                # A type that is none: #GP as in the edition of 2016; in later ones the MAC fails.
                if info.secs or pt is None:
                    raise GeneralProtection
                hw.point(leaf.name)
                return _unseal(cpu, leaf, info, pcmd, pt, page, va_page, rcx, rdx, None)

            if info.secs % PAGE_BYTES:
                raise GeneralProtection
            secs = cpu.resolve(info.secs)
            if not hw.locks.shared(secs):
                if coded:
                    return Status.EPC_PAGE_CONFLICT
                raise GeneralProtection
            try:
                if not secs.valid or secs.pt is not PageType.SECS:
                    raise PageFault(info.secs)
                hw.point(leaf.name)
                return _unseal(cpu, leaf, info, pcmd, pt, page, va_page, rcx, rdx, secs)
            finally:
                hw.locks.release(secs)
        finally:
            hw.locks.release(va_page)
    finally:
        hw.locks.release(page)


def _unseal(
    cpu: LogicalProcessor,
    leaf: Encls,
    info: PageInfoArgs,
    pcmd: bytes,
    pt: PageType,
    page: EpcPage,
    va_page: EpcPage,
    rcx: int,
    rdx: int,
    secs: EpcPage | None,
) -> Status:
    """Authenticate, then empty the slot, fill the page and write the EPCM entry; locks are held."""
    hw = cpu.hw
    assert va_page.slots is not None, f"{va_page!r} has no slots"
    slot = (rdx - page_of(rdx)) // VA_SLOT_BYTES
    version = va_page.slots[slot]
    ciphertext: Buffer = cpu.read(info.srcpge, PAGE_BYTES)
    plain = hw.secrets.paging.unseal(
        b"".join((ciphertext, pcmd[112:])),
        version,
        0 if secs is None else secs.owner.eid,
        info.linaddr,
        pcmd[:64],
        pcmd[72:112],
    )
    if plain is None:
        return Status.MAC_COMPARE_FAIL
    # The VA page is shared: of two loads that have read this version, one comes too late.
    with hw.latch:
        if va_page.slots[slot] != version:
            return Status.MAC_COMPARE_FAIL
        va_page.slots[slot] = 0

    # The MAC covered it all: these flags are what EWB saw in the EPCM.
    (flags,) = _FLAGS.unpack_from(pcmd)
    page.fill(
        pt, rwx=flags & 7, secs=secs, linaddr=info.linaddr, pending=bool(flags & 8), valid=False
    )
    page.modified, page.pr = bool(flags & 16), bool(flags & 32)
    if secs is not None:
        try:
            hw.place(page, plain)
        except Exception:
            with hw.latch:
                va_page.slots[slot] = va_page.slots[slot] or version
            raise
        if leaf is Encls.ELDB or leaf is Encls.ELDBC:
            page.blocked = True
        # Modelled: a page that comes back blocked needs a cycle of its own.  One that comes back
        # restricted or retyped does not: it left when nobody could hold a translation of it, and
        # Linux tracks such a page before its eviction only.
        page.bepoch = secs.owner.epoch - (0 if page.blocked else TRACKED_AGE)
        hw.locks.count_child(secs.owner, 1)
    elif pt is PageType.SECS:
        page.enclave = Enclave.from_image(plain, cpu.space.paging_address(rcx), cpu.hw.crossings)
    else:
        page.slots = list(_SLOTS.unpack(plain))
    page.valid = True
    return Status.SUCCESS
