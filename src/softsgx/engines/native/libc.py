"""Calls Python has no name for, through ctypes: each raises ``OSError`` where C says -1."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from array import array
from typing import Any

from softsgx.engines.native import abi

_libc = ctypes.CDLL(None, use_errno=True)

_ptrace = _libc.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

#: ptrace as C has it: -1 and errno.  For the few requests that every transition makes.
raw_ptrace = _ptrace

_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

_fallocate = _libc.fallocate
_fallocate.restype = ctypes.c_int
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]

_ioctl = _libc.ioctl
_ioctl.restype = ctypes.c_int
_ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]

#: ioctl as C has it, for the one that every fault makes.
raw_ioctl = _ioctl

_readv = _libc.process_vm_readv
_writev = _libc.process_vm_writev
for _function in (_readv, _writev):
    _function.restype = ctypes.c_ssize_t
    _function.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    ]


MOST_PAGES = 64
"""How many pages :func:`read_pages` can read at once."""

_PAGES = ctypes.create_string_buffer(MOST_PAGES * abi.PAGE)
_PAGES_VIEW = memoryview(_PAGES).cast("B")


def _failure(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}")


def ptrace(request: int, tid: int, address: int = 0, data: int = 0) -> int:
    """Do one ptrace request on thread ``tid``."""
    result: int = _ptrace(request, tid, address, data)
    if result == -1:
        raise _failure("ptrace")
    return result


def syscall(number: int, *arguments: int) -> int:
    """Make a raw system call of the supervisor itself."""
    result: int = _syscall(
        ctypes.c_long(number), *(ctypes.c_ulong(argument & (1 << 64) - 1) for argument in arguments)
    )
    if result == -1:
        raise _failure(f"system call {number}")
    return result


def ioctl(descriptor: int, command: int, argument: ctypes.Array[Any]) -> None:
    """Make an ioctl whose argument is the buffer ``argument``."""
    if _ioctl(descriptor, command, ctypes.addressof(argument)) == -1:
        raise _failure("ioctl")


def child_signals() -> int:
    """Return a new signalfd that is ready while a SIGCHLD waits, which the caller blocks."""
    mask = ctypes.c_uint64(1 << signal.SIGCHLD - 1)
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    return syscall(abi.SYS_SIGNALFD4, -1, ctypes.addressof(mask), ctypes.sizeof(mask), flags)


def wait_for_signal(signals: int, limit_ns: int) -> int:
    """Wait for one of ``signals``, which the caller blocks; bit n-1 is signal n.

    ``signal.sigtimedwait()`` is no way to wait: if it is interrupted, and its time is over when the
    handlers have run, it returns uninitialized memory as the signal.

    Returns:
        The signal; 0: the time is over, or the wait was interrupted.
    """
    mask = ctypes.c_uint64(signals)
    limit = (ctypes.c_int64 * 2)(*divmod(limit_ns, 1_000_000_000))  # struct timespec
    try:
        return syscall(
            abi.SYS_RT_SIGTIMEDWAIT,
            ctypes.addressof(mask),
            0,
            ctypes.addressof(limit),
            ctypes.sizeof(mask),
        )
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EINTR):
            raise
        return 0


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    """Free the pages of a memory file in ``[offset, offset + length)``; its size stays."""
    mode = abi.FALLOC_FL_PUNCH_HOLE | abi.FALLOC_FL_KEEP_SIZE
    if _fallocate(descriptor, mode, offset, length) == -1:
        raise _failure("fallocate")


def read_memory(pid: int, address: int, size: int) -> bytes:
    """Read a process's memory as the process itself could; fewer bytes than asked is EFAULT."""
    buffer = ctypes.create_string_buffer(size)
    local = abi.IoVec(ctypes.addressof(buffer), size)
    remote = abi.IoVec(address, size)
    done = _readv(pid, ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0)
    if done != size:
        raise OSError(14, f"cannot read {size} bytes at {address:#x} of process {pid}")
    return buffer.raw


def read_pages(pid: int, address: int, count: int) -> list[bytes]:
    """Read up to :data:`MOST_PAGES` pages as :func:`read_memory`; fewer where a page is not there.

    Raises:
        OSError: EFAULT: not even the first.
    """
    local = abi.IoVec(ctypes.addressof(_PAGES), count * abi.PAGE)
    remote = abi.IoVec(address, count * abi.PAGE)
    done = _readv(pid, ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0)
    if done < abi.PAGE:
        raise OSError(14, f"cannot read a page at {address:#x} of process {pid}")
    return [
        bytes(_PAGES_VIEW[at : at + abi.PAGE]) for at in range(0, done - abi.PAGE + 1, abi.PAGE)
    ]


def read_scattered(pid: int, vector: array[int], address: int, size: int) -> int:
    """Copy memory that a process can read into memory of this process; return how many bytes.

    Args:
        pid: the process.
        vector: up to 1024 pairs of address and length in our memory.
        address: where to read.
        size: how many bytes.
    """
    local, _words = vector.buffer_info()
    remote = abi.IoVec(address, size)
    done: int = _readv(pid, local, len(vector) // 2, ctypes.addressof(remote), 1, 0)
    return max(done, 0)


def write_memory(pid: int, address: int, data: bytes) -> None:
    """Write a process's memory as the process itself could; fewer bytes than given is EFAULT."""
    buffer = ctypes.create_string_buffer(data, len(data))
    local = abi.IoVec(ctypes.addressof(buffer), len(data))
    remote = abi.IoVec(address, len(data))
    done = _writev(pid, ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0)
    if done != len(data):
        raise OSError(14, f"cannot write {len(data)} bytes at {address:#x} of process {pid}")


def current_cpu() -> int:
    """Return the number of the processor that this thread runs on."""
    return int(_libc.sched_getcpu())


def hardware_capabilities() -> int:
    """Return AT_HWCAP2 of this process."""
    return int(_libc.getauxval(ctypes.c_ulong(abi.AT_HWCAP2)))


def dumpable() -> bool:
    """Return whether this process may leave a core dump, and be traced by others of its user."""
    return bool(syscall(abi.SYS_PRCTL, abi.PR_GET_DUMPABLE, 0, 0, 0, 0))


def set_dumpable(yes: bool) -> None:
    """Say whether this process may leave a core dump, and be traced by others of its user."""
    syscall(abi.SYS_PRCTL, abi.PR_SET_DUMPABLE, int(yes), 0, 0, 0)


def end_with(parent: int | None) -> None:
    """Let SIGKILL end this process when the thread ends that made it in process ``parent``.

    Ends it now if that has happened already; ``None`` undoes it.
    """
    syscall(abi.SYS_PRCTL, abi.PR_SET_PDEATHSIG, 0 if parent is None else abi.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def take_descriptor(tid: int, descriptor: int) -> int:
    """Return our own descriptor of what ``descriptor`` is to thread ``tid``.

    Before Linux 6.9 it is what it is to the leader of the thread's process, which has to be there:
    the same, unless the program has unshared descriptor tables by unshare(2) or clone(2).
    """
    try:
        pidfd = syscall(abi.SYS_PIDFD_OPEN, tid, abi.PIDFD_THREAD)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pidfd = syscall(abi.SYS_PIDFD_OPEN, leader(tid), 0)
    try:
        return syscall(abi.SYS_PIDFD_GETFD, pidfd, descriptor, 0)
    finally:
        os.close(pidfd)


def leader(tid: int) -> int:
    """Return the id of the process that thread ``tid`` belongs to."""
    with open(f"/proc/{tid}/status") as file:
        return int(next(line.split()[1] for line in file if line.startswith("Tgid:")))
