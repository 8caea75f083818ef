"""ENCLU[EENTER]: enter an enclave."""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES, is_canonical
from softsgx.hw import cet, entry
from softsgx.hw.access import epc_operand
from softsgx.hw.faults import GeneralProtection
from softsgx.hw.processor import LogicalProcessor
from softsgx.hw.space import READ

__all__ = ["eenter"]


def eenter(cpu: LogicalProcessor, rbx: int, rcx: int) -> None:
    """Enter the enclave of the TCS at ``rbx``, at its entry point.

    ``cpu.regs.rip`` is the address of the ENCLU.  On success RIP is the entry point, RAX the
    TCS's CSSA, RCX the address after the ENCLU; all other general registers keep their values.

    Args:
        cpu: the processor, outside an enclave.
        rbx: the TCS, 4096-byte aligned.
        rcx: AEP, where an asynchronous exit goes.

    Raises:
        GeneralProtection: an operand is misaligned or not canonical, another leaf holds the TCS,
            the TCS is active or has no free SSA frame, its fields or the processor's setting do
            not fit the enclave, or the enclave is not initialised.
        PageFault: the TCS, or a page of its SSA frame, is not accessible as such; without the SGX
            bit when paging refuses it.

    Source:
        SDM vol. 3D, "EENTER", Operation.
    """
    if cpu.inside is not None:
        raise GeneralProtection

    # Operands
    entry.check_segments(cpu)
    if rbx % PAGE_BYTES:
        raise GeneralProtection
    page = epc_operand(cpu, rbx, READ, stores=True)
    if cpu.mode64 and not is_canonical(rcx):
        raise GeneralProtection

    hw = cpu.hw
    with hw.leaf_locks() as locks:
        # Locks
        if not locks.shared(page):
            raise GeneralProtection
        with entry.Entry(cpu, page, rbx) as admitted:
            # Checks
            secs, enclave = admitted.secs, admitted.enclave
            tcs = entry.check_tcs(cpu, page, rbx, enclave)
            if tcs.cssa >= tcs.nssa:
                raise GeneralProtection
            frame = entry.find_frame(cpu, secs, enclave, entry.ssa_address(enclave, tcs, tcs.cssa))
            hw.point("EENTER")
            target = enclave.base + tcs.oentry
            fs_base, gs_base = enclave.base + tcs.ofs_base, enclave.base + tcs.ogs_base
            entry.check_thread_segments(cpu, tcs, target, fs_base, gs_base)
            admitted.claim_tcs()
            slot = cet.find_slot(cpu, secs, enclave, tcs.ocetssa, tcs.cssa)

            # Commit
            entry.enter_enclave_mode(cpu, page, admitted, tcs, frame, slot, rcx, fs_base, gs_base)
            entry.start_at_entry_point(cpu, enclave, tcs, frame, target)
            enclave.crossings.eenter += 1
