"""A thread of an ordinary program that is recorded."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from softsgx.engines.native import abi, libc
from softsgx.engines.native.tracing.tracee import Gone, Stop, Thread
from softsgx.engines.native.tracing.waits import Waits

if TYPE_CHECKING:
    from softsgx.engines.ordinary.space import AddressSpace, Hold

__all__ = ["ProgramThread"]


class ProgramThread(Thread):
    """See the module.

    Args:
        tid: its id.
        pid: the id of its process.
        waits: receives its stops.

    Attributes:
        space: its address space; ``None`` while it is not known, or not recorded.
        at_end: receives the result of the system call that it makes now.
        holds: what the call keeps from being hidden until it ends.
        cleared_at: the address where the kernel writes zero when it ends; 0: none.
        cleared_by_child: ``cleared_at`` of the task that it makes now.
        made: the id of the task that it has made last.
        reaps: the id of the resident task in its process's previous address space; 0: none.
        space_base: address of the recorder's code in its address space.
    """

    def __init__(self, tid: int, pid: int, waits: Waits) -> None:
        super().__init__(tid, waits)
        self.pid = pid
        self.space: AddressSpace | None = None
        self.at_end: Callable[[int], None] | None = None
        self.holds: Hold | None = None
        self.cleared_at = self.cleared_by_child = 0
        self.made = self.reaps = self.space_base = 0

    def stopped(self, status: int, fetched: int = 0) -> Stop:
        """Record a stop, and the id of a task that it has made by clone."""
        stop = super().stopped(status, fetched)
        if stop.event == abi.PTRACE_EVENT_CLONE:
            self.made = 0
            with suppress(Gone):  # the next request to it finds that out, too
                self.made = self.event_message(stop.event)
        return stop

    def rseq_at(self) -> int:
        """Return the address of its area for rseq(2); 0: it has none, or the kernel is too old."""
        answer = (ctypes.c_uint64 * 3)()
        try:
            libc.ptrace(
                abi.PTRACE_GET_RSEQ, self.tid, ctypes.sizeof(answer), ctypes.addressof(answer)
            )
        except OSError:  # before Linux 5.13
            return 0
        return answer[0]

    def release(self) -> None:
        """Release what its system call held in its address space."""
        hold, self.holds = self.holds, None
        if hold is not None:
            hold.release()
