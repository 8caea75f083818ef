"""Processes that execute 32-bit programs: they run without SGX.

They have neither our vDSO nor enclaves, and none of their system calls stops.  They stay traced,
and the loop answers their stops at once: a 64-bit program that one of them executes is supervised,
and the system calls that its filter stops would fail without a tracer.

Source:
    ptrace(2), seccomp(2); Linux arch/x86/kernel/process_64.c (``compat_start_thread``).
"""

from __future__ import annotations

import os
from collections.abc import Callable

from softsgx.engines.native import abi, kernel, libc
from softsgx.engines.native.tracing.program import Process
from softsgx.engines.native.tracing.start import finish_exec
from softsgx.engines.native.tracing.tracee import Gone, Stop, Thread, decode_stop
from softsgx.engines.native.tracing.waits import Waits, let_end
from softsgx.ondemand import logger

__all__ = ["Unsupervised", "is_32_bit"]

_LOG = logger(__name__)

_USER32_CS = 0x23
_BIRTHS = (abi.PTRACE_EVENT_FORK, abi.PTRACE_EVENT_VFORK, abi.PTRACE_EVENT_CLONE)


def is_32_bit(thread: Thread) -> bool:
    """Return whether a thread that is stopped at the end of its execve has a 32-bit program."""
    return thread.load().cs == _USER32_CS


class Unsupervised:
    """See the module.

    Args:
        waits: receives stops and ends.
        new_process: makes the process of a child, from its id and its parent.

    Attributes:
        processes: the process of each thread, by the thread's id.
    """

    def __init__(
        self,
        waits: Waits,
        new_process: Callable[[int, Process], Process],
    ) -> None:
        self._waits, self._new_process = waits, new_process
        self.processes: dict[int, Process] = {}
        self._told = False

    def add(self, tid: int, process: Process) -> None:
        """A process has executed a 32-bit program; ``tid`` is its only thread, stopped."""
        self.processes[tid] = process
        if not self._told:
            self._told = True
            name = os.readlink(f"/proc/{tid}/exe")
            _LOG.warning("process %d: %s is a 32-bit program: it runs without SGX", tid, name)

    def resume(self, tid: int, number: int = 0) -> None:
        """Resume a stopped thread, delivering signal ``number``."""
        kernel.try_ptrace(abi.PTRACE_CONT, tid, 0, number)  # fails if the thread has been killed

    def stopped(self, tid: int, status: int) -> Process | None:
        """Answer a stop of one of the threads.

        Returns:
            After an execve, the process whose only thread ``tid`` is now, stopped at the end of the
            call; it is no longer in ``processes``.

        Raises:
            Gone: the thread has been killed.
        """
        stop = decode_stop(status)
        if stop.event == abi.PTRACE_EVENT_EXIT:
            let_end(tid)
        elif stop.event == abi.PTRACE_EVENT_EXEC:
            return self._executed(tid)
        elif stop.event in _BIRTHS:
            self._born(tid, stop.event)
            self.resume(tid)
        elif stop.event == abi.PTRACE_EVENT_STOP and stop.signal != abi.SIGTRAP:
            kernel.try_ptrace(abi.PTRACE_LISTEN, tid, 0, 0)  # it stays in its group stop
        else:
            self.resume(tid, _delivered(stop))
        return None

    def _executed(self, tid: int) -> Process:
        """Handle the event of execve: other threads have ended, this one has the leader's id."""
        thread = Thread(tid, self._waits)
        process = self.processes.pop(thread.event_message(abi.PTRACE_EVENT_EXEC))
        self.processes.pop(tid, None)
        finish_exec(thread)
        return process

    def _born(self, parent: int, event: int) -> None:
        tid = Thread(parent, self._waits).event_message(event)
        if tid not in self.processes:  # else it was taken for an orphan
            self.adopt(tid, self.processes[parent])

    def adopt(self, tid: int, maker: Process) -> None:
        """Add a thread that a process has made, and resume it."""
        status = self._waits.first_stop(tid)
        if status is None:
            return
        try:
            leader = libc.leader(tid)
            process = maker if leader == maker.pid else self._new_process(tid, maker)
            self.processes[tid] = process
            self.stopped(tid, status)
        except (Gone, FileNotFoundError, ProcessLookupError):
            return  # wait(2) reports its end


def _delivered(stop: Stop) -> int:
    return 0 if stop.event or stop.syscall else stop.signal
