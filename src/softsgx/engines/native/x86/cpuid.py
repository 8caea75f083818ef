"""CPUID of this machine, and as a program may see it: with SGX of the software machine.

Source:
    SDM vol. 2A, "CPUID"; vol. 3D, "Discovering Support for Intel SGX"; SDM vol. 3D, CPUID.12H.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable, Mapping
from functools import cache
from typing import TypeAlias

from softsgx.arch import CPUID_SGX_LEAF, Cpuid7Ebx, Cpuid7Ecx
from softsgx.hw import MachineConfig
from softsgx.hw.cpuid import cpuid

__all__ = [
    "CpuidLeaf",
    "HostCpuid",
    "host_cpuid",
    "instruction",
    "virtual_leaf",
    "xsave_components",
]

CpuidLeaf: TypeAlias = tuple[int, int, int, int]
"""EAX, EBX, ECX, EDX."""

_SGX_LEAF = CPUID_SGX_LEAF
_FEATURES_LEAF = 7
_HIGHEST_BASIC = 0x24
_HYPERVISOR, _HIGHEST_HYPERVISOR, _HYPERVISOR_BIT = 0x4000_0000, 0x4000_0010, 1 << 31
_HIGHEST_EXTENDED = 0x8000_0028
_SUBLEAVES = {4: 16, 7: 4, 0xB: 8, 0xD: 64, 0xF: 4, 0x10: 4, 0x14: 4, 0x17: 4, 0x18: 16}
_CACHES, _CACHE_TYPE = frozenset({4, 0x8000_001D}), 0x1F
_COUNTED = frozenset({7, 0x14, 0x18})  # EAX of sub-leaf 0 is the last one
_XSAVE_LEAF, _XSAVE_ITSELF = 0xD, 3
_SUBLEAVES |= {0x1D: 2, 0x1E: 2, 0x1F: 8, 0x24: 2, 0x8000_001D: 16, 0x8000_0026: 8}

# push rbx; mov r9,rdx (out); mov eax,edi; mov ecx,esi; cpuid; store four words; pop rbx; ret
_THUNK = bytes.fromhex(
    "53 4989d1 89f8 89f1 0fa2 418901 41895904 41894908 4189510c 5b c3".replace(" ", "")
)


class HostCpuid:
    """Every leaf of this machine, read once: later CPUID may fault in our own process too."""

    def __init__(self, execute: Callable[[int, int], CpuidLeaf]) -> None:
        self._leaves: dict[tuple[int, int], CpuidLeaf] = {}
        for first, limit in ((0, _HIGHEST_BASIC), (0x8000_0000, _HIGHEST_EXTENDED)):
            highest = min(execute(first, 0)[0], limit)
            for leaf in range(first, highest + 1):
                self._read(leaf, execute)
        if self(1, 0)[2] & _HYPERVISOR_BIT:
            for leaf in range(_HYPERVISOR, _HIGHEST_HYPERVISOR + 1):
                if leaf <= max(execute(_HYPERVISOR, 0)[0], _HYPERVISOR + 1):
                    self._leaves[leaf, 0] = execute(leaf, 0)

    def _read(self, leaf: int, execute: Callable[[int, int], CpuidLeaf]) -> None:
        """Read the sub-leaves that a leaf says it has; the others are zeros.

        In a virtual machine each CPUID is an exit, which takes ten microseconds and more.
        """
        last, components = _SUBLEAVES.get(leaf, 1) - 1, -1
        for sub in range(last + 1):
            if sub > last or not components >> sub & 1:
                continue
            eax, _ebx, ecx, edx = self._leaves[leaf, sub] = execute(leaf, sub)
            if leaf in _CACHES and not eax & _CACHE_TYPE:
                last = sub
            elif leaf in _COUNTED and sub == 0:
                last = min(last, eax)
            elif leaf == _XSAVE_LEAF and sub == 0:
                components = eax | edx << 32 | _XSAVE_ITSELF
            elif leaf == _XSAVE_LEAF and sub == 1:
                components |= ecx | edx << 32

    def __call__(self, leaf: int, sub: int) -> CpuidLeaf:
        """Return a leaf; zeros where there is none."""
        found = self._leaves.get((leaf, sub if leaf in _SUBLEAVES else 0))
        return (0, 0, 0, 0) if found is None else found


@cache
def host_cpuid() -> HostCpuid:
    """Read this machine's CPUID."""
    return HostCpuid(instruction())


def instruction() -> Callable[[int, int], CpuidLeaf]:
    """Return what executes CPUID in this process, with EAX and ECX."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(_THUNK)
    anchor = ctypes.c_char.from_buffer(page)
    thunk = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(
        ctypes.addressof(anchor)
    )
    out = ctypes.create_string_buffer(16)

    def execute(leaf: int, sub: int, _keeps: object = anchor) -> CpuidLeaf:
        thunk(leaf, sub, ctypes.addressof(out))
        eax, ebx, ecx, edx = struct.unpack("<4I", out.raw)
        return eax, ebx, ecx, edx

    return execute


def virtual_leaf(host: HostCpuid, config: MachineConfig, leaf: int, sub: int) -> CpuidLeaf:
    """Return what CPUID gives a program that sees this machine, with SGX.

    Args:
        host: this machine.
        config: the software machine.
        leaf: EAX.
        sub: ECX.
    """
    if leaf == _SGX_LEAF:
        return cpuid(config, leaf, sub)
    found = host(leaf, sub)
    if leaf == 0:
        return max(found[0], _SGX_LEAF), *found[1:]
    if leaf == _FEATURES_LEAF and sub == 0:
        ours = cpuid(config, leaf, sub)
        # FSGSBASE is this machine's: no software makes its instructions work.
        ebx = found[1] & ~Cpuid7Ebx.SGX.value | ours.ebx & Cpuid7Ebx.SGX
        return (
            found[0],
            int(ebx),
            found[2] & ~Cpuid7Ecx.SGX_LC.value | ours.ecx,
            found[3] | ours.edx,
        )
    return found


def xsave_components(host: HostCpuid) -> tuple[int, Mapping[int, tuple[int, int]]]:
    """Return XCR0 as this machine's system set it, and (bytes, offset) of its components."""
    eax, _ebx, _ecx, edx = host(0xD, 0)
    usable = eax | edx << 32
    sizes = {
        component: (host(0xD, component)[0], host(0xD, component)[1])
        for component in range(2, 63)
        if usable >> component & 1 and host(0xD, component)[0]
    }
    return usable, sizes
