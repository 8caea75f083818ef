"""ENCLU[EEXIT]: leave an enclave."""

from __future__ import annotations

from softsgx.arch import is_canonical
from softsgx.hw import cet, entry
from softsgx.hw.faults import GeneralProtection
from softsgx.hw.processor import LogicalProcessor

__all__ = ["eexit"]


def eexit(cpu: LogicalProcessor, rbx: int) -> None:
    """Leave the enclave for ``rbx``.

    RIP becomes ``rbx`` and RCX the AEP; FS, GS, XCR0, TF and the CET state are the outside's
    again.  Nothing else changes: RSP, RBP and every other register go out as they are.

    Args:
        cpu: the processor, inside an enclave.
        rbx: where to go; an address in the enclave is taken, and the next fetch gives ones.

    Raises:
        GeneralProtection: ``rbx`` is not canonical, or in 32-bit mode beyond CS.

    Source:
        SDM vol. 3D, "EEXIT", Operation.
    """
    cpu.hw.point("EEXIT")

    # Checks
    inside, regs = cpu.inside, cpu.regs
    if inside is None:
        raise GeneralProtection
    if not is_canonical(rbx) if cpu.mode64 else rbx > cpu.cs.limit:
        raise GeneralProtection

    # Commit
    cet.save_prevssp(cpu, inside.enclave, inside.tcs)
    regs.rip, regs.rcx = rbx, entry.read_aep(cpu, inside.tcs)
    entry.leave_enclave_mode(cpu)
    inside.enclave.crossings.eexit += 1
    cet.expect_endbranch(cpu)
