"""Reports and keys: the operands and results of EREPORT and EGETKEY.

Source:
    SDM vol. 3D, "Report (REPORT)", "Report Target Info (TARGETINFO)", "Key Request (KEYREQUEST)",
    "REPORTMACSTRUCT".
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from softsgx.arch.secs import Attributes
from softsgx.layout import U8, U16, U32, Nested, Raw, Structure, at

__all__ = [
    "REPORT_DATA_ALIGN",
    "REPORT_DATA_BYTES",
    "REPORT_MACED_BYTES",
    "KeyName",
    "KeyPolicy",
    "KeyRequest",
    "Report",
    "ReportMacStruct",
    "TargetInfo",
]

REPORT_DATA_BYTES = 64
REPORT_DATA_ALIGN = 128
REPORT_MACED_BYTES = 384


class KeyName(IntEnum):
    """KEYREQUEST.KEYNAME."""

    EINITTOKEN = 0
    PROVISION = 1
    PROVISION_SEAL = 2
    REPORT = 3
    SEAL = 4


class KeyPolicy(IntFlag):
    """KEYREQUEST.KEYPOLICY; bits 15:6 are reserved, bits 5:2 need ATTRIBUTES.KSS."""

    MRENCLAVE = 1 << 0
    MRSIGNER = 1 << 1
    NOISVPRODID = 1 << 2
    CONFIGID = 1 << 3
    ISVFAMILYID = 1 << 4
    ISVEXTPRODID = 1 << 5
    NEED_KSS = 0x3C
    RESERVED = 0xFFC0


class Report(Structure, size=432, align=512):
    """The identity of an enclave, MACed for another enclave on the same machine.

    Source:
        SDM vol. 3D, "Report (REPORT)".
    """

    cpusvn: bytes = at(0, Raw(16))
    miscselect: int = at(16, U32)
    cet_attributes: int = at(20, U8)
    reserved1: bytes = at(21, Raw(11))
    isv_ext_prod_id: bytes = at(32, Raw(16))
    attributes: Attributes = at(48, Nested(Attributes))
    mrenclave: bytes = at(64, Raw(32))
    reserved2: bytes = at(96, Raw(32))
    mrsigner: bytes = at(128, Raw(32))
    reserved3: bytes = at(160, Raw(32))
    config_id: bytes = at(192, Raw(64))
    isv_prod_id: int = at(256, U16)
    isv_svn: int = at(258, U16)
    config_svn: int = at(260, U16)
    reserved4: bytes = at(262, Raw(42))
    isv_family_id: bytes = at(304, Raw(16))
    report_data: bytes = at(320, Raw(64))
    key_id: bytes = at(384, Raw(32))
    mac: bytes = at(416, Raw(16))


class TargetInfo(Structure, size=512, align=512):
    """The enclave that a report is for.

    Source:
        SDM vol. 3D, "Report Target Info (TARGETINFO)".
    """

    measurement: bytes = at(0, Raw(32))
    attributes: Attributes = at(32, Nested(Attributes))
    cet_attributes: int = at(48, U8)
    reserved1: bytes = at(49, Raw(1))
    config_svn: int = at(50, U16)
    miscselect: int = at(52, U32)
    reserved2: bytes = at(56, Raw(8))
    config_id: bytes = at(64, Raw(64))
    reserved3: bytes = at(128, Raw(384))


class KeyRequest(Structure, size=512, align=512):
    """Which key EGETKEY derives.

    Source:
        SDM vol. 3D, "Key Request (KEYREQUEST)"; the CET mask's offset is from public headers.
    """

    key_name: int = at(0, U16)
    key_policy: int = at(2, U16)
    isv_svn: int = at(4, U16)
    cet_attributes_mask: int = at(6, U8)
    reserved1: bytes = at(7, Raw(1))
    cpusvn: bytes = at(8, Raw(16))
    attribute_mask: Attributes = at(24, Nested(Attributes))
    key_id: bytes = at(40, Raw(32))
    misc_mask: int = at(72, U32)
    config_svn: int = at(76, U16)
    reserved2: bytes = at(78, Raw(434))


class ReportMacStruct(Structure, size=256, align=256):
    """The MACed head of a report of another trusted environment.

    Source:
        "REPORTMACSTRUCT", TDX CPU architectural extensions.
    """

    type: int = at(0, U8)
    subtype: int = at(1, U8)
    version: int = at(2, U8)
    reserved1: bytes = at(3, Raw(1))
    reserved2: bytes = at(4, Raw(12))
    cpusvn: bytes = at(16, Raw(16))
    tee_tcb_info_hash: bytes = at(32, Raw(48))
    tee_info_hash: bytes = at(80, Raw(48))
    report_data: bytes = at(128, Raw(64))
    reserved3: bytes = at(192, Raw(32))
    mac: bytes = at(224, Raw(32))
