"""CPUID as the host's view gives it is this machine's, but for what belongs to SGX."""

from __future__ import annotations

from itertools import pairwise

import pytest

from softsgx.arch import Cpuid7Ebx, Cpuid7Ecx
from softsgx.engines.native.x86.cpuid import (
    CpuidLeaf,
    HostCpuid,
    host_cpuid,
    instruction,
    virtual_leaf,
    xsave_components,
)
from softsgx.hw import MachineConfig

CONFIG = MachineConfig.with_epc(32 << 20)


def fake_host(leaves: dict[tuple[int, int], CpuidLeaf]) -> HostCpuid:
    def execute(leaf: int, sub: int) -> CpuidLeaf:
        return leaves.get((leaf, sub), (0, 0, 0, 0))

    return HostCpuid(execute)


OLD = fake_host(
    {(0, 0): (0xD, 1, 2, 3), (1, 0): (0x50657, 4, 5, 6), (7, 0): (0, 0x21, 0x10, 0x400)}
)


def test_the_highest_leaf_reaches_sgx_and_the_vendor_stays() -> None:
    assert virtual_leaf(OLD, CONFIG, 0, 0) == (0x12, 1, 2, 3)
    new = fake_host({(0, 0): (0x20, 1, 2, 3)})
    assert virtual_leaf(new, CONFIG, 0, 0) == (0x20, 1, 2, 3)


def test_leaf_7_says_sgx_and_keeps_everything_else() -> None:
    eax, ebx, ecx, edx = virtual_leaf(OLD, CONFIG, 7, 0)
    assert ebx == 0x21 | Cpuid7Ebx.SGX
    assert ecx == 0x10 | Cpuid7Ecx.SGX_LC
    assert (eax, edx & 0x400) == (0, 0x400)


def test_fsgsbase_is_never_promised_where_the_machine_has_none() -> None:
    host = fake_host({(0, 0): (0xD, 0, 0, 0), (7, 0): (0, 0, 0, 0)})
    assert not virtual_leaf(host, CONFIG, 7, 0)[1] & Cpuid7Ebx.FSGSBASE


@pytest.mark.parametrize("leaf", [1, 4, 0xD, 0x8000_0000])
def test_other_leaves_are_the_machines(leaf: int) -> None:
    assert virtual_leaf(OLD, CONFIG, leaf, 0) == OLD(leaf, 0)


def test_a_real_sgx_section_of_the_machine_is_never_shown() -> None:
    real = fake_host({(0, 0): (0x12, 0, 0, 0), (0x12, 2): (0x70200001, 0, 0x5D80001, 0)})
    eax, ebx, ecx, edx = virtual_leaf(real, CONFIG, 0x12, 2)
    assert ecx & 0xFFFF_F000 | (edx & 0xF_FFFF) << 32 == 32 << 20
    assert eax & 0xFFFF_F000 | (ebx & 0xF_FFFF) << 32 == CONFIG.sections[0].base
    assert virtual_leaf(real, CONFIG, 0x12, 3) == (0, 0, 0, 0)


def test_this_machine_answers() -> None:
    host = host_cpuid()
    assert host(0, 0)[0] >= 1
    xcr0, components = xsave_components(host)
    assert xcr0 & 3 == 3
    ends = sorted((offset, size) for size, offset in components.values())
    for (offset, size), (following, _size) in pairwise(ends):
        assert offset >= 576
        assert offset + size <= following


@pytest.mark.parametrize(("leaf", "count"), [(4, 16), (7, 4), (0xD, 64), (0x14, 4), (0x18, 16)])
def test_sub_leaves_that_are_not_read_are_zeros_on_this_machine(leaf: int, count: int) -> None:
    host, execute = host_cpuid(), instruction()
    wanted = [execute(leaf, sub) if leaf <= host(0, 0)[0] else (0,) * 4 for sub in range(count)]
    found = [host(leaf, sub) for sub in range(count)]
    if leaf == 7:  # OSPKE and the like are the same; the speculation bits are per processor
        wanted, found = wanted[1:], found[1:]
    assert found == wanted


def test_only_the_sub_leaves_that_there_are_are_read() -> None:
    read = []
    answers = {
        (0, 0): (0x18, 0, 0, 0),
        (4, 0): (1, 0, 0, 0),
        (4, 1): (2, 0, 0, 0),
        (7, 0): (1, 0, 0, 0),
        (0xD, 0): (1 << 2 | 7, 0, 0, 1 << 4),  # AVX and component 36
        (0xD, 1): (0, 0, 1 << 11, 0),
        (0x18, 0): (2, 0, 0, 0),
    }

    def execute(leaf: int, sub: int) -> CpuidLeaf:
        read.append((leaf, sub))
        return answers.get((leaf, sub), (0, 0, 0, 0))

    HostCpuid(execute)
    subs = {leaf: [sub for number, sub in read if number == leaf] for leaf in (4, 7, 0xD, 0x18)}
    assert subs == {4: [0, 1, 2], 7: [0, 1], 0xD: [0, 1, 2, 11, 36], 0x18: [0, 1, 2]}
