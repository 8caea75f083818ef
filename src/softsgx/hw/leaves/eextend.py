"""ENCLS[EEXTEND]: measure 256 bytes of a page."""

from __future__ import annotations

from softsgx.arch import CHUNK_BYTES, PAGE_BYTES, PageType, eextend_block
from softsgx.hw.faults import GeneralProtection, PageFault
from softsgx.hw.processor import LogicalProcessor

__all__ = ["eextend"]

_MEASURABLE = frozenset({PageType.REG, PageType.TCS, PageType.SS_FIRST, PageType.SS_REST})


def eextend(cpu: LogicalProcessor, rbx: int, rcx: int) -> None:
    """Extend the measurement of an enclave by the chunk of 256 bytes at ``rcx``.

    Nothing makes software measure all chunks of a page, in order, or only once.

    Args:
        cpu: the processor it runs on.
        rbx: the SECS, 4096-byte aligned.
        rcx: the chunk in a page of that enclave, 256-byte aligned.

    Raises:
        GeneralProtection: an operand is misaligned, the page is not of that enclave, the enclave
            is initialised, or another leaf holds the page or the measurement.
        PageFault: an operand is no EPC page; the page is not in use or not of a measurable type.

    Source:
        SDM vol. 3D, "EEXTEND", Operation.
    """
    # Operands
    if rbx % PAGE_BYTES:
        raise GeneralProtection
    secs = cpu.resolve(rbx)
    if rcx % CHUNK_BYTES:
        raise GeneralProtection
    page = cpu.resolve(rcx)

    hw = cpu.hw
    with hw.leaf_locks() as locks:
        # Locks, and the checks that come between them
        if not locks.shared(page):
            raise GeneralProtection
        if not page.valid or page.pt not in _MEASURABLE:
            raise PageFault(rcx)
        if page.secs is not secs:
            raise GeneralProtection
        enclave = page.owner
        if not locks.measure(enclave):
            raise GeneralProtection
        hw.point("EEXTEND")

        # Checks
        if enclave.initialized:
            raise GeneralProtection

        # Commit
        offset = rcx % PAGE_BYTES
        hw.measurements[enclave.eid].update(
            eextend_block(page.linaddr - enclave.base + offset)
            + hw.store.read(page, offset, CHUNK_BYTES)
        )
