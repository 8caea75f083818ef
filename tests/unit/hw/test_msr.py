"""Model-specific registers: who may read and write what, and when.

Goal: each rule of the register tables, and that what is written is what leaves then use.

Source:
    SDM vol. 4, "Model-Specific Registers".
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from tests.support.hw import make_machine

from softsgx.arch import FEATURE_CONTROL_READY, INTEL_LEPUBKEYHASH, Msr, SgxFeature
from softsgx.hw import GeneralProtection, LogicalProcessor
from softsgx.hw.msr import rdmsr, wrmsr

LOCK, LAUNCH, ENABLE = 1, 1 << 17, 1 << 18
HASHES = [Msr.IA32_SGXLEPUBKEYHASH0 + n for n in range(4)]
OWNER = (Msr.MSR_SGXOWNER0, Msr.MSR_SGXOWNER1)


def cpu_with(feature_control: int | None = None, **config: Any) -> LogicalProcessor:
    machine = make_machine(**config)
    if feature_control is not None:
        machine.feature_control = feature_control
    return machine.kernel


def refused(cpu: LogicalProcessor, msr: int, value: int | None = None) -> bool:
    try:
        if value is None:
            rdmsr(cpu, msr)
        else:
            wrmsr(cpu, msr, value)
    except GeneralProtection:
        return True
    return False


@pytest.mark.parametrize(
    ("lock", "launch", "sgx1"), list(product([False, True], [False, True], [False, True]))
)
def test_launch_key_hashes_are_writable_iff_sgx_launch_control_and_lock(
    lock: bool, launch: bool, sgx1: bool
) -> None:
    control = ENABLE | lock * LOCK | launch * LAUNCH
    cpu = cpu_with(control, features=SgxFeature.SGX1 if sgx1 else SgxFeature(0))
    for msr in HASHES:
        assert refused(cpu, msr, 7) is not (lock and launch and sgx1)


def test_launch_key_hashes_begin_as_intels_and_read_back() -> None:
    cpu = cpu_with()
    assert tuple(rdmsr(cpu, msr) for msr in HASHES) == INTEL_LEPUBKEYHASH
    for nth, msr in enumerate(HASHES):
        wrmsr(cpu, msr, nth + 1 << 60)
    assert cpu.hw.launch_key_hash == [1 << 60, 2 << 60, 3 << 60, 4 << 60]
    cpu.hw.power_transition()
    assert tuple(rdmsr(cpu, msr) for msr in HASHES) == INTEL_LEPUBKEYHASH


def test_without_launch_control_the_hashes_are_out_of_reach() -> None:
    cpu = cpu_with(launch_control=False)
    assert all(refused(cpu, msr) and refused(cpu, msr, 0) for msr in HASHES)


def test_feature_control_takes_writes_until_it_is_locked() -> None:
    cpu = cpu_with(0)
    wrmsr(cpu, Msr.IA32_FEATURE_CONTROL, ENABLE | LAUNCH)
    assert rdmsr(cpu, Msr.IA32_FEATURE_CONTROL) == ENABLE | LAUNCH
    wrmsr(cpu, Msr.IA32_FEATURE_CONTROL, ENABLE | LOCK)
    assert refused(cpu, Msr.IA32_FEATURE_CONTROL, ENABLE | LOCK)
    assert rdmsr(cpu, Msr.IA32_FEATURE_CONTROL) == ENABLE | LOCK


@pytest.mark.parametrize("bit", [4, 16, 19, 32, 63])
def test_feature_control_has_reserved_bits(bit: int) -> None:
    assert refused(cpu_with(0), Msr.IA32_FEATURE_CONTROL, 1 << bit)


def test_feature_control_bits_exist_with_their_features() -> None:
    assert refused(cpu_with(0, features=SgxFeature(0)), Msr.IA32_FEATURE_CONTROL, ENABLE)
    assert refused(cpu_with(0, launch_control=False), Msr.IA32_FEATURE_CONTROL, LAUNCH)


def test_the_owner_epoch_is_write_only_and_settles_when_sgx_is_enabled() -> None:
    cpu = cpu_with(0)
    wrmsr(cpu, Msr.MSR_SGXOWNER0, 0x0807060504030201)
    wrmsr(cpu, Msr.MSR_SGXOWNER1, 0x100F0E0D0C0B0A09)
    assert cpu.hw.secrets.owner_epoch == bytes(range(1, 17))
    cpu.hw.feature_control = int(FEATURE_CONTROL_READY)
    wrmsr(cpu, Msr.MSR_SGXOWNER0, 0)
    assert cpu.hw.secrets.owner_epoch == bytes(range(1, 17))
    assert all(refused(cpu, msr) for msr in OWNER)


def test_svn_status_is_read_only() -> None:
    cpu = cpu_with()
    assert rdmsr(cpu, Msr.IA32_SGX_SVN_STATUS) == 0
    assert refused(cpu, Msr.IA32_SGX_SVN_STATUS, 0)


def test_without_sgx_only_feature_control_exists() -> None:
    cpu = cpu_with(0, features=SgxFeature(0))
    assert all(refused(cpu, msr) for msr in (*HASHES, Msr.IA32_SGX_SVN_STATUS))
    assert all(refused(cpu, msr, 0) for msr in OWNER)
    assert refused(cpu, Msr.IA32_FEATURE_CONTROL, LAUNCH)
    wrmsr(cpu, Msr.IA32_FEATURE_CONTROL, LOCK)


def test_user_code_and_unknown_registers_fault() -> None:
    cpu = cpu_with()
    assert refused(cpu, 0x1234) and refused(cpu, 0x1234, 0)
    cpu.cpl = 3
    assert refused(cpu, Msr.IA32_FEATURE_CONTROL)
    assert refused(cpu, HASHES[0]) and refused(cpu, HASHES[0], 0)
