"""ENCLU[EVERIFYREPORT2]: verify the MAC of another trusted environment's report."""

from __future__ import annotations

import hmac

from softsgx.arch import PAGE_BYTES, ReportMacStruct, Status
from softsgx.hw.access import enclave_operand
from softsgx.hw.checks import svn_beyond
from softsgx.hw.faults import GeneralProtection
from softsgx.hw.processor import LogicalProcessor
from softsgx.hw.space import READ

__all__ = ["everifyreport2"]

_TYPE_TDX = 0x81
_MACED_BYTES = ReportMacStruct.OFFSETS["mac"]


def everifyreport2(cpu: LogicalProcessor, rbx: int) -> Status:
    """Check whether this package made the REPORTMACSTRUCT at ``rbx``.

    Args:
        cpu: the processor, inside an enclave.
        rbx: REPORTMACSTRUCT, 256-byte aligned.

    Returns:
        ``SUCCESS``, ``INVALID_REPORTMACSTRUCT`` (type, reserved bytes or MAC), ``INVALID_CPUSVN``
        (beyond the platform's).

    Raises:
        GeneralProtection: ``rbx`` is misaligned or outside ELRANGE.
        PageFault: ``rbx`` is in no accessible REG page of the enclave.

    Source:
        "EVERIFYREPORT2", TDX CPU architectural extensions, Operation.
    """
    assert cpu.inside is not None, "EVERIFYREPORT2 outside an enclave"
    hw = cpu.hw

    # Operands
    if rbx % ReportMacStruct.ALIGN or not cpu.inside.enclave.covers(rbx):
        raise GeneralProtection
    page = enclave_operand(cpu, rbx, READ)
    hw.point("EVERIFYREPORT2")

    # Checks
    data = hw.store.read(page, rbx % PAGE_BYTES, ReportMacStruct.SIZE)
    report = ReportMacStruct.unpack(data)
    if (report.type, report.subtype, report.version) != (_TYPE_TDX, 0, 0):
        return Status.INVALID_REPORTMACSTRUCT
    if any(report.reserved1 + report.reserved2 + report.reserved3):
        return Status.INVALID_REPORTMACSTRUCT
    if svn_beyond(report.cpusvn, hw.cpusvn):
        return Status.INVALID_CPUSVN
    mac = hmac.digest(hw.secrets.tee_report_key, data[:_MACED_BYTES], "sha256")
    if not hmac.compare_digest(mac, report.mac):
        return Status.INVALID_REPORTMACSTRUCT
    return Status.SUCCESS
