"""CPUID of a program under the native engine: this machine's, but for what tells of SGX."""

from __future__ import annotations

import pytest

from softsgx.engines.native.x86.cpuid import HostCpuid, virtual_leaf
from softsgx.hw import MachineConfig

SGX, SGX_LC = 1 << 2, 1 << 30
ALL = 0xFFFF_FFFF


@pytest.mark.parametrize("host", [0, ALL])
def test_every_other_bit_of_leaf_7_is_the_hosts(host: int) -> None:
    def answer(leaf: int, sub: int) -> tuple[int, int, int, int]:
        return (7, host, host, host)

    eax, ebx, ecx, _edx = virtual_leaf(HostCpuid(answer), MachineConfig(launch_control=False), 7, 0)
    assert eax == 7
    assert ebx == host & ~SGX | SGX
    assert ecx == host & ~SGX_LC
