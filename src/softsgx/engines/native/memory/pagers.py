"""Choosing the pager of an address space, and setting it up there.

Source:
    userfaultfd(2), pidfd_getfd(2).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from errno import EPERM

from softsgx.engines.native import abi, libc, recording
from softsgx.engines.native.memory.page_table import Pager
from softsgx.engines.native.memory.uffd import MINOR_FEATURES, UffdPager, open_userfaultfd
from softsgx.engines.native.tracing.tracee import Thread
from softsgx.errors import SoftSgxError

__all__ = ["PAGERS", "NoPager", "check_pager", "make_pager"]

PAGERS = ("userfaultfd", "mprotect")
"""Names of the pagers, the faster one first."""


class NoPager:
    """The pager of an address space without mappings of enclaves: it has nothing to do."""

    name = "none"

    def map_prot(self, prot: int) -> int:
        """No mapping has other rights than it should have."""
        return prot

    def mapped(self, start: int, end: int, prot: int, shown: dict[int, int]) -> None:
        """Another pager is made before that."""
        raise AssertionError(f"an enclave at {start:#x} without a pager")

    def reveal(self, start: int, end: int, prot: int) -> None:
        """There is nothing to show."""

    def before_hide(self, start: int, end: int) -> None:
        """Nothing can be stored to."""

    def after_hide(self, start: int, end: int) -> None:
        """Nothing was shown."""

    def show(self, linaddr: int, data: bytes | bytearray, rights: int) -> bool:
        """It cannot fill a page."""
        return False

    def shown(self, linaddr: int, rights: int) -> None:
        """The page is not mapped here."""

    def set_rights(self, linaddr: int, rights: int) -> None:
        """The page is not mapped here."""

    def test_and_clear_accessed(self, linaddr: int) -> bool:
        """No page was used."""
        return False

    def touched(self, linaddr: int, access: int) -> bool:
        """No page is watched."""
        return False

    def flush(self) -> None:
        """Nothing is deferred."""

    def close(self) -> None:
        """It has no resource."""


_UFFD_FLAGS = abi.O_CLOEXEC | abi.O_NONBLOCK | abi.UFFD_USER_MODE_ONLY


def check_pager(name: str, *, recorded: bool) -> None:
    """Raise ``SoftSgxError`` if this machine forbids a pager; ``recorded``: for a recording."""
    if name != "userfaultfd":
        return
    try:
        uffd = libc.syscall(abi.SYS_USERFAULTFD, _UFFD_FLAGS)
    except OSError as error:
        raise _forbidden(error.errno or EPERM) from None
    _negotiate(uffd, recorded=recorded)
    os.close(uffd)


def _forbidden(number: int) -> SoftSgxError:
    return SoftSgxError(
        f"userfaultfd: {os.strerror(number)}; choose the mprotect pager, or allow it "
        "(sysctl vm.unprivileged_userfaultfd, or the container's seccomp profile)"
    )


def _negotiate(uffd: int, *, recorded: bool, events: bool = False) -> None:
    try:
        open_userfaultfd(uffd, MINOR_FEATURES if recorded else 0, events=events)
    except OSError as error:
        os.close(uffd)
        oldest = "6.4 for recording" if recorded else "5.19"
        raise SoftSgxError(
            f"userfaultfd: {error.strerror}: the kernel is older than {oldest}; "
            "choose the mprotect pager"
        ) from None


Events = tuple[Callable[[int], None], Callable[[int], None]]


def make_pager(
    name: str,
    thread: Thread,
    *,
    inject: Callable[[list[tuple[int, ...]]], None],
    is_running: Callable[[], bool],
    prot_at: Callable[[int], int | None],
    failed: Callable[[Exception], None],
    recorder: recording.Recorder | None = None,
    events: Events | None = None,
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
        events: begins and ends to wait for the events of a userfaultfd; ``None``: faults are
            signals.

    Raises:
        SoftSgxError: the kernel refuses the pager.
    """
    from softsgx.engines.native.memory.mprotect import MprotectPager

    stores = recorder is not None and recorder.interval_ns is not None
    if name == "mprotect":
        if recorder is not None:
            return recording.RecordedMprotectPager(inject, prot_at, stores=stores)
        return MprotectPager(inject, prot_at)
    assert name == "userfaultfd", f"no pager is called {name!r}"
    theirs = thread.syscall(abi.SYS_USERFAULTFD, _UFFD_FLAGS)
    if theirs < 0:
        raise _forbidden(-theirs)
    try:
        ours = libc.take_descriptor(thread.tid, theirs)
    finally:
        thread.syscall(abi.SYS_CLOSE, theirs)
    _negotiate(ours, recorded=recorder is not None, events=events is not None)
    pagemap = os.open(f"/proc/{thread.tid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    arguments = ours, pagemap, inject, is_running, prot_at, failed
    if recorder is not None:
        return recording.RecordedUffdPager(*arguments, stores=stores)
    if events is None:
        return UffdPager(*arguments)
    begin, end = events
    begin(ours)
    return UffdPager(*arguments, end)
