"""Ends of threads: the memory that the kernel writes when a thread ends has to be present.

When a thread ends, the kernel writes zero to the address of set_tid_address(2) or clone(2), for
which pthread_join(3) waits, and marks the robust futexes that the thread holds.  It does not wait
for userfaultfd then: the stores would be lost.  So the recorder makes those pages present before,
and does not hide them until the thread is a zombie.

Source:
    set_tid_address(2), get_robust_list(2); uapi/linux/futex.h (``struct robust_list_head``);
    handle_userfault(), fs/userfaultfd.c.
"""

from __future__ import annotations

import ctypes
import struct

from softsgx.engines.native import abi, libc
from softsgx.engines.ordinary.program import ProgramThread
from softsgx.engines.ordinary.space import AddressSpace, Hold

__all__ = ["Exits"]

_HEAD = struct.Struct("<QqQ")
_MOST_LOCKS = 2048
_SHIFT = 12


class Exits:
    """See the module."""

    def __init__(self) -> None:
        self._ending: dict[int, Hold] = {}

    def begin(self, thread: ProgramThread, space: AddressSpace) -> None:
        """Pin the pages of a thread at its PTRACE_EVENT_EXIT; others share its address space."""
        pages = _robust_pages(thread.tid, space)
        if thread.cleared_at:
            pages.add(thread.cleared_at >> _SHIFT)
        self._ending[thread.tid] = Hold(space, pins=pages, whole=False)
        for page in pages:
            space.make_writable(page)

    def ended(self, tid: int) -> None:
        """A thread was reaped."""
        hold = self._ending.pop(tid, None)
        if hold is not None:
            hold.release()

    def release_zombies(self) -> None:
        """Unpin the pages of threads that are zombies now."""
        for tid in list(self._ending):
            if _is_zombie(tid):
                self.ended(tid)


def _is_zombie(tid: int) -> bool:
    try:
        with open(f"/proc/{tid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] in (b"Z", b"X")
    except OSError:
        return True


def _robust_pages(tid: int, space: AddressSpace) -> set[int]:
    """Return the pages of the robust futexes that a thread holds, and of their list."""
    head, length = ctypes.c_uint64(), ctypes.c_uint64()
    try:
        at = ctypes.addressof
        libc.syscall(abi.SYS_GET_ROBUST_LIST, tid, at(head), at(length))
    except OSError:
        return set()
    if not head.value:
        return set()
    pages = {head.value >> _SHIFT}
    data = space.read(head.value, _HEAD.size)
    if len(data) < _HEAD.size:
        return set()
    entry, offset, pending = _HEAD.unpack(data)
    if pending:
        pages.add((pending & ~1) + offset >> _SHIFT)
    for _lock in range(_MOST_LOCKS):
        entry &= ~1  # bit 0 says that it is a PI futex
        if entry == head.value:
            break
        pages.update((entry >> _SHIFT, entry + offset >> _SHIFT))
        data = space.read(entry, 8)
        if len(data) < 8:
            break
        entry = int.from_bytes(data, "little")
    return pages
