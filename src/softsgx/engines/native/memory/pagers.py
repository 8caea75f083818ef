"""Choosing the pager of an address space, and setting it up there.

Source:
    userfaultfd(2), pidfd_getfd(2).
"""

from __future__ import annotations

import os
from collections.abc import Callable

from softsgx.engines.native import abi, libc, recording
from softsgx.engines.native.memory.mprotect import MprotectPager
from softsgx.engines.native.memory.page_table import Pager
from softsgx.engines.native.memory.uffd import MINOR_FEATURES, UffdPager, open_userfaultfd
from softsgx.engines.native.tracing.tracee import Thread
from softsgx.errors import SoftSgxError

__all__ = ["PAGERS", "make_pager"]

PAGERS = ("userfaultfd", "mprotect")
"""Names of the pagers, the faster one first."""


def make_pager(
    name: str,
    thread: Thread,
    *,
    inject: Callable[[list[tuple[int, ...]]], None],
    is_running: Callable[[], bool],
    prot_at: Callable[[int], int | None],
    failed: Callable[[Exception], None],
    recorder: recording.Recorder | None = None,
) -> Pager:
    """Set up a pager in an address space.

    Args:
        name: one of :data:`PAGERS`.
        thread: a stopped thread in it.
        inject: makes the program execute system calls, each (number, arguments…).
        is_running: returns whether any thread of the address space may be executing.
        prot_at: returns the rights that the mapping of an enclave may have now, ``None`` where no
            enclave is mapped.
        failed: ends the processes of the address space after an error that leaves it inconsistent.
        recorder: records uses of pages; ``None``: uses are not recorded.

    Raises:
        SoftSgxError: the kernel refuses the pager.
    """
    stores = recorder is not None and recorder.interval_ns is not None
    if name == "mprotect":
        if recorder is not None:
            return recording.RecordedMprotectPager(inject, prot_at, stores=stores)
        return MprotectPager(inject, prot_at)
    assert name == "userfaultfd", f"no pager is called {name!r}"
    theirs = thread.syscall(
        abi.SYS_USERFAULTFD, abi.O_CLOEXEC | abi.O_NONBLOCK | abi.UFFD_USER_MODE_ONLY
    )
    if theirs < 0:
        raise SoftSgxError(
            f"userfaultfd: {os.strerror(-theirs)}; choose the mprotect pager, or allow it "
            "(sysctl vm.unprivileged_userfaultfd, or the container's seccomp profile)"
        )
    try:
        ours = libc.take_descriptor(thread.tid, theirs)
    finally:
        thread.syscall(abi.SYS_CLOSE, theirs)
    try:
        open_userfaultfd(ours, 0 if recorder is None else MINOR_FEATURES)
    except OSError as error:
        os.close(ours)
        oldest = "5.19" if recorder is None else "6.4 for recording"
        raise SoftSgxError(
            f"userfaultfd: {error.strerror}: the kernel is older than {oldest}; "
            "choose the mprotect pager"
        ) from None
    pagemap = os.open(f"/proc/{thread.tid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    arguments = ours, pagemap, inject, is_running, prot_at, failed
    if recorder is not None:
        return recording.RecordedUffdPager(*arguments, stores=stores)
    return UffdPager(*arguments)
