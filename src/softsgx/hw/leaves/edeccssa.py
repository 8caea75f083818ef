"""ENCLU[EDECCSSA]: give back the SSA frame of an exit that was notified."""

from __future__ import annotations

from softsgx.hw import cet, entry
from softsgx.hw.faults import GeneralProtection
from softsgx.hw.processor import LogicalProcessor

__all__ = ["edeccssa"]


def edeccssa(cpu: LogicalProcessor) -> None:
    """Decrement TCS.CSSA: the next asynchronous exit fills the frame below the current one.

    Args:
        cpu: the processor, inside an enclave.

    Raises:
        GeneralProtection: CSSA is 0, or another leaf holds the TCS.
        PageFault: a page of the frame below is not accessible as an SSA page.

    Source:
        SDM vol. 3D, "EDECCSSA", Operation.
    """
    hw, inside = cpu.hw, cpu.inside
    if inside is None or not hw.locks.shared(inside.tcs):
        raise GeneralProtection
    try:
        hw.point("EDECCSSA")
        tcs = entry.read_tcs(cpu, inside.tcs)
        if not tcs.cssa:
            raise GeneralProtection
        index, enclave = tcs.cssa - 1, inside.enclave
        ssa = entry.ssa_address(enclave, tcs, index)
        frame = entry.find_frame(cpu, inside.secs, enclave, ssa)
        slot = cet.find_slot(cpu, inside.secs, enclave, tcs.ocetssa, index)
        entry.write_cssa(cpu, inside.tcs, index)
        inside.frame, inside.cet_slot = frame, slot
    finally:
        hw.locks.release(inside.tcs)
