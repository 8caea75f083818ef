"""CPUID of a profile describes one Intel machine, and promises nothing that this one lacks."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import pytest

from softsgx.arch import INTEL_XSAVE
from softsgx.engines.native.x86.areas import AreaLayouts
from softsgx.engines.native.x86.cpuid import CpuidLeaf, HostCpuid, xsave_components
from softsgx.engines.native.x86.profile import ProfileCpuid, intel_layout
from softsgx.engines.native.x86.tsc import tsc_khz
from softsgx.errors import SoftSgxError
from softsgx.host import PROFILES
from softsgx.hw import MachineConfig

ALL = 0xFFFF_FFFF
AMD = struct.unpack("<3I", b"AuthcAMDenti")
AVX512F = 1 << 16
# A processor whose AVX-512 and PKRU state is not where Intel has it, under a hypervisor.
COMPACT = {2: (256, 576), 5: (64, 832), 6: (512, 896), 7: (1024, 1408), 9: (8, 2432)}
COMPACT_SIZE = 2440
TSC_KHZ = 2_449_998


def compact_host(features: int = ALL) -> HostCpuid:
    def execute(leaf: int, sub: int) -> CpuidLeaf:
        match leaf:
            case 0:
                return 0x10, *AMD
            case 0xD if sub == 0:
                return 0x2E7, COMPACT_SIZE, COMPACT_SIZE, 0
            case 0xD if sub > 1:
                return *COMPACT.get(sub, (0, 0)), 0, 0
            case 0x4000_0000:
                return 0x4000_0001, *struct.unpack("<3I", b"KVMKVMKVM\0\0\0")
            case 0x8000_0000:
                return 0x8000_0028, *AMD
            case 0x8000_0008:
                return 48 | 48 << 8, 0, 0, 0
            case _:
                return features, features, features, features

    return HostCpuid(execute)


def view(profile: str = "sgx2-server", features: int = ALL, processors: int = 6) -> ProfileCpuid:
    host = compact_host(features)
    config = MachineConfig(**PROFILES[profile], xsave=intel_layout(host))
    return ProfileCpuid(host, config, TSC_KHZ, processors)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_vendor_is_intel_on_any_machine(profile: str) -> None:
    cpuid = view(profile)
    highest, b, c, d = cpuid(0, 0)
    assert struct.pack("<3I", b, d, c) == b"GenuineIntel"
    assert highest >= 0x16
    family = cpuid(1, 0)[0] >> 8 & 0xF
    assert family == 6


@pytest.mark.parametrize("profile", PROFILES)
def test_no_feature_is_claimed_that_the_machine_lacks(profile: str) -> None:
    cpuid = view(profile, features=0)
    _a, _b, ecx, edx = cpuid(1, 0)
    assert (ecx, edx & ~(1 << 28)) == (0, 0)
    _a, ebx, ecx, edx = cpuid(7, 0)
    assert (ebx, ecx & ~(1 << 30), edx & ~2) == (1 << 2, 0, 0), "SGX is ours, nothing else is"
    assert cpuid(7, 1) == cpuid(0x8000_0001, 0) == cpuid(0x8000_0007, 0) == (0, 0, 0, 0)
    assert cpuid(0xD, 1)[0] == 0
    beyond = cpuid(cpuid(0, 0)[0], 1)
    assert cpuid(0x1D, 1) in ((0, 0, 0, 0), beyond), "tiles without AMX"


@pytest.mark.parametrize("profile", PROFILES)
def test_leaves_without_sub_leaves_ignore_ecx(profile: str) -> None:
    cpuid = view(profile)
    for leaf in (0, 1, 2, 6, 0x15, 0x16, *range(0x8000_0000, 0x8000_0009)):
        for ecx in (1, 7, 0x121, 0xFFFF_FFFF):
            assert cpuid(leaf, ecx) == cpuid(leaf, 0), hex(leaf)


def test_no_feature_is_claimed_that_the_profile_lacks() -> None:
    assert not view("sgx1-client")(7, 0)[1] & AVX512F
    assert view("sgx2-server")(7, 0)[1] & AVX512F


FEATURE_STATES = [  # leaf, word, bit, XFRM
    (1, 2, 28, 4),
    (7, 1, 14, 0x18),
    (7, 1, 16, 0xE0),
    (7, 2, 3, 0x200),
    (7, 3, 24, 0x60000),
]


@pytest.mark.parametrize("layout", [COMPACT, INTEL_XSAVE, {}], ids=["compact", "all", "none"])
@pytest.mark.parametrize("profile", PROFILES)
def test_enclaves_can_have_the_state_of_every_feature_that_is_claimed(
    profile: str, layout: dict[int, tuple[int, int]]
) -> None:
    config = MachineConfig(**PROFILES[profile], xsave=layout)
    cpuid = ProfileCpuid(compact_host(), config, TSC_KHZ, 6)
    allowed, claimed = cpuid(0x12, 1)[2] & config.xcr0, 0
    for leaf, word, bit, states in FEATURE_STATES:
        if cpuid(leaf, 0)[word] >> bit & 1:
            claimed |= states
    assert claimed == allowed & ~3


@pytest.mark.parametrize("profile", PROFILES)
def test_the_hypervisor_is_not_seen(profile: str) -> None:
    cpuid = view(profile)
    assert not cpuid(1, 0)[2] >> 31
    highest = cpuid(cpuid(0, 0)[0], 0)
    assert cpuid(0x4000_0000, 0) == highest, "what Intel's processors give for no leaf"
    assert cpuid(0x8000_0009, 0) == highest


def test_xsave_components_are_where_intel_has_them_and_no_area_is_too_small() -> None:
    cpuid = view()
    eax, enabled_size, full_size, _edx = cpuid(0xD, 0)
    assert eax == 0x2E7, "XGETBV tells the same"
    assert enabled_size == full_size >= COMPACT_SIZE
    for number, (size, _offset) in COMPACT.items():
        assert cpuid(0xD, number)[:2] == (size, INTEL_XSAVE[number][1])
    places = sorted((offset, size) for size, offset in intel_layout(compact_host()).values())
    for (offset, size), (following, _size) in pairwise([*places, (full_size, 0)]):
        assert offset + size <= following


def test_areas_keep_every_component_in_either_layout() -> None:
    host = compact_host()
    areas = AreaLayouts(xsave_components(host)[1], intel_layout(host))
    real = bytearray(COMPACT_SIZE)
    real[:576] = bytes(number % 251 for number in range(576))
    for number, (size, offset) in COMPACT.items():
        real[offset : offset + size] = bytes([number]) * size
    described = areas.described(bytes(real))
    for number, (size, _offset) in COMPACT.items():
        at = INTEL_XSAVE[number][1]
        assert described[at : at + size] == bytes([number]) * size
    assert areas.real(described, bytes(COMPACT_SIZE)) == bytes(real)
    assert areas.moved == 0x2E0 and not areas.same
    assert AreaLayouts(INTEL_XSAVE, INTEL_XSAVE).same


#: XSAVE components with (bytes, offset) by processor: those of the machines people run this on.
REAL_LAYOUTS: dict[str, tuple[dict[int, tuple[int, int]], int]] = {
    "x87 and SSE only": ({}, 0),
    "Intel Haswell, AMD Zen to Zen 3": ({2: (256, 576)}, 0),
    "AMD Zen 3 with protection keys": ({2: (256, 576), 9: (8, 832)}, 0x200),
    "AMD Zen 4, Zen 5": ({2: (256, 576), 5: (64, 832), 6: (512, 896), 7: (1024, 1408)}, 0xE0),
    "the same with protection keys": (
        {2: (256, 576), 5: (64, 832), 6: (512, 896), 7: (1024, 1408), 9: (8, 2432)},
        0x2E0,
    ),
    "Intel Alder Lake": ({2: (256, 576), 9: (8, 2688)}, 0),
    "Intel Skylake": ({number: INTEL_XSAVE[number] for number in (2, 3, 4)}, 0),
    "Intel Xeon with AVX-512": ({number: INTEL_XSAVE[number] for number in (2, 5, 6, 7, 9)}, 0),
    "Intel Xeon with AMX": (dict(INTEL_XSAVE), 0),
}


@pytest.mark.parametrize("name", REAL_LAYOUTS)
def test_components_that_are_elsewhere_are_known_one_by_one(name: str) -> None:
    real, moved = REAL_LAYOUTS[name]
    described = {number: INTEL_XSAVE[number] for number in real}
    areas = AreaLayouts(real, described)
    assert areas.moved == moved
    assert areas.same == (not moved)


def test_the_time_stamp_counter_has_its_real_frequency() -> None:
    cpuid = view()
    denominator, numerator, crystal_hz, _edx = cpuid(0x15, 0)
    assert crystal_hz * numerator / denominator == TSC_KHZ * 1000
    assert cpuid(0x16, 0)[0] == 2450
    brand = b"".join(struct.pack("<4I", *cpuid(0x8000_0002 + part, 0)) for part in range(3))
    assert brand.rstrip(b"\0").endswith(b"@ 2.45GHz")


def test_caches_and_processors_agree() -> None:
    cpuid = view(processors=6)
    assert cpuid(1, 0)[1] >> 16 & 0xFF == 8, "identifiers for 6 processors"
    assert cpuid(0xB, 0)[:3] == (0, 1, 0x100)
    assert cpuid(0xB, 1)[:3] == (3, 6, 0x201)
    assert cpuid(0x1F, 1) == cpuid(0xB, 1)
    caches: list[CpuidLeaf] = []
    while cpuid(4, len(caches))[0] & 0x1F:
        caches.append(cpuid(4, len(caches)))
    levels = [eax >> 5 & 7 for eax, *_rest in caches]
    assert levels == [1, 1, 2, 3]
    assert caches[-1][0] >> 14 & 0xFFF == 7, "all identifiers share the last cache"
    _eax, ebx, sets, _edx = caches[2]
    size = ((ebx >> 22) + 1) * ((ebx & 0xFFF) + 1) * (sets + 1)
    assert cpuid(0x8000_0006, 0)[2] >> 16 == size >> 10


def test_one_processor_has_no_company() -> None:
    cpuid = view(processors=1)
    assert not cpuid(1, 0)[3] >> 28 & 1
    assert cpuid(0xB, 1)[1] == 1


def fake_host(leaves: dict[int, CpuidLeaf]) -> HostCpuid:
    return HostCpuid(lambda leaf, _sub: leaves.get(leaf, (0, 0, 0, 0)))


def test_the_frequency_comes_from_cpuid_the_hypervisor_or_the_system(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nbogomips\t: 4200.01\n")
    assert tsc_khz(fake_host({0: (0x16, 0, 0, 0), 0x15: (2, 168, 25_000_000, 0)})) == 2_100_000
    guest = {0: (1, 0, 0, 0), 1: (0, 0, 1 << 31, 0), 0x4000_0000: (0x4000_0010, 0, 0, 0)}
    assert tsc_khz(fake_host({**guest, 0x4000_0010: (1_999_998, 0, 0, 0)}), cpuinfo) == 1_999_998
    assert tsc_khz(fake_host({}), cpuinfo) == 2_100_005
    with pytest.raises(SoftSgxError, match="--cpuid host"):
        tsc_khz(fake_host({}), tmp_path / "none")
