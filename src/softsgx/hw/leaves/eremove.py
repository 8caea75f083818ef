"""ENCLS[EREMOVE]: free an EPC page without saving it."""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES, PageType, Status
from softsgx.hw.faults import GeneralProtection
from softsgx.hw.processor import LogicalProcessor

__all__ = ["eremove"]


def eremove(cpu: LogicalProcessor, rcx: int) -> Status:
    """Free the EPC page at ``rcx``; a page that is free already stays so.

    Neither EBLOCK nor ETRACK is needed, but nobody may be inside the enclave; a trimmed page that
    was accepted is the exception, since EACCEPT has proved the tracking.

    Args:
        cpu: the processor it runs on.
        rcx: the page, 4096-byte aligned.

    Returns:
        ``SUCCESS``.  Unchanged otherwise: ``CHILD_PRESENT`` (a SECS with resident children),
        ``ENCLAVE_ACT`` (a processor is inside the enclave).

    Raises:
        GeneralProtection: ``rcx`` is misaligned, or another leaf holds the page.
        PageFault: ``rcx`` is no EPC page.
        VmExit: in a guest with EPC virtualization, instead of #GP for a held page.

    Source:
        SDM vol. 3D, "EREMOVE", Operation.  It is printed to leave early for an accepted TRIM page
        without clearing VALID; the page would never be free again, so we clear it.
    """
    if rcx % PAGE_BYTES:
        raise GeneralProtection
    page = cpu.resolve(rcx)

    hw = cpu.hw
    if not hw.locks.exclusive(page):
        cpu.conflict_exception(rcx)
    try:
        hw.point("EREMOVE")
        if not page.valid:
            return Status.SUCCESS
        match page.pt:
            case PageType.VA:
                page.clear()
            case PageType.SECS:
                enclave = page.owner
                if enclave.children or (cpu.epc_virtualization and enclave.virt_children):
                    return Status.CHILD_PRESENT
                hw.measurements.pop(enclave.eid, None)
                page.clear()
            case PageType.REG | PageType.TCS | PageType.TRIM | PageType.SS_FIRST | PageType.SS_REST:
                enclave = page.owner
                accepted_trim = page.pt is PageType.TRIM and not page.modified
                # Under the latch: an entry counts itself in before it looks at any page, so it
                # either is seen here or sees VALID=0 there.
                with hw.latch:
                    if enclave.threads_inside and not accepted_trim:
                        return Status.ENCLAVE_ACT
                    page.valid = False
                hw.locks.count_child(enclave, -1)
                hw.store.drop(page)
                page.clear()
        return Status.SUCCESS
    finally:
        hw.locks.release(page)
