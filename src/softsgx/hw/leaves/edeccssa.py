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
    if inside is None:
        raise GeneralProtection

    with hw.leaf_locks() as locks:
        # Locks
        if not locks.shared(inside.tcs):
            raise GeneralProtection
        hw.point("EDECCSSA")

        # Checks
        tcs = entry.read_tcs(cpu, inside.tcs)
        if not tcs.cssa:
            raise GeneralProtection
        index, enclave = tcs.cssa - 1, inside.enclave
        ssa = entry.ssa_address(enclave, tcs, index)
        frame = entry.find_frame(cpu, inside.secs, enclave, ssa)
        slot = cet.find_slot(cpu, inside.secs, enclave, tcs.ocetssa, index)

        # Commit
        entry.write_cssa(cpu, inside.tcs, index)
        inside.frame, inside.cet_slot = frame, slot
