"""The frequency of this machine's time-stamp counter, which enclave code reads directly.

Source:
    SDM vol. 2A, CPUID.15H; the hypervisor leaf 40000010H that VMware and KVM share; Linux
    init/calibrate.c: ``bogomips`` is the calibrated frequency, for five hundred counts a second.
"""

from __future__ import annotations

import os

from softsgx.engines.native.x86.cpuid import HostCpuid
from softsgx.errors import SoftSgxError

__all__ = ["tsc_khz"]

_HYPERVISOR_BIT = 1 << 31  # CPUID.01H:ECX
_TIMING_LEAF = 0x4000_0010
_KHZ_PER_BOGOMIPS = 500


def tsc_khz(host: HostCpuid, cpuinfo: str | os.PathLike[str] = "/proc/cpuinfo") -> int:
    """Return the frequency in kHz.

    Raises:
        SoftSgxError: neither CPUID nor ``cpuinfo`` says it.
    """
    denominator, numerator, crystal_hz, _edx = host(0x15, 0)
    if denominator and numerator and crystal_hz:
        return crystal_hz * numerator // denominator // 1000
    if host(1, 0)[2] & _HYPERVISOR_BIT and host(_TIMING_LEAF, 0)[0]:
        return host(_TIMING_LEAF, 0)[0]
    try:
        with open(cpuinfo) as file:
            lines = file.read().splitlines()
        for line in lines:
            name, _colon, value = line.partition(":")
            if name.strip() == "bogomips":
                return round(float(value) * _KHZ_PER_BOGOMIPS)
    except (OSError, ValueError):
        pass
    raise SoftSgxError(
        f"{cpuinfo}: does not say how fast the time-stamp counter is; choose --cpuid host"
    )
