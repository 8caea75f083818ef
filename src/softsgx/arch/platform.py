"""CPUID, MSRs, page-fault codes and VM exits as far as SGX uses them.

Source:
    SDM vol. 3D, "Discovering Support for Intel SGX"; vol. 4, MSR tables; vol. 3C, "VM exits".
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

__all__ = [
    "CPUID_SGX_LEAF",
    "EPC_SECTION_TYPE",
    "FEATURE_CONTROL_READY",
    "INTEL_LEPUBKEYHASH",
    "ConflictCode",
    "Cpuid7Ebx",
    "Cpuid7Ecx",
    "FeatureControl",
    "Msr",
    "Pfec",
    "SgxFeature",
    "VmExitReason",
]

CPUID_SGX_LEAF = 0x12
EPC_SECTION_TYPE = 1


class Cpuid7Ebx(IntFlag):
    """CPUID.07H.0:EBX."""

    FSGSBASE = 1 << 0
    SGX = 1 << 2


class Cpuid7Ecx(IntFlag):
    """CPUID.07H.0:ECX."""

    SGX_LC = 1 << 30


class SgxFeature(IntFlag):
    """CPUID.12H.0:EAX."""

    SGX1 = 1 << 0
    SGX2 = 1 << 1
    ENCLV = 1 << 5
    OVERSUB_ENCLS = 1 << 6
    EVERIFYREPORT2 = 1 << 7
    EUPDATESVN = 1 << 10
    EDECCSSA = 1 << 11


class Msr(IntEnum):
    """Model-specific registers."""

    IA32_FEATURE_CONTROL = 0x3A
    IA32_SGXLEPUBKEYHASH0 = 0x8C
    IA32_SGXLEPUBKEYHASH1 = 0x8D
    IA32_SGXLEPUBKEYHASH2 = 0x8E
    IA32_SGXLEPUBKEYHASH3 = 0x8F
    MSR_SGXOWNER0 = 0x300
    MSR_SGXOWNER1 = 0x301
    IA32_SGX_SVN_STATUS = 0x500


class FeatureControl(IntFlag):
    """IA32_FEATURE_CONTROL."""

    LOCK = 1 << 0
    SGX_LAUNCH_CONTROL = 1 << 17
    SGX_ENABLE = 1 << 18


FEATURE_CONTROL_READY = FeatureControl.LOCK | FeatureControl.SGX_ENABLE

INTEL_LEPUBKEYHASH = (
    0xA6053E051270B7AC,
    0x6CFBE8BA8B3B413D,
    0xC4916D99F2B3735D,
    0xD4F8C05909F9BB3B,
)
"""Reset value of IA32_SGXLEPUBKEYHASH0–3: the digest of Intel's launch key."""


class Pfec(IntFlag):
    """Page-fault error code."""

    P = 1 << 0
    W = 1 << 1
    U = 1 << 2
    RSVD = 1 << 3
    I = 1 << 4  # noqa: E741 - the manual's name
    PK = 1 << 5
    SS = 1 << 6
    SGX = 1 << 15


class VmExitReason(IntEnum):
    """Basic exit reasons."""

    EPT_VIOLATION = 48
    ENCLS = 60
    ENCLV = 70
    SGX_CONFLICT = 71


class ConflictCode(IntEnum):
    """Exit qualification of SGX_CONFLICT, bits 15:0."""

    TRACKING_RESOURCE_CONFLICT = 0
    TRACKING_REFERENCE_CONFLICT = 1
    EPC_PAGE_CONFLICT_EXCEPTION = 2
    EPC_PAGE_CONFLICT_ERROR = 3
