"""Filters that are added while a program runs: which calls stop from now on.

Filters cannot be taken away; each makes every system call of the program a little slower.

Source:
    seccomp(2).
"""

from __future__ import annotations

import os
import struct

from softsgx.engines.native import abi
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.vdso.code import SCRATCH_BYTES

__all__ = ["add_filter"]

_HEADER_BYTES = 16


def add_filter(thread: ProgramThread, bpf: bytes) -> None:
    """Add a filter to a stopped thread and, if none has filters of its own, to all of its process.

    Args:
        thread: where the call is made.
        bpf: an array of ``struct sock_filter``.
    """
    assert len(bpf) <= SCRATCH_BYTES - _HEADER_BYTES, f"a filter of {len(bpf)} bytes"
    image = thread.image
    scratch = image.vdso_base + image.vdso.scratch
    program = struct.pack("<HxxxxxxQ", len(bpf) // 8, scratch + _HEADER_BYTES)
    os.pwrite(image.memory_fd, program + bpf, scratch)
    for flags in (abi.SECCOMP_FILTER_FLAG_TSYNC, 0):
        if not thread.syscall(abi.SYS_SECCOMP, abi.SECCOMP_SET_MODE_FILTER, flags, scratch):
            return
