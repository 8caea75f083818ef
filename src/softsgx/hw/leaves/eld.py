"""ENCLS[ELDB], ENCLS[ELDU], ENCLS[ELDBC], ENCLS[ELDUC]: load an evicted page."""

from __future__ import annotations

from softsgx.arch import (
    PAGE_BYTES,
    VA_SLOT_BYTES,
    Encls,
    MacHeader,
    PageInfo,
    PageType,
    Pcmd,
    SecInfo,
    SecInfoFlags,
    Status,
    va_slot_index,
)
from softsgx.hw.epcm import EpcPage, unpack_versions
from softsgx.hw.faults import GeneralProtection, PageFault
from softsgx.hw.operands import PageInfoArgs, Ref, misaligned
from softsgx.hw.processor import LogicalProcessor
from softsgx.hw.secs import ResidentSecs
from softsgx.hw.tracking import TRACKED_AGE

__all__ = ["eldb", "eldbc", "eldu", "elduc"]

# As integers: operators of enumerations cost more than the rest of an EPCM entry.
_RWX, _PENDING = int(SecInfoFlags.RWX), int(SecInfoFlags.PENDING)
_MODIFIED, _PR = int(SecInfoFlags.MODIFIED), int(SecInfoFlags.PR)


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
    # Operands
    if misaligned(rbx, PageInfo.ALIGN) or rcx % PAGE_BYTES:
        raise GeneralProtection
    page = cpu.resolve(rcx)
    if rdx % VA_SLOT_BYTES:
        raise GeneralProtection
    va_page = cpu.resolve(rdx)
    info = cpu.page_info(rbx)
    if misaligned(info.pcmd, Pcmd.ALIGN) or misaligned(info.srcpge, PAGE_BYTES):
        raise GeneralProtection

    hw = cpu.hw
    with hw.leaf_locks() as locks:
        # Locks, and the checks that come between them
        if not locks.exclusive(page):
            if leaf in (Encls.ELDBC, Encls.ELDUC):
                return cpu.conflict_error(rcx)
            cpu.conflict_exception(rcx)
        if not locks.shared(va_page):
            return _conflict(leaf)
        if page.valid:
            raise PageFault(rcx)
        if not va_page.valid_as(PageType.VA):
            raise PageFault(rdx)
        pcmd = cpu.load(Pcmd, info.pcmd)
        header = MacHeader(linaddr=info.linaddr, secinfo=pcmd.secinfo, reserved=pcmd.reserved)
        secs: EpcPage | None = None
        match pcmd.secinfo.page_type:
            case PageType.REG | PageType.TCS | PageType.TRIM | PageType.SS_FIRST | PageType.SS_REST:
                if info.secs % PAGE_BYTES:
                    raise GeneralProtection
                secs = cpu.resolve(info.secs)
                if not locks.shared(secs):
                    return _conflict(leaf)
                if not secs.valid_as(PageType.SECS):
                    raise PageFault(info.secs)
                header.eid = secs.owner.eid
            case PageType.SECS | PageType.VA:
                if info.secs:
                    raise GeneralProtection
            case _:
                # As in the edition of 2016; in later ones the MAC fails.
                raise GeneralProtection
        hw.point(leaf.name)

        # Checks: the MAC
        slot = va_slot_index(rdx)
        version = va_page.versions[slot]
        sealed = b"".join((cpu.read(info.srcpge, PAGE_BYTES), pcmd.mac))
        plaintext = hw.secrets.paging.unseal(sealed, version, header.pack())
        if plaintext is None:
            return Status.MAC_COMPARE_FAIL

        # Commit: the slot.  The VA page is shared, and another load may have used this version.
        with hw.latch:
            if va_page.versions[slot] != version:
                return Status.MAC_COMPARE_FAIL
            va_page.versions[slot] = 0

        # Commit: the page and its EPCM entry, VALID last
        _write_entry(page, pcmd.secinfo, info.linaddr, secs)
        if secs is not None:
            try:
                hw.fill_page(page, plaintext)
            except Exception:  # the host has no memory for the page
                with hw.latch:
                    va_page.versions[slot] = va_page.versions[slot] or version
                raise
            page.blocked = leaf in (Encls.ELDB, Encls.ELDBC)
            # Modelled: a page that is loaded blocked needs a tracking cycle of its own.  One that
            # is loaded restricted or retyped needs none: no processor held a translation of it
            # when it left, and Linux tracks such a page before its eviction only.
            page.bepoch = secs.owner.epoch - (0 if page.blocked else TRACKED_AGE)
            hw.count_child(secs.owner, 1)
        elif page.pt is PageType.SECS:
            context = cpu.space.paging_address(rcx)
            page.enclave = ResidentSecs.from_image(plaintext, context, hw.crossings)
        else:
            page.slots = unpack_versions(plaintext)
        page.valid = True
        return Status.SUCCESS


def _conflict(leaf: Encls) -> Status:
    """End a leaf that found the VA page or the SECS locked.

    Raises:
        GeneralProtection: ELDB and ELDU, which have no code for it.
    """
    if leaf in (Encls.ELDBC, Encls.ELDUC):
        return Status.EPC_PAGE_CONFLICT
    raise GeneralProtection


def _write_entry(page: EpcPage, secinfo: SecInfo, linaddr: int, secs: EpcPage | None) -> None:
    """Write an EPCM entry as EWB saw it, VALID left out; the MAC has authenticated all of it."""
    flags = secinfo.flags
    page.fill(
        PageType(secinfo.page_type), rwx=flags & _RWX, secs=secs, linaddr=linaddr, valid=False
    )
    page.pending = bool(flags & _PENDING)
    page.modified = bool(flags & _MODIFIED)
    page.pr = bool(flags & _PR)
