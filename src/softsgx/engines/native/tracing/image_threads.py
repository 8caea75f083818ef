"""System calls in the name of the threads of an address space, as the pagers need them.

Calls are made at a stop: at that of the thread that is being served, or of another thread, which is
stopped for it.

Source:
    ptrace(2).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from softsgx.driver import BadAddress
from softsgx.engines.native import abi
from softsgx.engines.native.memory.page_table import Pager
from softsgx.engines.native.tracing.fault_fields import FaultingImage
from softsgx.engines.native.tracing.memory_descriptor import open_inherited
from softsgx.engines.native.tracing.tracee import Gone
from softsgx.engines.native.vdso.code import CALL_WORDS, pack_calls
from softsgx.engines.native.vdso.elf import Vdso

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.program import ProgramThread

__all__ = ["ThreadsOfImage"]

#: In one table.
_MOST_CALLS = abi.PAGE // (8 * CALL_WORDS)


class ThreadsOfImage(FaultingImage):
    """The threads of an address space; see the module.

    Args:
        vdso_base: address of our vDSO.
        vdso: our vDSO.
        hold: stops a running thread; ``False``: it has died.
        pager: has work to do before the program runs.

    Attributes:
        memory_fd: descriptor of ``/proc/PID/mem``; it reads and writes what a debugger may.
        threads: the threads that may run code in it again, by id.
        members: number of its threads that were not reaped yet.
        current: the thread whose stop is being handled.
        faulting: the thread whose fault is being resolved while it waits in the kernel.
    """

    members = 0
    _collecting = False

    def __init__(
        self,
        vdso_base: int,
        vdso: Vdso,
        hold: Callable[[ProgramThread], bool],
        pager: Pager,
    ) -> None:
        self.vdso_base, self.vdso = vdso_base, vdso
        self.hold, self.pager = hold, pager
        self.threads: dict[int, ProgramThread] = {}
        self.current = self.faulting = None
        self._deferred_calls = []

    @cached_property
    def memory_fd(self) -> int:
        """See the class; it is opened at its first use."""
        return open_inherited(self.any_pid(), self.vdso_base, self.vdso)

    def _failed(self, error: Exception) -> None:
        """Calls have failed: end the processes that have this address space."""
        raise NotImplementedError

    def inject(self, calls: list[tuple[int, ...]]) -> None:
        """Make system calls in the program's name; their results are ignored.

        Uses the current thread, or stops another one.  If all threads are in system calls that
        cannot be interrupted, the calls are made before any of them runs code of the program again.
        Without a living thread there is nothing to do.  A failure ends the processes that have this
        image.
        """
        self._deferred_calls += calls
        if self._collecting:
            return
        calls, self._deferred_calls = self._deferred_calls, []
        for thread in self._candidates():
            try:
                if thread is not self.current and not self.hold(thread):
                    continue
                if not thread.mid_call:
                    self._make(thread, calls)
                    return
            except Gone:
                continue
            except Exception as error:
                self._failed(error)
                return
        if self.threads:
            self._deferred_calls = calls

    def flush(self) -> None:
        """Make the deferred calls: the current thread is about to run code of the program."""
        self.pager.flush()
        if self._deferred_calls:
            self.inject([])

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Collect the calls that the ``with`` block injects, and make them together at its end."""
        assert not self._collecting, "calls are being collected already"
        self._collecting = True
        try:
            yield
        finally:
            self._collecting = False
        if self._deferred_calls:
            self.inject([])

    def _make(self, thread: ProgramThread, calls: list[tuple[int, ...]]) -> None:
        if len(calls) == 1:
            thread.syscall(*calls[0])
            return
        start, end = self.vdso_base + self.vdso.calls, self.vdso_base + self.vdso.called
        table = self.vdso_base + self.vdso.table
        for first in range(0, len(calls), _MOST_CALLS):
            some = calls[first : first + _MOST_CALLS]
            os.pwrite(self.memory_fd, pack_calls(some), table)
            thread.borrow(start, end, rbx=table, rbp=len(some))

    def _candidates(self) -> list[ProgramThread]:
        others = [
            thread
            for thread in self.threads.values()
            if thread is not self.current and not thread.unstoppable
        ]
        others.sort(key=lambda thread: thread.running)  # those that are stopped anyway come first
        return others if self.current is None else [self.current, *others]

    def is_running(self) -> bool:
        """Return whether any of its threads may be executing."""
        faulting = self.faulting
        return any(thread.running and thread is not faulting for thread in self.threads.values())

    def any_pid(self) -> int:
        """Return the id of some thread that has this address space.

        Raises:
            BadAddress: there is none any more.
        """
        for thread in self.threads.values():
            return thread.tid
        raise BadAddress("the process has ended")
