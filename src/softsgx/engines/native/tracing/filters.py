"""Seccomp filters that the supervisor adds while a program runs, so that more calls stop.

A filter cannot be removed, and each makes every system call of the program a little slower.
Children and executed programs inherit filters.

A thread gets the device filter before its process has a descriptor or a mapping of a device.
Threads that share its address space get the filter before they run code of the program again.  A
child that fork makes in the meantime has no descriptor that was opened later.

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
    """Make calls that concern open devices stop in the address space of a stopped thread.

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
    thread.announce_end()
    os.pwrite(image.memory_fd, b"\1", image.vdso_base + image.vdso.watched)
    for other in list(image.threads.values()):
        if not other.watched:
            other.watched = other.process is thread.process and result == 0
        # It may have read the word already, or the loop adds the filter when it resumes it.
        in_stub = image.path_stubs is not None and other is not thread
        other.stop_after_call()
        if (in_stub or not other.watched) and not (other.in_call or other.unstoppable):
            image.hold(other)
    return 0


def add_filter(thread: ProgramThread, bpf: bytes) -> int:
    """Add a filter to all threads of a process, or to one if threads have filters of their own.

    Args:
        thread: the stopped thread that makes the call.
        bpf: an array of ``struct sock_filter``.

    Returns:
        0; or the id of a thread with filters of its own, when only ``thread`` got the filter; or
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
