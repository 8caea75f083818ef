"""ENCLS[EDBGWR]: write to a debug enclave."""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES, AttributesFlags, PageType, Status, Tcs
from softsgx.hw.faults import GeneralProtection, PageFault
from softsgx.hw.processor import LogicalProcessor

__all__ = ["edbgwr"]

_WRITABLE = frozenset({PageType.REG, PageType.TCS, PageType.SS_FIRST, PageType.SS_REST})
_QWORD_OF_PAGE = 0xFF8


def edbgwr(cpu: LogicalProcessor, rbx: int, rcx: int) -> Status:
    """Write 8 bytes (4 in 32-bit mode) of an EPC page; rights and BLOCKED do not matter.

    Args:
        cpu: the processor it runs on.
        rbx: the data.
        rcx: the address in EPC, 8-byte aligned (4 in 32-bit mode); of a TCS only FLAGS.

    Returns:
        ``SUCCESS``, or ``PAGE_NOT_DEBUGGABLE``, unchanged: pending or modified.

    Raises:
        GeneralProtection: ``rcx`` is misaligned or in a TCS but not its FLAGS, the enclave is not
            a debug enclave, or another leaf holds the page alone.
        PageFault: ``rcx`` is no EPC page, or in a page not in use or of a type not writable.

    Source:
        SDM vol. 3D, "EDBGWR", Operation.
    """
    # Operands
    size = 8 if cpu.mode64 else 4
    if rcx % size:
        raise GeneralProtection
    page = cpu.resolve(rcx)

    hw = cpu.hw
    with hw.leaf_locks() as locks:
        # Locks
        if not locks.shared(page):
            raise GeneralProtection
        hw.point("EDBGWR")

        # Checks
        if not page.valid or page.pt not in _WRITABLE:
            raise PageFault(rcx)
        if page.pending or page.modified:
            return Status.PAGE_NOT_DEBUGGABLE
        offset = rcx % PAGE_BYTES
        if page.pt is PageType.TCS and offset & _QWORD_OF_PAGE != Tcs.OFFSETS["flags"]:
            raise GeneralProtection
        if not page.owner.flags & AttributesFlags.DEBUG:
            raise GeneralProtection

        # Commit: under the latch, since two EDBGWRs may share the page.
        data = (rbx & (1 << 8 * size) - 1).to_bytes(size, "little")
        with hw.latch:
            hw.store.write(page, offset, data)
        return Status.SUCCESS
