"""Mappings of a process, read from /proc/PID/maps.

Source:
    proc_pid_maps(5).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from softsgx.engines.native import abi

__all__ = ["Mapping", "mappings", "private_memory"]

_KERNELS = frozenset({"[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]"})
_LETTERS = ((0, abi.PROT_READ), (1, abi.PROT_WRITE), (2, abi.PROT_EXEC))


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of the file.

    Attributes:
        start: first address.
        end: address behind the last.
        prot: PROT_* rights.
        private: whether it is mapped with MAP_PRIVATE.
        inode: of its file; 0: it has none.
        name: path of its file, or a name in brackets; may be empty.
    """

    start: int
    end: int
    prot: int
    private: bool
    inode: int
    name: str

    @property
    def counts(self) -> bool:
        """Whether it counts as enclave memory: private memory, or a private mapping of a file."""
        return self.is_private_memory or bool(self.private and self.inode)

    @property
    def is_private_memory(self) -> bool:
        """Whether it is anonymous private memory of the program."""
        return self.private and not self.inode and self.name not in _KERNELS


def mappings(pid: int) -> Iterator[Mapping]:
    """Yield the mappings of a process, in order of addresses."""
    with open(f"/proc/{pid}/maps", errors="surrogateescape") as lines:
        for line in lines:
            place, rights, _offset, _device, inode, *name = line.rstrip("\n").split(maxsplit=5)
            start, end = (int(part, 16) for part in place.split("-"))
            prot = sum(right for at, right in _LETTERS if rights[at] != "-")
            yield Mapping(start, end, prot, rights[3] == "p", int(inode), name[0] if name else "")


def private_memory(pid: int, hole: tuple[int, int] = (0, 0)) -> list[tuple[int, int]]:
    """Return (start, end) of anonymous private memory, without the range ``hole``."""
    found = []
    for each in mappings(pid):
        if each.is_private_memory:
            parts = (each.start, min(each.end, hole[0])), (max(each.start, hole[1]), each.end)
            found += [(start, end) for start, end in parts if start < end]
    return found
