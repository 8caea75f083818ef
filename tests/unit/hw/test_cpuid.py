"""CPUID tells what the configuration is.

Goal: the registers of a known processor, and that everything can be decoded back.

Source:
    SDM vol. 3D, "Discovering Support for Intel SGX"; a dump of a Skylake-class client.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from softsgx.arch import AttributesFlags, MiscSelect, SgxFeature
from softsgx.hw import EpcSection, MachineConfig
from softsgx.hw.cpuid import cpuid

F = AttributesFlags
CLIENT = MachineConfig(
    sections=(EpcSection(0x50200000, 0x05D80000),),
    features=SgxFeature.SGX1,
    miscselect=MiscSelect(0),
    attributes=F.DEBUG | F.MODE64BIT | F.PROVISIONKEY | F.EINITTOKENKEY,
    xfrm=0x1F,
    max_size_32=31,
    max_size_64=36,
    launch_control=False,
)


def test_a_client_of_2015_answers_as_it_did() -> None:
    assert cpuid(CLIENT, 0x12, 0) == (1, 0, 0, 0x241F)
    assert cpuid(CLIENT, 0x12, 1) == (0x36, 0, 0x1F, 0)
    assert cpuid(CLIENT, 0x12, 2) == (0x50200001, 0, 0x05D80001, 0)
    assert cpuid(CLIENT, 0x12, 3) == (0, 0, 0, 0)


@given(
    st.lists(
        st.tuples(st.integers(1, 1 << 20), st.integers(0, 1 << 20), st.sampled_from([1, 2, 3])),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=50, deadline=None)
def test_sections_decode_back_up_to_the_end_of_the_list(
    lengths: list[tuple[int, int, int]],
) -> None:
    sections, base = [], 0x50200000
    for pages, gap, protection in lengths:
        sections.append(EpcSection(base, pages << 12, protection=protection))
        base += (pages + gap) << 12
    config = MachineConfig(sections=tuple(sections))
    seen, subleaf = [], 2
    while (got := cpuid(config, 0x12, subleaf)).eax & 0xF:
        start = got.eax & 0xFFFFF000 | (got.ebx & 0xFFFFF) << 32
        size = got.ecx & 0xFFFFF000 | (got.edx & 0xFFFFF) << 32
        seen.append(EpcSection(start, size, protection=got.ecx & 0xF))
        subleaf += 1
    assert seen == sections


def test_features_show_in_leaf_7_whether_firmware_enabled_them_or_not() -> None:
    server = cpuid(MachineConfig(), 7)
    assert server.ebx & 1 << 2 and server.ecx & 1 << 30 and server.edx & 1 << 1
    client = cpuid(CLIENT, 7)
    assert client.ebx & 1 << 2 and not client.ecx & 1 << 30
    without = MachineConfig(features=SgxFeature(0))
    assert not cpuid(without, 7).ebx & 1 << 2
    assert not cpuid(without, 7).ecx & 1 << 30
    assert all(cpuid(without, 0x12, subleaf) == (0, 0, 0, 0) for subleaf in range(4))


def test_subleaves_of_0dh_add_up_to_the_size_of_the_area() -> None:
    config = MachineConfig()
    whole = cpuid(config, 0x0D, 0, xcr0=7)
    assert whole.ebx == 832 and whole.eax == config.xcr0
    ends = [576]
    for component in range(2, 63):
        if config.xcr0 >> component & 1:
            size, offset, _, _ = cpuid(config, 0x0D, component)
            ends.append(offset + size)
    assert whole.ecx == max(ends)


def test_cet_and_aex_notify_are_attribute_bits() -> None:
    config = MachineConfig(attributes=F.CET | F.AEXNOTIFY)
    assert cpuid(config, 0x12, 1).eax == 1 << 6 | 1 << 10


def test_any_other_leaf_is_zero() -> None:
    assert cpuid(CLIENT, 0) == cpuid(CLIENT, 7, 1) == cpuid(CLIENT, 0x80000000) == (0, 0, 0, 0)
