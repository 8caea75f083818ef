"""Requests to the kernel that every stop of a thread or every fault makes.

Each has a form in C (``src/speedups/stops.c``, ``src/speedups/pages.c``), which is used where the
compiled core is.  The forms here are the reference.  None of them raises for what the caller
expects to happen: a thread that is killed, a page that is not mapped.

Source:
    ptrace(2), wait(2), userfaultfd(2), ioctl_userfaultfd(2), fallocate(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import time

from softsgx import compiled
from softsgx.engines.native import abi, libc

__all__ = [
    "INFORMATION",
    "REGISTERS",
    "Place",
    "copy_page",
    "next_fault",
    "next_stop",
    "next_stop_within",
    "protect_pages",
    "take_pages",
    "try_ptrace",
    "wake_page",
]

REGISTERS, INFORMATION = 1, 2
"""What :func:`next_stop` has fetched: a thread's general registers, its signal information."""

Place = tuple[int, int, object, object]
"""Where they go: two addresses, and the objects whose memory is there."""


def _try_ptrace(request: int, tid: int, address: int, data: int) -> int:
    """Do one ptrace request on thread ``tid``; return its result, or ``-errno``."""
    result: int = _ptrace(request, tid, address, data)
    return -ctypes.get_errno() if result == -1 else result


def _next_stop(options: int, places: dict[int, Place]) -> tuple[int, int, int]:
    """Wait for the next stop or end of any thread.

    Args:
        options: 0, or WNOHANG.
        places: by thread, memory for what is fetched.

    Returns:
        The thread, 0 when none has stopped; its status as wait(2) encodes it; what was fetched of
        it, if it has stopped for a signal or a system call.  What is not fetched here has to be
        asked for.

    Raises:
        ChildProcessError: there is no thread, and no other child.
    """
    tid, status = os.waitpid(-1, options | abi.WALL)
    return tid, status, 0


def _next_stop_within(
    limit_ns: int, signals: int, places: dict[int, Place]
) -> tuple[int, int, int]:
    """As :func:`next_stop`, for a time, or until a signal arrives; the caller blocks SIGCHLD.

    Args:
        limit_ns: of the wait; 0: only look, and receive no signal.
        signals: that end it, blocked as well; bit n-1 is signal n.
        places: as there.

    Returns:
        As there.  Where no thread has stopped: 0, the signal or 0, and 0.

    Raises:
        ChildProcessError: as there.
    """
    due_ns = time.monotonic_ns() + limit_ns
    while True:
        event = _next_stop(os.WNOHANG, places)
        left_ns = limit_ns and due_ns - time.monotonic_ns()
        if event[0] or left_ns <= 0:
            return event
        number = libc.wait_for_signal(signals | 1 << abi.SIGCHLD - 1, left_ns)
        if number and signals >> number - 1 & 1:
            return 0, number, 0


def _next_fault(
    epoll: select.epoll, signals: int, limit_ms: int, first: int
) -> tuple[int, int, int, int] | None:
    """Wait until a thread waits for a page, or a signal arrives.

    Args:
        epoll: waits for the userfaultfds and for ``signals``, a signalfd.
        signals: see there.
        limit_ms: of the wait.
        first: a userfaultfd whose event, if it has one, is taken before all others; -1: none.

    Returns:
        The userfaultfd, the thread in its own PID namespace, the address that it has touched, and
        UFFD_PAGEFAULT_FLAG_* bits.  ``None``: a signal has arrived, or the time is over.
    """
    while True:
        descriptor, first = first, -1
        if descriptor < 0:
            found = epoll.poll(limit_ms / 1000, 1)
            if not found:
                return None
            descriptor = found[0][0]
        if descriptor == signals:
            os.read(signals, _SIGNAL_BYTES)
            return None
        try:
            message = os.read(descriptor, _MESSAGE.size)
        except BlockingIOError:
            continue  # it has none, or the thread has taken it back
        _event, flags, address, tid = _MESSAGE.unpack(message)
        return descriptor, tid, address, flags


def _wake_page(uffd: int, address: int) -> None:
    """Wake the threads that wait for a page: UFFDIO_WAKE.

    Raises:
        OSError: the kernel refuses it.
    """
    _PROTECT_WORDS[0], _PROTECT_WORDS[1] = address, abi.PAGE
    code = _until_done(uffd, abi.UFFDIO_WAKE, _PROTECT_AT)
    if code:
        raise OSError(code, f"UFFDIO_WAKE: {os.strerror(code)}")


def _copy_page(uffd: int, address: int, mode: int, data: bytes | bytearray) -> int:
    """UFFDIO_COPY of one page; repeated while the mappings are changing.

    Returns:
        The error's number, 0 for none.
    """
    _SOURCE_VIEW[:] = data
    _COPY_WORDS[0], _COPY_WORDS[3] = address, mode
    return _until_done(uffd, abi.UFFDIO_COPY, _COPY_AT)


def _protect_pages(uffd: int, start: int, end: int, mode: int) -> int:
    """UFFDIO_WRITEPROTECT of a range; otherwise as :func:`copy_page`."""
    _PROTECT_WORDS[0], _PROTECT_WORDS[1], _PROTECT_WORDS[2] = start, end - start, mode
    return _until_done(uffd, abi.UFFDIO_WRITEPROTECT, _PROTECT_AT)


def _until_done(uffd: int, command: int, at: int) -> int:
    while _ioctl(uffd, command, at) == -1:
        code = ctypes.get_errno()
        if code != errno.EAGAIN:
            return code
    return 0


def _take_pages(descriptor: int, runs: list[tuple[int, int]]) -> list[bytes]:
    """Return the bytes of each page of some ranges of a memory file, and make them holes.

    Raises:
        OSError: the kernel refuses it.
    """
    contents: list[bytes] = []
    for start, end in runs:
        for first in range(start, end, _MOST_BYTES):
            size = min(end - first, _MOST_BYTES)
            data = os.pread(descriptor, size, first)
            if len(data) != size:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            contents += [data[at : at + abi.PAGE] for at in range(0, size, abi.PAGE)]
        libc.punch_hole(descriptor, start, end - start)
    return contents


_MESSAGE = struct.Struct("<B7xQQI4x")  # of userfaultfd: a page fault
_SIGNAL_BYTES = 128
_MOST_BYTES = 4096 * abi.PAGE
_ptrace, _ioctl = libc.raw_ptrace, libc.raw_ioctl
_SOURCE = ctypes.create_string_buffer(abi.PAGE)
_SOURCE_VIEW = memoryview(_SOURCE).cast("B")
_COPY_WORDS = (ctypes.c_uint64 * 5)(0, ctypes.addressof(_SOURCE), abi.PAGE)
_COPY_AT = ctypes.addressof(_COPY_WORDS)
_PROTECT_WORDS = (ctypes.c_uint64 * 3)()
_PROTECT_AT = ctypes.addressof(_PROTECT_WORDS)

if compiled.speedups is None:
    try_ptrace, next_stop, next_stop_within = _try_ptrace, _next_stop, _next_stop_within
    copy_page, protect_pages, take_pages = _copy_page, _protect_pages, _take_pages
    next_fault, wake_page = _next_fault, _wake_page
else:
    try_ptrace, next_stop = compiled.speedups.try_ptrace, compiled.speedups.next_stop
    next_stop_within = compiled.speedups.next_stop_within
    copy_page, protect_pages = compiled.speedups.copy_page, compiled.speedups.protect_pages
    take_pages = compiled.speedups.take_pages
    next_fault, wake_page = compiled.speedups.next_fault, compiled.speedups.wake_page
