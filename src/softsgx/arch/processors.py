"""The Intel processors of the profiles: their CPUID, without the leaves of SGX.

Feature words hold the features that user mode can use and that operating systems enable: no
performance counters, no processor trace, no resource directory, no key locker.

Source:
    SDM vol. 2A, "CPUID"; vol. 4, tables of display family and model.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from softsgx.ondemand import dataclass

__all__ = [
    "INTEL_VENDOR",
    "INTEL_XSAVE",
    "SAPPHIRE_RAPIDS",
    "SKYLAKE_CLIENT",
    "XSAVE_ALIGNED",
    "XSAVE_LEGACY_BYTES",
    "Cache",
    "CpuidWord",
    "ProcessorModel",
]

INTEL_VENDOR = b"GenuineIntel"

CpuidWord = tuple[int, int, int]
"""Leaf, sub-leaf, and 0 to 3 for EAX, EBX, ECX, EDX."""

INTEL_XSAVE: Mapping[int, tuple[int, int]] = MappingProxyType(
    {
        2: (256, 576),  # AVX
        3: (64, 960),  # BNDREGS
        4: (64, 1024),  # BNDCSR
        5: (64, 1088),  # opmask
        6: (512, 1152),  # ZMM_Hi256
        7: (1024, 1664),  # Hi16_ZMM
        9: (8, 2688),  # PKRU
        17: (64, 2752),  # TILECFG
        18: (8192, 2816),  # TILEDATA
    }
)
"""XSAVE component: (bytes, offset in the non-compacted area), on every Intel processor."""

XSAVE_ALIGNED = frozenset({17, 18})
"""Components that start at a multiple of 64 in the compacted form."""
XSAVE_LEGACY_BYTES = 576
"""Legacy region and header: an XSAVE area with XFRM = 3."""


@dataclass(frozen=True, slots=True)
class Cache:
    """One cache, as leaf 4 lists it.

    Attributes:
        kind: 1 data, 2 instructions, 3 both.
        level: 1 to 3.
        ways, sets: its geometry; lines have 64 bytes.
        shared: whether all processors of the package use it, or only one.
        properties: EDX: inclusive, complex indexing.
    """

    kind: int
    level: int
    ways: int
    sets: int
    shared: bool = False
    properties: int = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return self.ways * self.sets * 64


@dataclass(frozen=True, slots=True)
class ProcessorModel:
    """The CPUID of a processor, without the bits that depend on the system and on SGX.

    Attributes:
        signature: CPUID.01H:EAX: family, model, stepping.
        brand: its name, without the frequency.
        highest_basic: CPUID.00H:EAX.
        features: feature words; those that are not listed are zero.
        caches: in the order of leaf 4.
        crystal_hz: CPUID.15H:ECX.
        max_mhz: CPUID.16H:EBX.
        physical_bits, linear_bits: CPUID.80000008H:EAX.
    """

    signature: int
    brand: str
    highest_basic: int
    features: Mapping[CpuidWord, int]
    caches: tuple[Cache, ...]
    crystal_hz: int
    max_mhz: int
    physical_bits: int
    linear_bits: int


_EAX, _EBX, _ECX, _EDX = range(4)

SKYLAKE_CLIENT = ProcessorModel(
    signature=0x506E3,  # family 6, model 5EH, stepping 3
    brand="Intel(R) Core(TM) i7-6700K CPU",
    highest_basic=0x16,
    features=MappingProxyType(
        {
            (1, 0, _ECX): 0x7FFA_7BB7,
            (1, 0, _EDX): 0xBFEB_FBFF,
            (7, 0, _EBX): 0x009C_6FFB,
            (7, 0, _EDX): 0x9C00_0400,
            (0xD, 1, _EAX): 0xF,
            (0x8000_0001, 0, _ECX): 0x121,
            (0x8000_0001, 0, _EDX): 0x2C10_0800,
            (0x8000_0007, 0, _EDX): 0x100,
        }
    ),
    caches=(
        Cache(1, 1, 8, 64),
        Cache(2, 1, 8, 64),
        Cache(3, 2, 4, 1024),
        Cache(3, 3, 16, 8192, shared=True, properties=6),
    ),
    crystal_hz=24_000_000,
    max_mhz=4200,
    physical_bits=39,
    linear_bits=48,
)
"""The Skylake client of the first SGX machines, with the microcode of 2018's mitigations."""

SAPPHIRE_RAPIDS = ProcessorModel(
    signature=0x806F8,  # family 6, model 8FH, stepping 8
    brand="Intel(R) Xeon(R) Platinum 8480+",
    highest_basic=0x20,
    features=MappingProxyType(
        {
            (1, 0, _ECX): 0x7FFA_7BF7,
            (1, 0, _EDX): 0xBFEB_FBFF,
            (7, 0, _EAX): 2,
            (7, 0, _EBX): 0xF1BF_2FFB,
            (7, 0, _ECX): 0x9B41_5FFE,
            (7, 0, _EDX): 0xFFD1_4410,
            (7, 1, _EAX): 0x1C30,
            (7, 2, _EDX): 0x17,
            (0xD, 1, _EAX): 0x1F,
            (0x8000_0001, 0, _ECX): 0x121,
            (0x8000_0001, 0, _EDX): 0x2C10_0800,
            (0x8000_0007, 0, _EDX): 0x100,
            (0x8000_0008, 0, _EBX): 0x200,
        }
    ),
    caches=(
        Cache(1, 1, 12, 64),
        Cache(2, 1, 8, 64),
        Cache(3, 2, 16, 2048),
        Cache(3, 3, 15, 114_688, shared=True, properties=4),
    ),
    crystal_hz=25_000_000,
    max_mhz=3800,
    physical_bits=46,
    linear_bits=57,
)
"""A server with SGX2, EDECCSSA and AEX-Notify."""
