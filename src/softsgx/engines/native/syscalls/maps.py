"""``/proc/PID/maps`` where enclaves are mapped: the device's name, and the rights asked for.

The kernel lists a memory file, in as many pieces as the pager gives rights to.  This module
replaces them by the driver's mappings.

Deviation: a snapshot of the moment the file is opened; the kernel's is made as it is read.

Source:
    proc(5); ``show_map_vma()``, fs/proc/task_mmu.c, for the columns.
"""

from __future__ import annotations

import os

from softsgx.driver import EnclaveVma
from softsgx.engines.native import abi
from softsgx.engines.native.mappings import parse_lines
from softsgx.engines.native.syscalls.nodes import ENCLAVE, Node
from softsgx.engines.native.syscalls.registry import Registry
from softsgx.engines.native.tracing.process_image import ProcessImage

__all__ = ["maps_text"]

_NAME_COLUMN = 73


def maps_text(lines: list[str], image: ProcessImage, registry: Registry, node: Node) -> str:
    """Return the text for the program.

    Args:
        lines: the kernel's.
        image: whose mappings it lists.
        registry: which memory file each mapping of an enclave is of.
        node: the device's node.
    """
    vmas = image.mm.vmas()
    keys = {registry.of_file(vma.file).memory.key for vma in vmas}
    shown = [
        (each.start, line)
        for each, line in zip(parse_lines(lines), lines, strict=True)
        if (each.device, each.inode) not in keys
    ]
    shown += [(vma.start, _line(vma, node)) for vma in vmas]
    return "".join(f"{line}\n" for _start, line in sorted(shown))


def _line(vma: EnclaveVma, node: Node) -> str:
    rights = "".join(
        letter if vma.prot & right else "-"
        for letter, right in (("r", abi.PROT_READ), ("w", abi.PROT_WRITE), ("x", abi.PROT_EXEC))
    )
    device = os.stat("/dev").st_dev
    place = f"{vma.start:08x}-{vma.end:08x} {rights}s 00000000"
    file = f"{os.major(device):02x}:{os.minor(device):02x} {node.inode} "
    return f"{place} {file}".ljust(_NAME_COLUMN) + os.fsdecode(ENCLAVE)
