"""The text of /proc/PID/maps with the driver's mappings instead of their memory files."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from softsgx.engines.native import abi
from softsgx.engines.native.syscalls.maps import maps_text
from softsgx.engines.native.syscalls.nodes import ENCLAVE, devices

_INODE, _DEVICE = 1042, os.makedev(0, 1)


def test_only_lines_of_the_enclaves_own_file_are_replaced() -> None:
    vma: Any = SimpleNamespace(start=0x40000, end=0x48000, prot=abi.PROT_READ, file=None)
    image: Any = SimpleNamespace(mm=SimpleNamespace(vmas=lambda: [vma]))
    device = SimpleNamespace(memory=SimpleNamespace(key=(_DEVICE, _INODE)))
    registry: Any = SimpleNamespace(of_file=lambda _file: device)
    others = [
        f"00020000-00021000 r--p 00000000 fe:01 {_INODE}     /the same/number elsewhere",
        f"00048000-00049000 r--p 00000000 fe:01 9     {os.fsdecode(bytes((0xFF, 13, 0x85)))}",
    ]
    memory_file = [
        f"00040000-00041000 r--s 00000000 00:01 {_INODE}     /memfd:a (deleted)",
        f"00041000-00048000 ---s 00001000 00:01 {_INODE}     /memfd:a (deleted)",
    ]
    lines = [others[0], *memory_file, others[1]]
    shown = maps_text(lines, image, registry, devices()[ENCLAVE]).split("\n")
    assert [shown[0], *shown[2:]] == [*others, ""]
    assert shown[1].startswith("00040000-00048000 r--s 00000000 ")
    assert shown[1].endswith(" /dev/sgx_enclave")
