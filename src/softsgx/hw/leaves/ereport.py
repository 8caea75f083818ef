"""ENCLU[EREPORT]: an enclave's statement of itself to another enclave on the same machine."""

from __future__ import annotations

from softsgx.arch import (
    PAGE_BYTES,
    REPORT_DATA_ALIGN,
    REPORT_DATA_BYTES,
    REPORT_MACED_BYTES,
    Attributes,
    Report,
    TargetInfo,
)
from softsgx.hw.access import enclave_operand
from softsgx.hw.faults import GeneralProtection
from softsgx.hw.keys import derive, target_report_key
from softsgx.hw.processor import LogicalProcessor
from softsgx.hw.secrets import cmac
from softsgx.hw.secs import ResidentSecs
from softsgx.hw.space import READ, WRITE

__all__ = ["ereport"]


def ereport(cpu: LogicalProcessor, rbx: int, rcx: int, rdx: int) -> None:
    """Write a REPORT of the running enclave that the target enclave can verify.

    Args:
        cpu: the processor, inside an enclave.
        rbx: TARGETINFO, 512-byte aligned.
        rcx: REPORTDATA, 64 bytes, 128-byte aligned.
        rdx: where the 432 bytes of REPORT go, 512-byte aligned.

    Raises:
        GeneralProtection: an operand is misaligned or outside ELRANGE, or TARGETINFO has reserved
            bits.
        PageFault: an operand is in no accessible REG page of the enclave.

    Source:
        SDM vol. 3D, "EREPORT", Operation.
    """
    assert cpu.inside is not None, "EREPORT outside an enclave"
    secs, hw = cpu.inside.enclave, cpu.hw

    # Operands, and the checks of TARGETINFO
    if rbx % TargetInfo.ALIGN or not secs.covers(rbx):
        raise GeneralProtection
    target_page = enclave_operand(cpu, rbx, READ)
    target = TargetInfo.unpack(hw.store.read(target_page, rbx % PAGE_BYTES, TargetInfo.SIZE))
    if any(target.reserved1 + target.reserved2 + target.reserved3):
        raise GeneralProtection
    if target.cet_attributes and not hw.config.cet:
        raise GeneralProtection
    if rcx % REPORT_DATA_ALIGN or not secs.covers(rcx):
        raise GeneralProtection
    data_page = enclave_operand(cpu, rcx, READ)
    if rdx % Report.ALIGN or not secs.covers(rdx):
        raise GeneralProtection
    output_page = enclave_operand(cpu, rdx, WRITE)

    hw.point("EREPORT")

    # Commit
    report = _about(secs)
    report.cpusvn, report.key_id = hw.cpusvn, hw.secrets.report_key_id
    report.report_data = hw.store.read(data_page, rcx % PAGE_BYTES, REPORT_DATA_BYTES)
    key = derive(hw, target_report_key(hw, secs, target))
    report.mac = cmac(key, report.pack()[:REPORT_MACED_BYTES])
    hw.store.write(output_page, rdx % PAGE_BYTES, report.pack())


def _about(secs: ResidentSecs) -> Report:
    """Return a REPORT with everything that SECS says."""
    return Report(
        miscselect=secs.miscselect,
        cet_attributes=secs.cet_attributes,
        isv_ext_prod_id=secs.isv_ext_prod_id,
        attributes=Attributes(flags=secs.flags, xfrm=secs.xfrm),
        mrenclave=secs.mrenclave,
        mrsigner=secs.mrsigner,
        config_id=secs.config_id,
        isv_prod_id=secs.isv_prod_id,
        isv_svn=secs.isv_svn,
        config_svn=secs.config_svn,
        isv_family_id=secs.isv_family_id,
    )
