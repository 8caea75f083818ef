"""Handlers of stops that also log each entry through our vDSO, and how it ended."""

from __future__ import annotations

from typing import Any

from softsgx.engines.native.faults.transitions import Transitions
from softsgx.engines.native.syscalls.call_log import CallLog
from softsgx.engines.native.tracing.program import ProgramThread

__all__ = ["LoggedTransitions"]


class LoggedTransitions(Transitions):
    """See the module.

    Args:
        log: receives the entries.
        arguments: as of :class:`Transitions`.
    """

    def __init__(self, log: CallLog, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._log = log

    def enter(self, thread: ProgramThread) -> int:
        """As :meth:`Transitions.enter`."""
        self._log.entering(thread)
        number = super().enter(thread)
        self._look(thread)
        return number

    def call_inside(self, thread: ProgramThread) -> int:
        """As :meth:`Transitions.call_inside`."""
        number = super().call_inside(thread)
        self._look(thread)
        return number

    def signal(self, thread: ProgramThread, number: int) -> int:
        """As :meth:`Transitions.signal`."""
        number = super().signal(thread, number)
        self._look(thread)
        return number

    def resumed(self, thread: ProgramThread) -> int:
        """As :meth:`Transitions.resumed`."""
        number = super().resumed(thread)
        self._look(thread)
        return number

    def _look(self, thread: ProgramThread) -> None:
        """Log the end of an entry, if the current stop has ended one."""
        if thread.cpu.inside is not None:
            return
        place = thread.load().rip - thread.image.vdso_base
        if place == thread.image.vdso.eenter_after:
            self._log.exited(thread)
        elif place == thread.image.vdso.fixup:
            self._log.excepted(thread)
