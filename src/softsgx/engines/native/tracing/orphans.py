"""Children that no event reports, since their parent was killed inside fork.

The kernel attaches the tracer to a new child before the parent stops for the event of fork.  A
parent that is killed in between, or at the event before the supervisor has read the child's id,
does not report it.  Without the supervisor the child would run.

With CLONE_PARENT the child's parent is that of the process that has made it.  If this one lives, it
may also be about to report the child itself; then one of its threads is at that event, or will be.

Source:
    ptrace(2), proc_pid_status(5), proc_pid_syscall(5); Linux kernel/fork.c (``kernel_clone``).
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator, Set

from softsgx.engines.native import abi, kernel, libc
from softsgx.engines.native.mappings import mapping_at
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.tracing.waits import Waits

__all__ = [
    "FORKS",
    "executes_32_bit",
    "has_copy_of",
    "may_report",
    "orphans",
    "parent_of",
    "shares_memory",
    "tracees",
]

FORKS = frozenset({abi.SYS_FORK, abi.SYS_VFORK, abi.SYS_CLONE, abi.SYS_CLONE3})
"""The calls that make children, by number."""


def orphans(waits: Waits, known: Set[int], living: Set[int], *, killed: bool) -> list[int]:
    """Return the ids of the traced processes whose parents will not report them.

    Args:
        waits: has received the stops of some of them.
        known: the threads that were reported.
        living: the processes whose threads can still report children.
        killed: whether to look for children that have not stopped yet, in all of ``/proc``.
    """
    reports = [*waits.unreported.items(), *waits.kept]
    found = {tid for tid, status in reports if os.WIFSTOPPED(status)}
    if killed:
        found |= set(tracees())
    parents = {tid: parent_of(tid) for tid in found - known}
    return [
        tid
        for tid, elder in parents.items()
        if elder is not None and not (elder in living and may_report(elder, tid))
    ]


def tracees() -> Iterator[int]:
    """Yield the ids of all processes that the calling OS thread traces."""
    tracer = threading.get_native_id()
    for name in os.listdir("/proc"):
        if name.isdigit() and _number(int(name), "TracerPid:") == tracer:
            yield int(name)


def parent_of(pid: int) -> int | None:
    """Return the parent of a process; ``None``: there is no such process, or it is a thread."""
    return _number(pid, "PPid:") if _number(pid, "Tgid:") == pid else None


def may_report(pid: int, child: int) -> bool:
    """Return whether a thread of a process may still report that it has made ``child``.

    A thread that is stopped says so.  What one does that runs, or sleeps in a call that makes a
    child, is not known: it is looked at again, for longer than it runs from making a child to the
    event of that.  One that sleeps for longer has made a child by vfork, and reported it.
    """
    until = time.monotonic() + _RUNS_S
    while True:
        answers = {_reports(int(tid), pid, child) for tid in _threads(pid)}
        if True in answers:
            return True
        if None not in answers or time.monotonic() > until:
            return False
        time.sleep(_RUNS_S / 10)


def _threads(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:  # it has ended
        return []


def _reports(tid: int, pid: int, child: int) -> bool | None:
    """Return whether a thread is at the event of ``child``; ``None``: it is not known."""
    if kernel.try_ptrace(abi.PTRACE_GETSIGINFO, tid, 0, _INFO_AT) == 0:
        if _INFO.code not in _BIRTHS:
            return False
        failed = kernel.try_ptrace(abi.PTRACE_GETEVENTMSG, tid, 0, _MESSAGE_AT)
        return not failed and _MESSAGE.value == child
    try:
        with open(f"/proc/{pid}/task/{tid}/syscall") as file:
            words = file.read().split()
    except OSError:  # it has ended
        return False
    return None if words[0] == "running" or int(words[0]) in FORKS else False


def executes_32_bit(pid: int) -> bool:
    """Return whether a process has a 32-bit program, by the file of that."""
    try:
        with open(f"/proc/{pid}/exe", "rb", buffering=0) as file:
            return file.read(_CLASS_AT + 1)[_CLASS_AT:] == _CLASS_32
    except OSError:  # it has ended
        return False


def has_copy_of(pid: int, vdso_base: int) -> bool:
    """Return whether a process has a mapping that starts where the vDSO of another one does."""
    try:
        mapping = mapping_at(pid, vdso_base)
    except OSError:  # it has ended
        return False
    return mapping is not None and mapping.start == vdso_base


def shares_memory(pid: int, parent: ProgramThread) -> bool:
    """Return whether a stopped process has the address space of ``parent``, which has ended."""
    image = parent.image
    for other in image.threads.values():
        if other.process is not parent.process:
            return libc.syscall(abi.SYS_KCMP, pid, other.tid, abi.KCMP_VM, 0, 0) == 0
    if image.uninvolved:  # nothing is done in it that would be done twice
        return False
    memory, place = image.memory_fd, image.vdso_base + image.vdso.scratch
    kept = os.pread(memory, _MARK_BYTES, place)
    if len(kept) < _MARK_BYTES:  # no process has it any more
        return False
    mark = bytes(byte ^ 0xFF for byte in kept)
    os.pwrite(memory, mark, place)
    try:
        return libc.read_memory(pid, place, _MARK_BYTES) == mark
    finally:
        os.pwrite(memory, kept, place)


_INFO, _MESSAGE = abi.SigInfo(), ctypes.c_ulong()
_INFO_AT, _MESSAGE_AT = ctypes.addressof(_INFO), ctypes.addressof(_MESSAGE)
_BIRTHS = frozenset(
    event << 8 | abi.SIGTRAP
    for event in (abi.PTRACE_EVENT_FORK, abi.PTRACE_EVENT_VFORK, abi.PTRACE_EVENT_CLONE)
)
_MARK_BYTES = 8
_CLASS_AT, _CLASS_32 = 4, b"\x01"  # EI_CLASS of an ELF file
_RUNS_S = 0.01


def _number(pid: int, name: str) -> int | None:
    """Return the number in a line of ``/proc/PID/status``."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next((int(line.split()[1]) for line in file if line.startswith(name)), None)
    except (FileNotFoundError, ProcessLookupError):
        return None
