"""Real programs at native speed: a supervisor below an unmodified program, and SGX from software.

Enclave code runs on the real processor; the supervisor handles ENCLU, faults, the device and CPUID.
Linux on x86-64 only; no root needed.
"""

from typing import TYPE_CHECKING

from softsgx.engines.native.doctor import Finding, choose_pager, doctor, requirements
from softsgx.engines.native.injections import INJECTIONS
from softsgx.engines.native.memory.pagers import PAGERS
from softsgx.engines.native.memory.store import NativeStore
from softsgx.engines.native.run import (
    CPUID_SOURCES,
    NativePlatformConfig,
    Observer,
    RunFailed,
    RunResult,
    cpuid_of,
    native_platform,
    run,
)
from softsgx.engines.native.supervisor import Supervisor
from softsgx.ondemand import on_demand

if TYPE_CHECKING:
    from softsgx.engines.native.gdb.server import GdbServer

__all__ = [
    "CPUID_SOURCES",
    "INJECTIONS",
    "PAGERS",
    "Finding",
    "GdbServer",
    "NativePlatformConfig",
    "NativeStore",
    "Observer",
    "RunFailed",
    "RunResult",
    "Supervisor",
    "choose_pager",
    "cpuid_of",
    "doctor",
    "native_platform",
    "requirements",
    "run",
]

__getattr__ = on_demand(
    __name__,
    {
        "gdb.server": ("GdbServer",),
    },
)
