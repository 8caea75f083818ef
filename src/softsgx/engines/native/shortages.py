"""Warnings about calls and accesses of the program that fail for lack of EPC, backing or memory.

The program sees an errno value or SIGBUS, which do not name the cause.  The log does, once for each
process.
"""

from __future__ import annotations

from softsgx.driver import EnclaveFile
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.ondemand import logger

__all__ = ["Shortages"]

_LOG = logger(__name__)


class Shortages:
    """See the module."""

    def __init__(self) -> None:
        self._reported = set[int]()

    def report(self, thread: ProgramThread, what: str, why: str) -> None:
        """Log what failed and why; once for each process, and never without a cause."""
        if why and thread.process.pid not in self._reported:
            self._reported.add(thread.process.pid)
            _LOG.warning("process %d: %s: %s", thread.process.pid, what, why)

    def report_refused(self, thread: ProgramThread, address: int) -> None:
        """Log why the driver refused to load the enclave's page at ``address`` (SIGBUS).

        An enclave whose own state is the reason has no such text: nothing is logged.
        """
        device = thread.image.device_at(address)
        if device is not None and isinstance(device.file, EnclaveFile):
            self.report(thread, f"SIGBUS at {address:#x}", device.file.enclave.refusal)
