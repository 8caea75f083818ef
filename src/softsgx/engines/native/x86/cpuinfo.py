"""``/proc/cpuinfo`` of the machine that CPUID describes, made from this machine's.

Lines that follow from CPUID are replaced; flags that it does not claim are removed, and those of
SGX are added.  Other lines are the kernel's.

Source:
    proc(5); arch/x86/kernel/cpu/proc.c; asm/cpufeatures.h for the names of flags.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from softsgx.engines.native.x86.cpuid import CpuidLeaf

__all__ = ["rewrite_cpuinfo"]

_EAX, _EBX, _ECX, _EDX = range(4)

#: Feature word: flags by bit, from bit 0; ``-`` where there is none.
_FLAGS = {
    (1, 0, _EDX): "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn "
    "clflush - dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    (1, 0, _ECX): "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 "
    "xtpr pdcm - pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave - avx "
    "f16c rdrand hypervisor",
    (7, 0, _EBX): "fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm cqm - mpx "
    "rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf "
    "avx512er avx512cd sha_ni avx512bw avx512vl",
    (7, 0, _ECX): "- avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq "
    "avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect "
    "cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    (7, 0, _EDX): "- - avx512_4vnniw avx512_4fmaps fsrm - - - avx512_vp2intersect - md_clear - - - "
    "serialize - tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 - - "
    "flush_l1d arch_capabilities",
    (7, 1, _EAX): "- - - - avx_vnni avx512_bf16",
    (0xD, 1, _EAX): "xsaveopt xsavec xgetbv1 xsaves",
    (0x8000_0001, 0, _EDX): "- - - - - - - - - - - syscall - - - - - - - - nx - - - - - pdpe1gb "
    "rdtscp - lm",
    (0x8000_0001, 0, _ECX): "lahf_lm - - - - abm - - 3dnowprefetch",
    (0x8000_0008, 0, _EBX): "- - - - - - - - - wbnoinvd",
}
_SGX_FLAGS = ("sgx", "sgx_lc")
#: Lines that only processors of other vendors have.
_FOREIGN = ("TLB size",)


def rewrite_cpuinfo(text: str, cpuid: Callable[[int, int], CpuidLeaf]) -> str:
    """Return the text for a program that sees ``cpuid``."""
    values, claimed = _values(cpuid), _claimed(cpuid)
    lines = []
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        key = name.strip()
        if key in _FOREIGN:
            continue
        if key == "flags":
            line = f"{name}{colon} {' '.join(_flags(value.split(), claimed))}"
        elif key in values:
            line = f"{name}{colon} {values[key]}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _values(cpuid: Callable[[int, int], CpuidLeaf]) -> dict[str, str]:
    highest, ebx, ecx, edx = cpuid(0, 0)
    signature = cpuid(1, 0)[0]
    family = signature >> 8 & 0xF
    if family == 0xF:
        family += signature >> 20 & 0xFF
    model = signature >> 4 & 0xF | (signature >> 12 & 0xF0 if family >= 6 else 0)
    brand = b"".join(struct.pack("<4I", *cpuid(0x8000_0002 + part, 0)) for part in range(3))
    sizes = cpuid(0x8000_0008, 0)[0]
    values = {
        "vendor_id": struct.pack("<3I", ebx, edx, ecx).decode(errors="replace"),
        "cpu family": str(family),
        "model": str(model),
        "model name": brand.split(b"\0")[0].decode(errors="replace").strip(),
        "stepping": str(signature & 0xF),
        "cpuid level": str(highest),
        "address sizes": f"{sizes & 0xFF} bits physical, {sizes >> 8 & 0xFF} bits virtual",
    }
    cache = _last_cache_bytes(cpuid)
    if cache:
        values["cache size"] = f"{cache >> 10} KB"
    return values


def _last_cache_bytes(cpuid: Callable[[int, int], CpuidLeaf]) -> int:
    size = 0
    for sub in range(8):
        eax, ebx, ecx, _edx = cpuid(4, sub)
        if not eax & 0x1F:
            break
        ways, partitions, line = (ebx >> 22) + 1, (ebx >> 12 & 0x3FF) + 1, (ebx & 0xFFF) + 1
        size = ways * partitions * line * (ecx + 1)
    return size


def _claimed(cpuid: Callable[[int, int], CpuidLeaf]) -> dict[str, bool]:
    """Return every flag that CPUID decides, and whether it does claim it."""
    return {
        flag: bool(cpuid(leaf, sub)[word] >> bit & 1)
        for (leaf, sub, word), names in _FLAGS.items()
        for bit, flag in enumerate(names.split())
        if flag != "-"
    }


def _flags(real: list[str], claimed: dict[str, bool]) -> list[str]:
    kept = [flag for flag in real if claimed.get(flag, True) and flag not in _SGX_FLAGS]
    return kept + [flag for flag in _SGX_FLAGS if claimed[flag]]
