"""The parts of CPUID that describe SGX: leaves 07H, 0DH and 12H of a configuration.

Source:
    SDM vol. 2A, "CPUID"; vol. 3D, "Discovering Support for Intel SGX".
"""

from __future__ import annotations

from typing import NamedTuple

from softsgx.arch import (
    CPUID_SGX_LEAF,
    EPC_SECTION_TYPE,
    Cpuid7Ebx,
    Cpuid7Ecx,
    SgxFeature,
)
from softsgx.hw.config import EpcSection, MachineConfig

__all__ = ["CpuidResult", "cpuid"]

_FEATURES_LEAF, _XSAVE_LEAF = 0x07, 0x0D
_SGX_KEYS = 1 << 1  # CPUID.07H.0:EDX
_LOW_32 = 0xFFFF_FFFF
_SECTION_SUBLEAF = 2
_PAGE_BITS = 0xFFFF_F000
_HIGH_BITS = 0xF_FFFF


class CpuidResult(NamedTuple):
    """EAX, EBX, ECX, EDX."""

    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


def cpuid(config: MachineConfig, leaf: int, subleaf: int = 0, *, xcr0: int = 3) -> CpuidResult:
    """Return what CPUID gives; zeros for a leaf or bit that does not describe SGX.

    The result does not depend on IA32_FEATURE_CONTROL.

    Args:
        config: the machine.
        leaf: EAX.
        subleaf: ECX.
        xcr0: the processor's XCR0, which CPUID.0DH.0:EBX reports the size of.
    """
    if leaf == _FEATURES_LEAF and subleaf == 0:
        return _features(config)
    if leaf == _XSAVE_LEAF:
        return _xsave(config, subleaf, xcr0)
    if leaf == CPUID_SGX_LEAF and config.features & SgxFeature.SGX1:
        return _sgx(config, subleaf)
    return CpuidResult()


def _features(config: MachineConfig) -> CpuidResult:
    ebx, ecx, edx = int(Cpuid7Ebx.FSGSBASE), 0, 0
    if config.features & SgxFeature.SGX1:
        ebx, edx = ebx | Cpuid7Ebx.SGX, _SGX_KEYS
        if config.launch_control:
            ecx = int(Cpuid7Ecx.SGX_LC)
    return CpuidResult(0, ebx, ecx, edx)


def _xsave(config: MachineConfig, subleaf: int, xcr0: int) -> CpuidResult:
    if subleaf == 0:
        every = config.xcr0
        return CpuidResult(
            every & _LOW_32, config.xsave_bytes(xcr0), config.xsave_bytes(every), every >> 32
        )
    size, offset = config.xsave.get(subleaf, (0, 0))
    return CpuidResult(size, offset)


def _sgx(config: MachineConfig, subleaf: int) -> CpuidResult:
    if subleaf == 0:
        sizes = config.max_size_64 << 8 | config.max_size_32
        return CpuidResult(int(config.features), int(config.miscselect), 0, sizes)
    if subleaf == 1:
        flags, xfrm = int(config.attributes), int(config.xfrm)
        return CpuidResult(flags & _LOW_32, flags >> 32, xfrm & _LOW_32, xfrm >> 32)
    if subleaf < _SECTION_SUBLEAF + len(config.sections):
        return _section(config.sections[subleaf - _SECTION_SUBLEAF])
    return CpuidResult()


def _section(section: EpcSection) -> CpuidResult:
    return CpuidResult(
        section.base & _PAGE_BITS | EPC_SECTION_TYPE,
        section.base >> 32 & _HIGH_BITS,
        section.size & _PAGE_BITS | section.protection,
        section.size >> 32 & _HIGH_BITS,
    )
