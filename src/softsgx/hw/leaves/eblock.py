"""ENCLS[EBLOCK]: no new translations to a page."""

from __future__ import annotations

from softsgx.arch import CHILD_TYPES, PAGE_BYTES, PageType, Status
from softsgx.hw.faults import GeneralProtection
from softsgx.hw.processor import LogicalProcessor

__all__ = ["eblock"]


def eblock(cpu: LogicalProcessor, rcx: int) -> Status:
    """Mark the EPC page at ``rcx`` blocked: TLB misses on it fault from now on.

    Translations that some TLB already holds stay usable; proving that there are none is what
    ETRACK and EWB are for.

    Args:
        cpu: the processor it runs on.
        rcx: the page, 4096-byte aligned.

    Returns:
        ``SUCCESS``.  Unchanged otherwise: ``BLKSTATE`` (blocked already), ``NOTBLOCKABLE`` (a VA
        page), ``PG_IS_SECS``, ``PG_INVLD`` (not in use), ``EPC_PAGE_CONFLICT`` (another leaf holds
        it), ``ENTRYEPOCH_LOCKED`` (ETRACK runs on its enclave; retry).

    Raises:
        GeneralProtection: ``rcx`` is misaligned.
        PageFault: ``rcx`` is no EPC page.

    Source:
        SDM vol. 3D, "EBLOCK", Operation; ``ENTRYEPOCH_LOCKED`` from its table of return codes.
    """
    if rcx % PAGE_BYTES:
        raise GeneralProtection
    page = cpu.resolve(rcx)

    hw = cpu.hw
    if not hw.locks.shared(page):
        return Status.EPC_PAGE_CONFLICT
    try:
        hw.point("EBLOCK")
        if not page.valid:
            return Status.PG_INVLD
        if page.pt not in CHILD_TYPES:
            return Status.PG_IS_SECS if page.pt is PageType.SECS else Status.NOTBLOCKABLE
        enclave = page.owner
        if enclave.tracking:
            return Status.ENTRYEPOCH_LOCKED
        with hw.latch:
            if page.blocked:
                return Status.BLKSTATE
            page.blocked, page.bepoch = True, enclave.epoch
        return Status.SUCCESS
    finally:
        hw.locks.release(page)
