"""ENCLS[EDBGRD]: read from a debug enclave."""

from __future__ import annotations

from softsgx.arch import (
    PAGE_BYTES,
    TCS_LIMIT_BYTES,
    TCS_LIMIT_CET_BYTES,
    AttributesFlags,
    PageType,
    Status,
    va_slot_index,
)
from softsgx.hw.faults import GeneralProtection, PageFault
from softsgx.hw.processor import LogicalProcessor

__all__ = ["edbgrd"]

_READABLE = frozenset(
    {PageType.REG, PageType.TCS, PageType.VA, PageType.SS_FIRST, PageType.SS_REST}
)
_VERSION_BITS = ~7


def edbgrd(cpu: LogicalProcessor, rcx: int) -> tuple[Status, int]:
    """Read 8 bytes (4 in 32-bit mode) of an EPC page; rights and BLOCKED do not matter.

    Of a VA page it reads only whether the slot is in use: all ones, or zero.

    Args:
        cpu: the processor it runs on.
        rcx: the address in EPC, 8-byte aligned (4 in 32-bit mode).

    Returns:
        ``SUCCESS`` and the new RBX; or ``PAGE_NOT_DEBUGGABLE`` (pending or modified) and 0: RBX
        keeps its value.

    Raises:
        GeneralProtection: ``rcx`` is misaligned or in a TCS' reserved part, the enclave is not a
            debug enclave, or another leaf holds the page alone.
        PageFault: ``rcx`` is no EPC page, or in a page not in use or of a type not readable.

    Source:
        SDM vol. 3D, "EDBGRD", Operation.  Shadow-stack pages are printed in the VA branch; they
        are treated as REG here.
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
        hw.point("EDBGRD")

        # Checks
        if not page.valid or page.pt not in _READABLE:
            raise PageFault(rcx)
        if page.pending or page.modified:
            return Status.PAGE_NOT_DEBUGGABLE, 0
        offset = rcx % PAGE_BYTES
        if page.pt is PageType.VA:
            used = page.versions[va_slot_index(rcx)] & _VERSION_BITS
            return Status.SUCCESS, (1 << 8 * size) - 1 if used else 0
        limit = TCS_LIMIT_CET_BYTES if hw.config.cet else TCS_LIMIT_BYTES
        if page.pt is PageType.TCS and offset >= limit:
            raise GeneralProtection
        if not page.owner.flags & AttributesFlags.DEBUG:
            raise GeneralProtection
        return Status.SUCCESS, int.from_bytes(hw.store.read(page, offset, size), "little")
