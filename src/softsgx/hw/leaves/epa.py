"""ENCLS[EPA]: make a version array page."""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES, PageType
from softsgx.hw.faults import GeneralProtection, PageFault
from softsgx.hw.processor import LogicalProcessor

__all__ = ["epa"]


def epa(cpu: LogicalProcessor, rbx: int, rcx: int) -> None:
    """Make the free EPC page at ``rcx`` a VA page of 512 empty slots.

    Args:
        cpu: the processor it runs on.
        rbx: the constant 3, PT_VA.
        rcx: a free EPC page, 4096-byte aligned.

    Raises:
        GeneralProtection: ``rbx`` is not 3, ``rcx`` is misaligned, or another leaf holds the page.
        PageFault: ``rcx`` is no EPC page, or is in use.
        VmExit: in a guest with EPC virtualization, instead of #GP for a held page.

    Source:
        SDM vol. 3D, "EPA", Operation.
    """
    # Operands
    if rbx != PageType.VA or rcx % PAGE_BYTES:
        raise GeneralProtection
    page = cpu.resolve(rcx)

    hw = cpu.hw
    with hw.leaf_locks() as locks:
        # Locks
        if not locks.exclusive(page):
            cpu.conflict_exception(rcx)
        hw.point("EPA")

        # Checks
        if page.valid:
            raise PageFault(rcx)

        # Commit
        page.fill(PageType.VA)
