"""ENCLU[EACCEPTCOPY]: accept a new page with the contents of another."""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES, PageType, SecInfo, Status
from softsgx.hw.access import check_access, epc_operand
from softsgx.hw.checks import secinfo_reserved_zero
from softsgx.hw.epcm import EpcPage
from softsgx.hw.faults import GeneralProtection
from softsgx.hw.leaves.eaccept import STATE_BITS
from softsgx.hw.processor import LogicalProcessor
from softsgx.hw.space import READ, WRITE

__all__ = ["eacceptcopy"]

_RWX, _RW = READ | WRITE | 4, READ | WRITE


def eacceptcopy(cpu: LogicalProcessor, rbx: int, rcx: int, rdx: int) -> Status:
    """Copy the page at ``rdx`` into the pending page at ``rcx`` and accept it.

    Args:
        cpu: the processor, inside the enclave.
        rbx: SECINFO with the rights the page is to have, 64-byte aligned, in the enclave.
        rcx: destination, 4096-byte aligned, in ELRANGE: a page fresh from EAUG.
        rdx: source, 4096-byte aligned, in ELRANGE: a readable page of the enclave.

    Returns:
        ``SUCCESS``, or ``PAGE_ATTRIBUTES_MISMATCH``: nothing changed, the destination is not a
        pending REG page of this enclave, at this address, with the rights that EAUG gives.

    Raises:
        GeneralProtection: an operand is misaligned or outside ELRANGE, SECINFO asks for no REG
            page or for a write-only one, or another leaf works on the destination.
        PageFault: SECINFO or the source cannot be read, or an operand is no EPC page.

    Source:
        SDM vol. 3D, "EACCEPTCOPY", Operation.  The test of the source's right to be read is
        printed with the destination's address, that of the destination's BLOCKED bit with the
        source's.
    """
    hw, inside = cpu.hw, cpu.inside
    if inside is None:
        raise GeneralProtection
    secs, enclave = inside.secs, inside.enclave

    # Operands
    if rbx % SecInfo.ALIGN or rcx % PAGE_BYTES or rdx % PAGE_BYTES:
        raise GeneralProtection
    if not (enclave.covers(rbx) and enclave.covers(rcx) and enclave.covers(rdx)):
        raise GeneralProtection
    wanted = epc_operand(cpu, rbx, READ)
    page = epc_operand(cpu, rcx, WRITE)
    source = epc_operand(cpu, rdx, READ)
    fault = check_access(secs, wanted, rbx, READ)
    if fault is not None:
        raise fault
    secinfo = SecInfo.unpack(hw.store.read(wanted, rbx % PAGE_BYTES, SecInfo.SIZE))
    if not secinfo_reserved_zero(secinfo, STATE_BITS) or secinfo.page_type != PageType.REG:
        raise GeneralProtection
    if secinfo.flags & _RW == WRITE:
        raise GeneralProtection

    # Checks before the lock
    fault = check_access(secs, source, rdx, READ)
    if fault is not None:
        raise fault
    if not _is_new(page, secs):
        return Status.PAGE_ATTRIBUTES_MISMATCH

    with hw.leaf_locks() as locks:
        # Locks
        if not locks.modify(page):
            raise GeneralProtection
        hw.point("EACCEPTCOPY")

        # Checks
        if not _is_new(page, secs) or page.rwx != _RW or page.linaddr != rcx:
            return Status.PAGE_ATTRIBUTES_MISMATCH

        # Commit
        hw.store.write(page, 0, hw.store.read(source, 0, PAGE_BYTES))
        with hw.latch:
            page.rwx, page.pending = secinfo.flags & _RWX, False
    return Status.SUCCESS


def _is_new(page: EpcPage, secs: EpcPage) -> bool:
    """Return whether the page is as EAUG leaves one of this enclave's REG pages."""
    return (
        page.valid
        and page.pending
        and not page.modified
        and not page.blocked
        and page.pt is PageType.REG
        and page.secs is secs
    )
