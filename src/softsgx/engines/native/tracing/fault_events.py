"""Faults that userfaultfd reports while their threads wait in the kernel: no thread stops for them.

The kernel queues an event for each thread that touches a hole, and the thread sleeps until its page
is filled and it is woken, or until a signal or an interrupt arrives.  Then it takes its event back;
if it touches the hole again, there is another event.  So an event that was read is that of a thread
that still waits, or that has stopped for something else since then.

The supervisor waits for events and for stops together: epoll, on the userfaultfds and on a signalfd
with SIGCHLD.  SIGCHLD is for the whole process.  A thread of the calling process that does not
block it would take it, so there are no events then, and faults are signals
(:mod:`softsgx.engines.native.memory.uffd`).

The thread that was woken last often touches the next hole before the supervisor looks again.  So
its userfaultfd is read first, and the supervisor waits only where that has no event.  After 16
events of one address space it lets epoll choose, which takes turns: a stop is seen after 16 events
of each address space at the latest.

Source:
    userfaultfd(2); signalfd(2); fs/userfaultfd.c for what happens to the event of a thread that is
    interrupted.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from typing import TYPE_CHECKING, NamedTuple

from softsgx import compiled
from softsgx.engines.native import kernel, libc

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.process_image import ProcessImage
    from softsgx.engines.native.tracing.program import ProgramThread

__all__ = ["MOST_IN_A_ROW", "FaultEvent", "FaultEvents", "can_wait_for_events"]

MOST_IN_A_ROW = 16
"""The most events of one address space that are taken before others are looked for."""


class FaultEvent(NamedTuple):
    """A thread waits for a page.

    Attributes:
        uffd: the userfaultfd of its address space.
        tid: its id in its own PID namespace.
        address: what it has touched.
        flags: UFFD_PAGEFAULT_FLAG_* bits.
    """

    uffd: int
    tid: int
    address: int
    flags: int


def can_wait_for_events() -> bool:
    """Return whether SIGCHLD reaches the calling thread: every other thread blocks it."""
    bit = 1 << signal.SIGCHLD - 1
    own = str(threading.get_native_id())
    for tid in os.listdir("/proc/self/task"):
        if tid == own:
            continue
        try:
            with open(f"/proc/self/task/{tid}/status") as file:
                blocked = next(line for line in file if line.startswith("SigBlk:"))
        except OSError:
            continue  # it has ended
        if not int(blocked.split()[1], 16) & bit:
            return False
    return True


class FaultEvents:
    """See the module.  The calling thread blocks SIGCHLD.

    Attributes:
        images: the address space of each userfaultfd.
        epoll: what is waited on; signals: the signalfd in it.
        may_have_stopped: whether a thread may have stopped since wait(2) has said that none has.
        latest: the userfaultfd of the last event; -1: it is not read first.
        in_a_row: number of its events that were taken before others were looked for.
    """

    __slots__ = ("epoll", "images", "in_a_row", "latest", "may_have_stopped", "signals")

    def __init__(self) -> None:
        self.images: dict[int, ProcessImage] = {}
        self.signals = libc.child_signals()
        self.epoll = select.epoll()
        self.epoll.register(self.signals, select.EPOLLIN)
        self.may_have_stopped = True
        self.latest, self.in_a_row = -1, 0

    def add(self, uffd: int, image: ProcessImage) -> None:
        """Wait for the faults of an address space, too."""
        self.images[uffd] = image
        self.epoll.register(uffd, select.EPOLLIN)
        self.may_have_stopped = True

    def remove(self, uffd: int) -> None:
        """Do not wait for them any more; the descriptor is still open."""
        del self.images[uffd]
        if self.latest == uffd:
            self.latest = -1  # the number may be that of any file later
        if not self.epoll.closed:
            self.epoll.unregister(uffd)

    def wait(self, limit_s: float) -> FaultEvent | None:
        """Wait for a fault; ``None``: a thread may have stopped, or the time is over."""
        limit_ms = max(int(limit_s * 1000 + 0.999), 0)
        first = self.latest if self.in_a_row < MOST_IN_A_ROW else -1
        found = kernel.next_fault(self.epoll, self.signals, limit_ms, first)
        if found is None:
            self.may_have_stopped, self.latest = True, -1
            return None
        self.in_a_row = self.in_a_row + 1 if found[0] == first else 1
        self.latest = found[0]
        return FaultEvent(*found)

    def thread(self, fault: FaultEvent) -> ProgramThread | None:
        """Return the thread that waits; ``None``: it has ended."""
        threads = self.images[fault.uffd].threads
        thread = threads.get(fault.tid)
        if thread is not None and thread.own_tid == fault.tid:
            return thread
        return next((each for each in threads.values() if each.own_tid == fault.tid), None)

    def close(self) -> None:
        """Close the descriptors; address spaces close theirs."""
        self.epoll.close()
        os.close(self.signals)


if compiled.speedups is not None:
    compiled.speedups.bind("FaultEvents", FaultEvents)
