"""ENCLU[EMODPE]: the enclave extends the rights of one of its pages."""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES, PageType, SecInfo, SecInfoFlags
from softsgx.hw.access import check_access, epc_operand, epc_refusal
from softsgx.hw.checks import secinfo_reserved_zero
from softsgx.hw.epcm import EpcPage
from softsgx.hw.faults import GeneralProtection
from softsgx.hw.leaves.eaccept import STATE_BITS
from softsgx.hw.processor import LogicalProcessor
from softsgx.hw.space import READ, WRITE

__all__ = ["emodpe"]


def emodpe(cpu: LogicalProcessor, rbx: int, rcx: int) -> None:
    """Add the rights in SECINFO to those of the enclave's page at ``rcx``.

    No tracking is needed: a TLB entry with fewer rights faults once, and the exit flushes it.

    Args:
        cpu: the processor, inside the enclave.
        rbx: SECINFO with the rights to add, 64-byte aligned, in the enclave.
        rcx: the page, 4096-byte aligned, in ELRANGE.

    Raises:
        GeneralProtection: an operand is misaligned or outside ELRANGE, SECINFO has reserved bits,
            the page would be write-only, or another leaf works on it.
        PageFault: SECINFO cannot be read; or ``rcx`` is no REG page of this enclave at this
            address, or is pending, modified or blocked.

    Source:
        SDM vol. 3D, "EMODPE", Operation.  What happens to a write-only page is not printed: #GP.
    """
    hw, inside = cpu.hw, cpu.inside
    if inside is None:
        raise GeneralProtection
    secs, enclave = inside.secs, inside.enclave

    # Operands
    if rbx % SecInfo.ALIGN or rcx % PAGE_BYTES:
        raise GeneralProtection
    if not (enclave.covers(rbx) and enclave.covers(rcx)):
        raise GeneralProtection
    wanted = epc_operand(cpu, rbx, READ)
    page = epc_operand(cpu, rcx, READ)
    fault = check_access(secs, wanted, rbx, READ)
    if fault is not None:
        raise fault
    secinfo = SecInfo.unpack(hw.store.read(wanted, rbx % PAGE_BYTES, SecInfo.SIZE))
    if not secinfo_reserved_zero(secinfo, STATE_BITS):
        raise GeneralProtection

    # Checks before the lock
    if not _is_settled(page, secs) or page.blocked:
        raise epc_refusal(rcx, READ)

    with hw.leaf_locks() as locks:
        # Locks
        if not locks.modify(page):
            raise GeneralProtection
        hw.point("EMODPE")

        # Checks
        # BLOCKED is not read again; the rights of a blocked page may grow.
        if not _is_settled(page, secs) or page.linaddr != rcx:
            raise epc_refusal(rcx, READ)
        rights = secinfo.flags & SecInfoFlags.RWX
        if not (page.rwx | rights) & READ and rights & WRITE:
            raise GeneralProtection

        # Commit
        with hw.latch:
            page.rwx |= rights


def _is_settled(page: EpcPage, secs: EpcPage) -> bool:
    """Return whether it is a REG page of this enclave with no change under way."""
    return (
        page.valid
        and not page.pending
        and not page.modified
        and page.pt is PageType.REG
        and page.secs is secs
    )
