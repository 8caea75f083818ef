"""Boundaries for exceptions that are bugs of softsgx: each ends the smallest part of the program.

The first of these places that the exception reaches catches it, and the rest of the program
continues:

*A thread that is served, or stopped for another thread* (:class:`~.loop.Loop`): its process ends.

*An address space in which calls are made for another process*
(:class:`~.process_image.ProcessImage`): its processes end, and the caller continues as if they had
ended by themselves.

*Releasing the resources of a dead thread*, and *background tasks*: no process ends.  Without ksgxd
each thread that needs a page evicts one itself, so its next exception ends its own process.

*The platform*: an exception that passes all of these ends every process.

Each exception is logged once with its traceback and kept, and the run fails with
:class:`RunFailed` when the program has ended.  A failure that is not our mistake (a limit of this
machine, bad input) ends a process with one line, and the run does not fail.
"""

from __future__ import annotations

import os
import signal
from errno import EMFILE, ENFILE, ENOMEM, ENOSPC

from softsgx.errors import SoftSgxError
from softsgx.ondemand import logger

__all__ = ["Failures", "kill"]

_LOG = logger(__name__)

_NO_DESCRIPTOR = (
    "too few descriptors are left to serve it; raise the limit on open files (ulimit -Hn)"
)
_NO_MEMORY = "this machine has no memory left for its enclaves; choose a smaller EPC"
_SHORTAGES = {
    EMFILE: _NO_DESCRIPTOR,
    ENFILE: _NO_DESCRIPTOR,
    ENOMEM: _NO_MEMORY,
    ENOSPC: _NO_MEMORY,
}


class Failures:
    """See the module.

    Attributes:
        errors: the exceptions, the earliest first.
    """

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self._ended: set[int] = set()

    def end_process(self, pid: int, error: Exception) -> None:
        """End process ``pid`` because of ``error``; the reason is logged once."""
        told = pid in self._ended
        self._ended.add(pid)
        if isinstance(error, OSError) and error.errno in _SHORTAGES:
            if not told:
                _LOG.error("process %d is ended: %s", pid, _SHORTAGES[error.errno])
        elif isinstance(error, SoftSgxError):
            if not told:
                _LOG.error("process %d is ended: %s", pid, error)
        elif not told:
            self.note(f"process {pid} is ended: {error!r} while serving it", error)
        kill(pid)

    def reaped(self, pid: int) -> None:
        """Forget process ``pid``, which wait(2) has reaped: the kernel may reuse its id."""
        self._ended.discard(pid)

    def note(self, what: str, error: Exception) -> None:
        """Keep and log an exception that is a bug of softsgx; no process is ended."""
        _LOG.error("%s", what, exc_info=error)
        self.errors.append(error)


def kill(pid: int) -> None:
    """Send SIGKILL to a process that may have ended."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
