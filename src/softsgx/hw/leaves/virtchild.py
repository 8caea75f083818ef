"""ENCLV[EDECVIRTCHILD], ENCLV[EINCVIRTCHILD]: children that only a guest believes to be there.

A hypervisor that evicts a guest's page counts it here, so that EWB and EREMOVE of the SECS still
refuse inside the guest.
"""

from __future__ import annotations

from softsgx.arch import CHILD_TYPES, PAGE_BYTES, Enclv, PageType, Status
from softsgx.hw.faults import GeneralProtection, PageFault
from softsgx.hw.processor import LogicalProcessor

__all__ = ["edecvirtchild", "eincvirtchild"]


def edecvirtchild(cpu: LogicalProcessor, rbx: int, rcx: int) -> Status:
    """Subtract one from the VIRTCHILDCNT of the SECS at ``rcx``.

    Args:
        cpu: the processor it runs on.
        rbx: a page of the enclave, or the SECS itself, 4096-byte aligned.
        rcx: the SECS.

    Returns:
        ``SUCCESS``.  Unchanged otherwise: ``EPC_PAGE_CONFLICT`` (another leaf holds ``rbx``),
        ``INVALID_COUNTER`` (it is zero).

    Raises:
        GeneralProtection: ``rbx`` is misaligned, or ``rcx`` is not its SECS.
        PageFault: an operand is no EPC page; ``rbx`` is not in use or belongs to no enclave.

    Source:
        SDM vol. 3D, "EDECVIRTCHILD", Operation.
    """
    return _count(cpu, Enclv.EDECVIRTCHILD, rbx, rcx)


def eincvirtchild(cpu: LogicalProcessor, rbx: int, rcx: int) -> Status:
    """Add one to the VIRTCHILDCNT of the SECS at ``rcx``; everything else as EDECVIRTCHILD.

    Source:
        SDM vol. 3D, "EINCVIRTCHILD", Operation.
    """
    return _count(cpu, Enclv.EINCVIRTCHILD, rbx, rcx)


def _count(cpu: LogicalProcessor, leaf: Enclv, rbx: int, rcx: int) -> Status:
    # Operands
    if rbx % PAGE_BYTES:
        raise GeneralProtection
    page = cpu.resolve(rbx)
    secs = cpu.resolve(rcx)

    hw = cpu.hw
    with hw.leaf_locks() as locks:
        # Locks
        if not locks.shared(page):
            return Status.EPC_PAGE_CONFLICT
        hw.point(leaf.name)

        # Checks
        if not page.valid or (page.pt not in CHILD_TYPES and page.pt is not PageType.SECS):
            raise PageFault(rbx)
        holder = page if page.secs is None else page.secs
        # Addresses are compared, not pages: one in the middle of the SECS is another.
        if holder is not secs or rcx % PAGE_BYTES:
            raise GeneralProtection
        enclave = page.owner

        # Commit
        with hw.latch:
            if leaf is Enclv.EINCVIRTCHILD:
                enclave.virt_children += 1
            elif enclave.virt_children:
                enclave.virt_children -= 1
            else:
                return Status.INVALID_COUNTER
        return Status.SUCCESS
