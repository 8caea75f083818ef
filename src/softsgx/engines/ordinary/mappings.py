"""Which mappings of an ordinary process count as memory of an enclave.

Source:
    proc_pid_maps(5).
"""

from __future__ import annotations

from softsgx.engines.native.mappings import Mapping, mappings

__all__ = ["counts", "private_memory"]

_KERNELS = frozenset({"[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]"})


def counts(mapping: Mapping) -> bool:
    """Return whether it is enclave memory: private memory, or a private mapping of a file."""
    return not mapping.shared and (bool(mapping.inode) or mapping.path not in _KERNELS)


def private_memory(pid: int, hole: tuple[int, int] = (0, 0)) -> list[tuple[int, int]]:
    """Return (start, end) of anonymous private memory, without the range ``hole``."""
    found = []
    for each in mappings(pid):
        if counts(each) and not each.inode:
            parts = (each.start, min(each.end, hole[0])), (max(each.start, hole[1]), each.end)
            found += [(start, end) for start, end in parts if start < end]
    return found
