"""ENCLS[EWB]: write an EPC page back to main memory."""

from __future__ import annotations

import struct

from softsgx.arch import (
    PAGE_BYTES,
    VA_SLOT_BYTES,
    VA_SLOTS,
    PageType,
    Pcmd,
    Status,
    page_of,
)
from softsgx.hw.epcm import EpcPage
from softsgx.hw.faults import GeneralProtection, PageFault
from softsgx.hw.operands import PageInfoArgs, Ref, misaligned
from softsgx.hw.processor import LogicalProcessor
from softsgx.hw.tracking import is_tracked

__all__ = ["ewb"]

_PCMD = struct.Struct("<Q56xQ40x16s")
_SLOTS = struct.Struct(f"<{VA_SLOTS}Q")


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
        ``VA_SLOT_OCCUPIED``: the page is gone all the same, and so is the slot's old version.

    Raises:
        GeneralProtection: an operand is misaligned, or another leaf holds a page or the enclave's
            tracking facility.
        PageFault: an operand is not an EPC page, or not of the type it must have; or, without the
            SGX bit, memory that is to receive something cannot be written.
        VmExit: in a guest with EPC virtualization, instead of #GP for a held ``rcx``.

    Source:
        SDM vol. 3D, "EWB", Operation.
    """
    if misaligned(rbx, 32) or rcx % PAGE_BYTES:
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
    if misaligned(info.secinfo, Pcmd.ALIGN) or misaligned(info.srcpge, PAGE_BYTES):
        raise GeneralProtection

    hw = cpu.hw
    if not hw.locks.exclusive(page):
        cpu.conflict_exception(rcx)
    try:
        if not hw.locks.shared(va_page):
            raise GeneralProtection
        try:
            if not page.valid:
                raise PageFault(rcx)
            if not va_page.valid or va_page.pt is not PageType.VA:
                raise PageFault(rdx)
            if page.secs is None:
                hw.point("EWB")
                if page.pt is PageType.SECS and _has_children(cpu, page):
                    return Status.CHILD_PRESENT
                return _write_back(cpu, rbx, info, page, va_page, rdx)

            enclave = page.owner
            if page.bepoch > enclave.epoch or not hw.locks.track(enclave):
                raise GeneralProtection
            try:
                hw.point("EWB")
                if not page.blocked:
                    return Status.PAGE_NOT_BLOCKED
                if not is_tracked(page, enclave):
                    return Status.NOT_TRACKED
                return _write_back(cpu, rbx, info, page, va_page, rdx)
            finally:
                enclave.lock_t = False
        finally:
            hw.locks.release(va_page)
    finally:
        hw.locks.release(page)


def _has_children(cpu: LogicalProcessor, page: EpcPage) -> bool:
    enclave = page.owner
    return bool(enclave.children or (cpu.epc_virtualization and enclave.virt_children))


def _write_back(
    cpu: LogicalProcessor,
    rbx: Ref | PageInfoArgs,
    info: PageInfoArgs,
    page: EpcPage,
    va_page: EpcPage,
    rdx: int,
) -> Status:
    """Seal and write out; then the slot, then the EPCM entry.  The page's locks are held."""
    hw = cpu.hw
    assert type(info.srcpge) is int or len(info.srcpge) == PAGE_BYTES  # type: ignore[arg-type]
    _probe(cpu, rbx, info)

    eid = 0
    match page.pt:
        case PageType.REG | PageType.TCS | PageType.TRIM | PageType.SS_FIRST | PageType.SS_REST:
            # What the page's MAC binds is the enclave, not where its SECS is just now.
            eid = handle_eid = page.owner.eid
            plain = hw.store.freeze(page)
        case PageType.SECS:
            handle_eid = page.owner.eid
            plain = page.owner.to_image()
        case PageType.VA:
            handle_eid = 0
            assert page.slots is not None, f"{page!r} has no slots"
            plain = _SLOTS.pack(*page.slots)

    version = hw.secrets.paging.next_version()
    flags = page.secinfo_flags()
    sealed = hw.secrets.paging.seal(plain, version, eid, page.linaddr, flags)
    cpu.write(info.srcpge, memoryview(sealed)[:PAGE_BYTES])
    cpu.write(info.secinfo, _PCMD.pack(flags, handle_eid, sealed[PAGE_BYTES:]))  # type: ignore[arg-type]
    info.linaddr = page.linaddr
    if type(rbx) is int:
        cpu.write(rbx, page.linaddr.to_bytes(8, "little"))

    assert va_page.slots is not None, f"{va_page!r} has no slots"
    slot = (rdx - page_of(rdx)) // VA_SLOT_BYTES
    with hw.latch:  # the VA page is shared
        occupied = va_page.slots[slot] != 0
        va_page.slots[slot] = version

    if page.secs is not None:
        hw.locks.count_child(page.owner, -1)
        hw.store.drop(page)
    page.clear()
    return Status.VA_SLOT_OCCUPIED if occupied else Status.SUCCESS


def _probe(cpu: LogicalProcessor, rbx: Ref | PageInfoArgs, info: PageInfoArgs) -> None:
    """Take the page faults of the stores before anything has changed."""
    if type(rbx) is int:
        cpu.probe_write(rbx, 8)
        cpu.probe_write(info.srcpge, PAGE_BYTES)
        cpu.probe_write(info.secinfo, Pcmd.SIZE)  # type: ignore[arg-type]
