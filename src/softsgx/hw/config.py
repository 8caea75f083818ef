"""The configuration of a machine: EPC sections, features, processors.

Source:
    SDM vol. 3D, "Discovering Support for Intel SGX": CPUID.12H.
"""

from __future__ import annotations

from collections.abc import Mapping

from softsgx.arch import (
    INTEL_LEPUBKEYHASH,
    INTEL_XSAVE,
    PAGE_BYTES,
    SAPPHIRE_RAPIDS,
    AttributesFlags,
    EpcAddr,
    MiscSelect,
    ProcessorModel,
    SgxFeature,
    Xfrm,
)
from softsgx.errors import SoftSgxError
from softsgx.ondemand import dataclass, field

__all__ = ["DEFAULT_EPC_BASE", "EpcSection", "MachineConfig"]

DEFAULT_EPC_BASE = 0x50200000
_PHYSICAL_BITS = 52
_MAX_SECTIONS = 8


@dataclass(frozen=True, slots=True)
class EpcSection:
    """A contiguous range of EPC, as CPUID.12H sub-leaves from 2 list it.

    Attributes:
        base: physical address, page aligned.
        size: bytes, a multiple of 4096.
        node: NUMA node it belongs to.
        protection: ECX[3:0]; 1 says confidentiality and integrity.
    """

    base: int
    size: int
    node: int = 0
    protection: int = 1

    @property
    def pages(self) -> int:
        """EPC pages in it."""
        return self.size // PAGE_BYTES

    def page(self, index: int) -> EpcAddr:
        """Return the address of its ``index``-th page."""
        assert 0 <= index < self.pages, f"page {index} of a section of {self.pages}"
        return EpcAddr(self.base + index * PAGE_BYTES)


_SGX2_SERVER = (
    SgxFeature.SGX1
    | SgxFeature.SGX2
    | SgxFeature.ENCLV
    | SgxFeature.OVERSUB_ENCLS
    | SgxFeature.EVERIFYREPORT2
    | SgxFeature.EUPDATESVN
    | SgxFeature.EDECCSSA
)
_SAPPHIRE_RAPIDS_STATES = (
    Xfrm.X87
    | Xfrm.SSE
    | Xfrm.AVX
    | Xfrm.OPMASK
    | Xfrm.ZMM_HI256
    | Xfrm.HI16_ZMM
    | Xfrm.PKRU
    | Xfrm.TILECFG
    | Xfrm.TILEDATA
)
_ALL_ATTRIBUTES = (
    AttributesFlags.DEBUG
    | AttributesFlags.MODE64BIT
    | AttributesFlags.PROVISIONKEY
    | AttributesFlags.EINITTOKENKEY
    | AttributesFlags.KSS
    | AttributesFlags.AEXNOTIFY
)


@dataclass(frozen=True)
class MachineConfig:
    """The configuration of one machine; the constructor checks it.

    Attributes:
        sections: EPC sections in CPUID order, 1 to 8, page aligned, not overlapping.
        processors: logical processors.
        features: CPUID.12H.0:EAX.
        miscselect: CPUID.12H.0:EBX.
        attributes: settable SECS.ATTRIBUTES flags; CET here enables the CET rules.
        xfrm: settable SECS.ATTRIBUTES.XFRM.
        max_size_32, max_size_64: log2 of the CPUID limits on SECS.SIZE.
        xsave: XSAVE component number to (bytes, offset).
        cpusvn: the current CPUSVN, 16 components.
        microcode_svn: CPUSVN of the loaded microcode, which EUPDATESVN adopts.
        launch_key_hash: reset value of IA32_SGXLEPUBKEYHASH0–3.
        launch_control: whether those MSRs are writable (CPUID SGX_LC and FEATURE_CONTROL).
        cpu_nodes: NUMA node of each processor; node 0 where it is shorter.
        model: the parts of CPUID that do not describe SGX.
    """

    sections: tuple[EpcSection, ...] = (EpcSection(DEFAULT_EPC_BASE, 0x05D80000),)
    processors: int = 2
    features: SgxFeature = _SGX2_SERVER
    miscselect: MiscSelect = MiscSelect.EXINFO
    attributes: AttributesFlags = _ALL_ATTRIBUTES
    xfrm: int = int(_SAPPHIRE_RAPIDS_STATES)
    max_size_32: int = 31
    max_size_64: int = 56
    xsave: Mapping[int, tuple[int, int]] = field(default_factory=lambda: INTEL_XSAVE)
    cpusvn: bytes = bytes([1] * 8 + [0] * 8)
    microcode_svn: bytes = bytes([1] * 8 + [0] * 8)
    launch_key_hash: tuple[int, int, int, int] = INTEL_LEPUBKEYHASH
    launch_control: bool = True
    cpu_nodes: tuple[int, ...] = ()
    model: ProcessorModel = SAPPHIRE_RAPIDS

    def __post_init__(self) -> None:
        if not 1 <= len(self.sections) <= _MAX_SECTIONS:
            raise SoftSgxError(
                f"epc: {len(self.sections)} sections; give 1 to {_MAX_SECTIONS} sections"
            )
        if self.processors < 1:
            raise SoftSgxError(f"processors = {self.processors}: too few; give at least 1")
        end = 0
        for section in sorted(self.sections, key=lambda section: section.base):
            what = f"EPC section at {section.base:#x}, {section.size:#x} bytes"
            if section.base % PAGE_BYTES or section.size % PAGE_BYTES or section.size <= 0:
                raise SoftSgxError(f"{what}: not whole pages; give positive multiples of 4096")
            if section.base < end:
                raise SoftSgxError(f"{what}: overlaps the section below it; give a higher base")
            end = section.base + section.size
            if end > 1 << _PHYSICAL_BITS:
                raise SoftSgxError(
                    f"{what}: ends above {_PHYSICAL_BITS} physical address bits; give less EPC"
                )

    @classmethod
    def with_epc(cls, size: int, **changes: object) -> MachineConfig:
        """Return a machine with one EPC section of ``size`` bytes; other fields by keyword."""
        sections = (EpcSection(DEFAULT_EPC_BASE, size),)
        return cls(sections=sections, **changes)  # type: ignore[arg-type]

    @property
    def cet(self) -> bool:
        """Whether the machine has control-flow enforcement for enclaves."""
        return bool(self.attributes & AttributesFlags.CET)

    @property
    def xcr0(self) -> int:
        """XCR0 bits that the processor has: x87, SSE and every component of ``xsave``."""
        return int(Xfrm.X87 | Xfrm.SSE) | sum(1 << component for component in self.xsave)

    def xsave_bytes(self, xfrm: int) -> int:
        """Return the size of a non-compacted XSAVE area for ``xfrm``.

        Source:
            SDM vol. 3D, "ECREATE", Operation: the loop over CPUID.0DH.
        """
        offset, last = 576, 0
        for component in range(2, 63):
            if xfrm >> component & 1:
                size, at = self.xsave.get(component, (0, 0))
                if at >= offset + last:
                    offset, last = at, size
        return offset + last
