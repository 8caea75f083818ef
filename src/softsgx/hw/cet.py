"""Control-flow enforcement at entry and exit: save slots, SSP, IA32_U_CET.

Every function does nothing when the enclave or CR4 has no CET.

Source:
    SDM vol. 3D, "EENTER", "ERESUME", "EEXIT", Operation, the parts under CPUID's CET bits.  The
    order of the two fields of a save slot, and where the tracker waits for ENDBRANCH, were not
    checked against a page of the SDM.
"""

from __future__ import annotations

import struct

from softsgx.arch import PAGE_BYTES, AttributesFlags, CetAttributes, PageType, Tcs
from softsgx.hw.access import check_access, epc_operand, epc_refusal
from softsgx.hw.epcm import EpcPage
from softsgx.hw.faults import GeneralProtection
from softsgx.hw.processor import LogicalProcessor
from softsgx.hw.secs import ResidentSecs
from softsgx.hw.space import READ, WRITE

__all__ = [
    "CET_SLOT_BYTES",
    "expect_endbranch",
    "find_slot",
    "read_slot",
    "save_prevssp",
    "start",
    "waits_for_endbranch",
    "write_slot",
]

CET_SLOT_BYTES = 16
_SLOT = struct.Struct("<QQ")
_TRACKER_WAITS = 1 << 11
_SUPPRESS = 1 << 10
_USES = int(CetAttributes.SH_STK_EN | CetAttributes.ENDBR_EN)
_CET = int(AttributesFlags.CET)


def find_slot(
    cpu: LogicalProcessor, secs: EpcPage, enclave: ResidentSecs, ocetssa: int, index: int
) -> tuple[EpcPage, int] | None:
    """Return page and offset of the save slot of SSA frame ``index``; ``None`` without CET.

    Raises:
        GeneralProtection: the enclave has CET and CR4.CET is off, or OCETSSA is misaligned.
        PageFault: the slot's page is not SS_REST, readable and writable, of this enclave.
    """
    if not enclave.flags & _CET:
        return None
    if not cpu.cr4_cet:
        raise GeneralProtection
    if not enclave.cet_attributes & _USES:
        return None
    if ocetssa % CET_SLOT_BYTES:
        raise GeneralProtection
    linaddr = enclave.base + ocetssa + CET_SLOT_BYTES * index
    # Paging shows shadow-stack pages as read-only.
    page = epc_operand(cpu, linaddr, READ)
    fault = check_access(secs, page, linaddr, WRITE, shadow_stack=True)
    if fault is not None:
        raise fault
    if page.pt is not PageType.SS_REST or not page.rwx & READ:
        raise epc_refusal(linaddr, WRITE)
    return page, linaddr % PAGE_BYTES


def read_slot(cpu: LogicalProcessor, slot: tuple[EpcPage, int]) -> tuple[int, int]:
    """Return (SSP, IA32_U_CET) of a save slot."""
    page, offset = slot
    ssp, u_cet = _SLOT.unpack(cpu.hw.store.read(page, offset, CET_SLOT_BYTES))
    return ssp, u_cet


def write_slot(cpu: LogicalProcessor, slot: tuple[EpcPage, int]) -> None:
    """Save SSP and IA32_U_CET."""
    page, offset = slot
    cpu.hw.store.write(page, offset, _SLOT.pack(cpu.ssp, cpu.u_cet))


def start(cpu: LogicalProcessor, enclave: ResidentSecs, prevssp: int) -> None:
    """Set the enclave's CET state for a thread that starts at its entry point."""
    if not cpu.cr4_cet:
        return
    attributes = enclave.cet_attributes
    cpu.u_cet = attributes
    if attributes & CetAttributes.LEG_IW_EN:
        cpu.u_cet |= enclave.base + enclave.cet_leg_bitmap_offset
    if attributes & CetAttributes.SH_STK_EN:
        cpu.ssp = prevssp
    expect_endbranch(cpu)


def save_prevssp(cpu: LogicalProcessor, enclave: ResidentSecs, tcs: EpcPage) -> None:
    """Write TCS.PREVSSP, from which the thread's next entry loads SSP."""
    if enclave.flags & _CET and enclave.cet_attributes & CetAttributes.SH_STK_EN:
        cpu.hw.store.write(tcs, Tcs.OFFSETS["prevssp"], cpu.ssp.to_bytes(8, "little"))


def expect_endbranch(cpu: LogicalProcessor) -> None:
    """Make the indirect-branch tracker wait for ENDBRANCH, as after an indirect jump."""
    if cpu.cr4_cet and cpu.u_cet & CetAttributes.ENDBR_EN:
        cpu.u_cet = cpu.u_cet & ~_SUPPRESS | _TRACKER_WAITS


def waits_for_endbranch(cpu: LogicalProcessor) -> bool:
    """Return whether the next instruction must be ENDBRANCH or raise #CP."""
    return bool(cpu.cr4_cet and cpu.u_cet & CetAttributes.ENDBR_EN and cpu.u_cet & _TRACKER_WAITS)
