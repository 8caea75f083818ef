"""Filters that are added while a program runs: which calls stop from now on.

Filters cannot be taken away; each makes every system call of the program a little slower.  Children
and executed programs inherit them.

A thread gets the filter of devices before its process has a descriptor of one, or a mapping.
Threads that share its address space get it before they run code of the program again.  A child that
fork makes meanwhile has no descriptor that was opened later.

Source:
    seccomp(2).
"""

from __future__ import annotations

import os
import struct

from softsgx.engines.native import abi
from softsgx.engines.native.tracing.bpf import build_device_filter
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.vdso.code import SCRATCH_BYTES

__all__ = ["add_filter", "watch_devices"]

_HEADER_BYTES = 16
_DEVICE_FILTER = build_device_filter()


def watch_devices(thread: ProgramThread) -> int:
    """Let calls that concern open devices stop in the address space of a stopped thread.

    Returns:
        0, or ``-errno``: the filter cannot be added.
    """
    image = thread.image
    if thread.watched or image.strict:  # where every call stops
        return 0
    result = add_filter(thread, _DEVICE_FILTER)
    if result < 0:
        return result
    image.watched = thread.watched = True
    for other in list(image.threads.values()):
        if not other.watched:
            other.watched = other.process is thread.process and result == 0
        if not (other.watched or other.in_call or other.unstoppable):
            image.hold(other)  # the loop adds the filter when it resumes it
    return 0


def add_filter(thread: ProgramThread, bpf: bytes) -> int:
    """Add a filter to a stopped thread and, if none has filters of its own, to all of its process.

    Args:
        thread: where the call is made.
        bpf: an array of ``struct sock_filter``.

    Returns:
        0; the id of a thread with filters of its own: it was added to ``thread`` alone; or
        ``-errno``.
    """
    assert len(bpf) <= SCRATCH_BYTES - _HEADER_BYTES, f"a filter of {len(bpf)} bytes"
    image = thread.image
    scratch = image.vdso_base + image.vdso.scratch
    program = struct.pack("<HxxxxxxQ", len(bpf) // 8, scratch + _HEADER_BYTES)
    os.pwrite(image.memory_fd, program + bpf, scratch)

    def add(flags: int) -> int:
        return thread.syscall(abi.SYS_SECCOMP, abi.SECCOMP_SET_MODE_FILTER, flags, scratch)

    other = add(abi.SECCOMP_FILTER_FLAG_TSYNC)
    return other if other <= 0 else add(0) or other
