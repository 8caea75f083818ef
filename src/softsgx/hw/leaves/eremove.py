"""ENCLS[EREMOVE]: free an EPC page without saving it."""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES, PageType, Status
from softsgx.hw.checks import child_present
from softsgx.hw.faults import GeneralProtection
from softsgx.hw.processor import LogicalProcessor

__all__ = ["eremove"]


def eremove(cpu: LogicalProcessor, rcx: int) -> Status:
    """Free the EPC page at ``rcx``; a page that is free already stays so.

    The leaf needs neither EBLOCK nor ETRACK, but no processor may be inside the enclave.  A trimmed
    page that the enclave has accepted is the exception: EACCEPT has checked its tracking.

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
    # Operands
    if rcx % PAGE_BYTES:
        raise GeneralProtection
    page = cpu.resolve(rcx)

    hw = cpu.hw
    with hw.leaf_locks() as locks:
        # Locks
        if not locks.exclusive(page):
            cpu.conflict_exception(rcx)
        hw.point("EREMOVE")

        # Checks and commit, by page type
        if not page.valid:
            return Status.SUCCESS
        match page.pt:
            case PageType.VA:
                page.clear()
            case PageType.SECS:
                enclave = page.owner
                if child_present(cpu, enclave):
                    return Status.CHILD_PRESENT
                hw.measurements.pop(enclave.eid, None)
                page.clear()
            case PageType.REG | PageType.TCS | PageType.TRIM | PageType.SS_FIRST | PageType.SS_REST:
                enclave = page.owner
                accepted_trim = page.pt is PageType.TRIM and not page.modified
                # Under the latch: an entering processor counts itself in before it checks a page,
                # so either this leaf sees the processor or the processor sees VALID=0.
                with hw.latch:
                    if enclave.threads_inside and not accepted_trim:
                        return Status.ENCLAVE_ACT
                    page.valid = False
                hw.count_child(enclave, -1)
                hw.store.drop(page)
                page.clear()
        return Status.SUCCESS
