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
    # Operands
    if rcx % PAGE_BYTES:
        raise GeneralProtection
    page = cpu.resolve(rcx)

    hw = cpu.hw
    with hw.leaf_locks() as locks:
        # Locks
        if not locks.shared(page):
            return Status.EPC_PAGE_CONFLICT
        hw.point("EBLOCK")

        # Checks
        if not page.valid:
            return Status.PG_INVLD
        if page.pt is PageType.SECS:
            return Status.PG_IS_SECS
        if page.pt not in CHILD_TYPES:
            return Status.NOTBLOCKABLE
        enclave = page.owner
        if enclave.etrack_running:
            return Status.ENTRYEPOCH_LOCKED

        # Commit: under the latch, since two EBLOCKs may share the page.
        with hw.latch:
            if page.blocked:
                return Status.BLKSTATE
            page.blocked = True
            page.bepoch = enclave.epoch
        return Status.SUCCESS
