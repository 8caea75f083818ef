"""ENCLS[ETRACK] and ENCLS[ETRACKC]: begin a tracking cycle."""

from __future__ import annotations

from softsgx.arch import CHILD_TYPES, PAGE_BYTES, ConflictCode, PageType, Status
from softsgx.hw.enclave import Enclave
from softsgx.hw.faults import GeneralProtection, PageFault
from softsgx.hw.processor import LogicalProcessor
from softsgx.hw.tracking import start_cycle

__all__ = ["etrack", "etrackc"]


def etrack(cpu: LogicalProcessor, rcx: int) -> Status:
    """Begin a tracking cycle for the enclave whose SECS is at ``rcx``.

    Nobody is interrupted: the cycle completes when every processor that was inside has left.

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
    if rcx % PAGE_BYTES:
        raise GeneralProtection
    page = cpu.resolve(rcx)

    hw = cpu.hw
    if not hw.locks.shared(page):
        raise GeneralProtection
    try:
        # The facility belongs to the SECS that the page holds; a page without one has none.
        enclave = page.enclave
        if enclave is not None and not hw.locks.track(enclave):
            cpu.tracking_exit(ConflictCode.TRACKING_RESOURCE_CONFLICT, enclave.context)
            raise GeneralProtection
        try:
            if not page.valid or page.pt is not PageType.SECS or enclave is None:
                raise PageFault(rcx)
            return _begin(cpu, enclave, "ETRACK")
        finally:
            if enclave is not None:
                enclave.lock_t = False
    finally:
        hw.locks.release(page)


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
    if rcx % PAGE_BYTES:
        raise GeneralProtection
    page = cpu.resolve(rcx)

    hw = cpu.hw
    if not hw.locks.shared(page):
        return Status.EPC_PAGE_CONFLICT
    try:
        if not page.valid:
            return Status.PG_INVLD
        if page.pt is not PageType.SECS and page.pt not in CHILD_TYPES:
            return Status.TRACK_NOT_REQUIRED
        enclave = page.owner
        if not hw.locks.track(enclave):
            cpu.tracking_exit(ConflictCode.TRACKING_RESOURCE_CONFLICT, enclave.context)
            return Status.EPC_PAGE_CONFLICT
        try:
            return _begin(cpu, enclave, "ETRACKC")
        finally:
            enclave.lock_t = False
    finally:
        hw.locks.release(page)


def _begin(cpu: LogicalProcessor, enclave: Enclave, where: str) -> Status:
    """Start the cycle; the tracking facility is held."""
    enclave.tracking = True
    try:
        cpu.hw.point(where)
        with cpu.hw.latch:
            complete = start_cycle(enclave)
    finally:
        enclave.tracking = False
    if not complete:
        cpu.tracking_exit(ConflictCode.TRACKING_REFERENCE_CONFLICT, enclave.context)
        return Status.PREV_TRK_INCMPL
    return Status.SUCCESS
