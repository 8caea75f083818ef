"""ENCLS[ETRACK] and ENCLS[ETRACKC]: begin a tracking cycle."""

from __future__ import annotations

from softsgx.arch import CHILD_TYPES, PAGE_BYTES, ConflictCode, PageType, Status
from softsgx.hw.faults import GeneralProtection, PageFault
from softsgx.hw.processor import LogicalProcessor
from softsgx.hw.secs import ResidentSecs
from softsgx.hw.tracking import start_cycle

__all__ = ["etrack", "etrackc"]


def etrack(cpu: LogicalProcessor, rcx: int) -> Status:
    """Begin a tracking cycle for the enclave whose SECS is at ``rcx``.

    The leaf interrupts no processor: the cycle completes when every processor that was inside has
    left.

    Args:
        cpu: the processor it runs on.
        rcx: a SECS page, 4096-byte aligned.

    Returns:
        ``SUCCESS``, or ``PREV_TRK_INCMPL``: nothing changed, a processor from before the previous
        cycle is still inside.

    Raises:
        GeneralProtection: ``rcx`` is misaligned, another leaf holds the page, or the tracking
            facility is in use.
        PageFault: ``rcx`` is no EPC page, or holds no SECS.
        VmExit: in a guest with EPC virtualization: TRACKING_RESOURCE_CONFLICT when the facility
            is in use, TRACKING_REFERENCE_CONFLICT instead of ``PREV_TRK_INCMPL``.

    Source:
        SDM vol. 3D, "ETRACK", Operation.  The concurrency table gives a code where the flow gives
        #GP for a facility in use; we follow the flow.  The flow of 2016 clears ZF at the end even
        on an error; later ones do not, nor do we.
    """
    # Operands
    if rcx % PAGE_BYTES:
        raise GeneralProtection
    page = cpu.resolve(rcx)

    hw = cpu.hw
    with hw.leaf_locks() as locks:
        # Locks
        if not locks.shared(page):
            raise GeneralProtection
        # The tracking facility is the SECS's, so only a page that holds a SECS has one.
        enclave = page.enclave
        if enclave is not None and not locks.track(enclave):
            cpu.tracking_exit(ConflictCode.TRACKING_RESOURCE_CONFLICT, enclave.context)
            raise GeneralProtection

        # Checks
        if not page.valid_as(PageType.SECS):
            raise PageFault(rcx)
        assert enclave is not None, f"{page!r} holds no enclave"
        return _begin_cycle(cpu, enclave, "ETRACK")


def etrackc(cpu: LogicalProcessor, rcx: int) -> Status:
    """Begin a tracking cycle for the enclave that the page at ``rcx`` belongs to.

    Made for hypervisors: conflicts come as codes, and the SECS need not be known.

    Args:
        cpu: the processor it runs on.
        rcx: any page of the enclave, or its SECS, 4096-byte aligned.

    Returns:
        ``SUCCESS``.  Unchanged otherwise: ``EPC_PAGE_CONFLICT``, ``PG_INVLD``,
        ``TRACK_NOT_REQUIRED`` (a VA page), ``PREV_TRK_INCMPL``.

    Raises:
        GeneralProtection: ``rcx`` is misaligned.
        PageFault: ``rcx`` is no EPC page.
        VmExit: as for :func:`etrack`.

    Source:
        SDM vol. 3D, "ETRACKC", Operation.
    """
    # Operands
    if rcx % PAGE_BYTES:
        raise GeneralProtection
    page = cpu.resolve(rcx)

    hw = cpu.hw
    with hw.leaf_locks() as locks:
        # Locks, and the checks that come between them
        if not locks.shared(page):
            return Status.EPC_PAGE_CONFLICT
        if not page.valid:
            return Status.PG_INVLD
        if page.pt is not PageType.SECS and page.pt not in CHILD_TYPES:
            return Status.TRACK_NOT_REQUIRED
        enclave = page.owner
        if not locks.track(enclave):
            cpu.tracking_exit(ConflictCode.TRACKING_RESOURCE_CONFLICT, enclave.context)
            return Status.EPC_PAGE_CONFLICT
        return _begin_cycle(cpu, enclave, "ETRACKC")


def _begin_cycle(cpu: LogicalProcessor, enclave: ResidentSecs, leaf: str) -> Status:
    """Check that the previous cycle is complete and begin the next; the facility is locked."""
    hw = cpu.hw
    enclave.etrack_running = True
    try:
        hw.point(leaf)
        with hw.latch:
            begun = start_cycle(enclave)
    finally:
        enclave.etrack_running = False
    if not begun:
        cpu.tracking_exit(ConflictCode.TRACKING_REFERENCE_CONFLICT, enclave.context)
        return Status.PREV_TRK_INCMPL
    return Status.SUCCESS
