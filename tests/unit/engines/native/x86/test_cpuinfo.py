"""/proc/cpuinfo is made to tell what CPUID tells, and keeps what only the kernel knows."""

from __future__ import annotations

from softsgx.engines.native.x86.cpuid import HostCpuid
from softsgx.engines.native.x86.cpuinfo import rewrite_cpuinfo
from softsgx.engines.native.x86.profile import ProfileCpuid
from softsgx.host import PROFILES
from softsgx.hw import MachineConfig

ONE = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC 9R14
stepping\t: 1
cpu MHz\t\t: 3700.000
cache size\t: 1024 KB
flags\t\t: fpu avx avx512f hypervisor svm topoext rep_good nopl
bugs\t\t: sysret_ss_attrs
bogomips\t: 5200.00
TLB size\t: 3584 4K pages
address sizes\t: 52 bits physical, 57 bits virtual
power management:

"""


def rewritten(profile: str) -> dict[str, str]:
    host = HostCpuid(lambda leaf, _sub: (0x20 if leaf == 0 else 0xFFFF_FFFF,) * 4)
    cpuid = ProfileCpuid(host, MachineConfig(**PROFILES[profile]), 2_600_000, 4)
    text = rewrite_cpuinfo(ONE + ONE, cpuid)
    assert text.count("processor") == 2 and text.endswith("\n\n")
    return {
        name.strip(): value.strip()
        for name, _colon, value in (line.partition(":") for line in text.splitlines())
    }


def test_the_processors_identity_comes_from_cpuid() -> None:
    found = rewritten("sgx2-server")
    assert found["vendor_id"] == "GenuineIntel"
    assert (found["cpu family"], found["model"], found["stepping"]) == ("6", "143", "8")
    assert found["model name"] == "Intel(R) Xeon(R) Platinum 8480+ @ 2.60GHz"
    assert found["cache size"] == "107520 KB"
    assert found["address sizes"] == "46 bits physical, 57 bits virtual"
    assert "TLB size" not in found
    assert (found["cpu MHz"], found["bogomips"]) == ("3700.000", "5200.00")


def test_flags_are_those_that_cpuid_claims_and_the_kernels_own() -> None:
    server, client = (rewritten(name)["flags"].split() for name in ("sgx2-server", "sgx1-client"))
    assert {"fpu", "avx", "avx512f", "rep_good", "sgx", "sgx_lc"} <= set(server)
    assert "hypervisor" not in server
    assert "avx512f" not in client and "avx" in client
