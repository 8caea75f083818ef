"""Limits and priority of the supervisor, raised while a program runs; the program keeps its own.

Each process of the program costs the supervisor a few descriptors, and the memory file of an
enclave is as long as the address space.

A thread that stops waits for the supervisor.  Where more threads want to run than there are
processors, the kernel would give the supervisor no more time than each of them: a thread that holds
a spin lock would wait for those that spin, at each of its stops.

Source:
    setrlimit(2); setpriority(2), sched(7).
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EMFILE

__all__ = [
    "Limits",
    "file_bytes",
    "keep_spare",
    "raise_limits",
    "set_limits",
    "with_raised_priority",
]

Limits = dict[int, tuple[int, int]]
"""(soft, hard) by number of the limit."""

_RAISED = (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE)


def raise_limits() -> Limits:
    """Raise the limits as far as allowed; return the earlier ones, for :func:`set_limits`."""
    former = {which: resource.getrlimit(which) for which in _RAISED}
    for which, (_soft, hard) in former.items():
        resource.setrlimit(which, (hard, hard))
    return former


def set_limits(limits: Limits) -> None:
    """Set limits of this process."""
    for which, values in limits.items():
        resource.setrlimit(which, values)


_NICER = 10


@contextmanager
def with_raised_priority() -> Iterator[None]:
    """Give the calling thread a higher priority, where that is allowed (CAP_SYS_NICE)."""
    before, raised = os.getpriority(os.PRIO_PROCESS, 0), False
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, before - _NICER)
        raised = True
    try:
        yield
    finally:
        if raised:
            os.setpriority(os.PRIO_PROCESS, 0, before)


def file_bytes() -> int | None:
    """Return how long a file may be at most once the limit is raised; ``None``: any length."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if hard == resource.RLIM_INFINITY else hard


#: Descriptors that are needed for moments, to serve any process, and for what a new one has.
_SPARE = 32


def keep_spare(descriptor: int) -> int:
    """Return a descriptor of a new process, if enough are left to serve those that run.

    The kernel gives out the lowest number that is free, so a high one says that few are.

    Raises:
        OSError: EMFILE: it is closed, as too few are left.
    """
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and descriptor >= soft - _SPARE:
        os.close(descriptor)
        raise OSError(EMFILE, os.strerror(EMFILE))
    return descriptor
