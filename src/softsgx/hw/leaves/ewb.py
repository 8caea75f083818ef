"""ENCLS[EWB]: write an EPC page back to main memory."""

from __future__ import annotations

from softsgx.arch import (
    CHILD_TYPES,
    PAGE_BYTES,
    VA_SLOT_BYTES,
    MacHeader,
    PageInfo,
    PageType,
    Pcmd,
    SecInfo,
    Status,
    va_slot_index,
)
from softsgx.hw.checks import child_present
from softsgx.hw.epcm import EpcPage, pack_versions
from softsgx.hw.faults import GeneralProtection, PageFault
from softsgx.hw.operands import PageInfoArgs, Ref, misaligned
from softsgx.hw.processor import LogicalProcessor
from softsgx.hw.secrets import MAC_BYTES
from softsgx.hw.tracking import is_tracked

__all__ = ["ewb"]


def ewb(cpu: LogicalProcessor, rbx: Ref | PageInfoArgs, rcx: int, rdx: int) -> Status:
    """Evict the EPC page at ``rcx``: seal it, write it out, free its EPCM entry.

    Args:
        cpu: the processor it runs on.
        rbx: PAGEINFO, 32-byte aligned; LINADDR and SECS must be zero on entry.  SRCPGE receives
            4096 bytes, PCMD 128; on success LINADDR receives the page's linear address.
        rcx: the page to evict, 4096-byte aligned.
        rdx: the VA slot that receives the page's version, 8-byte aligned.

    Returns:
        ``SUCCESS``.  ``PAGE_NOT_BLOCKED``, ``NOT_TRACKED``, ``CHILD_PRESENT``: nothing changed.
        ``VA_SLOT_OCCUPIED``: the page is evicted nevertheless, and the slot's old version is lost.

    Raises:
        GeneralProtection: an operand is misaligned, or another leaf holds a page or the enclave's
            tracking facility.
        PageFault: an operand is not an EPC page, or not of the type it must have; or, without the
            SGX bit, memory that is to receive something cannot be written.
        VmExit: in a guest with EPC virtualization, instead of #GP for a held ``rcx``.

    Source:
        SDM vol. 3D, "EWB", Operation.
    """
    # Operands
    if misaligned(rbx, PageInfo.ALIGN) or rcx % PAGE_BYTES:
        raise GeneralProtection
    page = cpu.resolve(rcx)
    if rdx % VA_SLOT_BYTES:
        raise GeneralProtection
    va_page = cpu.resolve(rdx)
    if page is va_page:
        raise GeneralProtection
    info = cpu.page_info(rbx)
    if info.linaddr or info.secs:
        raise GeneralProtection
    if misaligned(info.pcmd, Pcmd.ALIGN) or misaligned(info.srcpge, PAGE_BYTES):
        raise GeneralProtection

    hw = cpu.hw
    with hw.leaf_locks() as locks:
        # Locks, and the checks that come between them
        if not locks.exclusive(page):
            cpu.conflict_exception(rcx)
        if not locks.shared(va_page):
            raise GeneralProtection
        if not page.valid:
            raise PageFault(rcx)
        if not va_page.valid_as(PageType.VA):
            raise PageFault(rdx)
        if page.pt in CHILD_TYPES and not (
            page.bepoch <= page.owner.epoch and locks.track(page.owner)
        ):
            raise GeneralProtection
        hw.point("EWB")

        # Checks: may the page leave, and which enclave do its MAC and its PCMD name?
        match page.pt:
            case PageType.REG | PageType.TCS | PageType.TRIM | PageType.SS_FIRST | PageType.SS_REST:
                if not page.blocked:
                    return Status.PAGE_NOT_BLOCKED
                if not is_tracked(page, page.owner):
                    return Status.NOT_TRACKED
                # The enclave's identifier, not the place of its SECS, which may leave and return.
                bound_eid = enclave_id = page.owner.eid
            case PageType.SECS:
                if child_present(cpu, page.owner):
                    return Status.CHILD_PRESENT
                bound_eid, enclave_id = 0, page.owner.eid
            case PageType.VA:
                bound_eid = enclave_id = 0
        _probe_stores(cpu, rbx, info)

        # Commit: seal the page and write it out
        version = hw.secrets.paging.next_version()
        secinfo = SecInfo(flags=page.secinfo_flags())
        header = MacHeader(eid=bound_eid, linaddr=page.linaddr, secinfo=secinfo)
        sealed = hw.secrets.paging.seal(_plaintext(cpu, page), version, header.pack())
        ciphertext, mac = sealed[:-MAC_BYTES], sealed[-MAC_BYTES:]
        cpu.write(info.srcpge, ciphertext)
        cpu.write(info.pcmd, Pcmd(secinfo=secinfo, enclave_id=enclave_id, mac=mac).pack())
        info.linaddr = page.linaddr
        if type(rbx) is int:
            cpu.write(rbx, page.linaddr.to_bytes(8, "little"))

        # Commit: the slot, under the latch since other leaves may share the VA page
        slot = va_slot_index(rdx)
        with hw.latch:
            occupied = va_page.versions[slot] != 0
            va_page.versions[slot] = version

        # Commit: the EPCM entry
        if page.pt in CHILD_TYPES:
            hw.count_child(page.owner, -1)
            hw.store.drop(page)
        page.clear()
        return Status.VA_SLOT_OCCUPIED if occupied else Status.SUCCESS


def _probe_stores(cpu: LogicalProcessor, rbx: Ref | PageInfoArgs, info: PageInfoArgs) -> None:
    """Raise the page faults of the leaf's stores while nothing has changed."""
    srcpge = info.srcpge
    assert isinstance(srcpge, int) or len(srcpge) == PAGE_BYTES, "SRCPGE receives a page"
    if type(rbx) is int:
        cpu.probe_write(rbx, 8)
        cpu.probe_write(srcpge, PAGE_BYTES)
        cpu.probe_write(info.pcmd, Pcmd.SIZE)


def _plaintext(cpu: LogicalProcessor, page: EpcPage) -> bytes | bytearray:
    """Return the 4096 bytes that a page holds; stores to it fail from now on."""
    match page.pt:
        case PageType.SECS:
            return page.owner.to_image()
        case PageType.VA:
            return pack_versions(page.versions)
        case _:
            return cpu.hw.store.freeze(page)
