"""The trace file of a recording: opened when the program starts, abandoned when a write fails.

pyarrow starts threads when it is imported, so it is imported after the program's fork.
"""

from __future__ import annotations

import os
import resource
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from softsgx.arch import PAGE_BYTES
from softsgx.cli._common import tell
from softsgx.errors import SoftSgxError

if TYPE_CHECKING:
    from softsgx.accesses import Precision, TraceWriter

__all__ = ["TraceFile", "check_libraries", "describe_overhead", "shell_status"]

_LIBRARIES = ("numpy", "pyarrow")
_RESOLUTION_NS = 1000  # of times in the file, far below any interval


def check_libraries() -> None:
    """Check that the packages that write the trace are installed.

    Raises:
        SoftSgxError: one is missing.
    """
    for name in _LIBRARIES:
        if find_spec(name) is None:
            raise SoftSgxError(f"record: package {name} is missing; pip install 'softsgx[plan]'")


class TraceFile:
    """See the module; a context manager around the run.

    After a failed write, which is reported, further accesses are dropped and the program continues.

    Args:
        path: of the file, which may be replaced.
        precision: of the trace.
        program: the command line.
        interval_ns: length of an interval; 0: the trace has no intervals.

    Attributes:
        path: see the argument.
        precision: see the argument.
        is_whole: whether the file may be marked as complete.
        is_complete: whether it was closed and marked.
    """

    def __init__(self, path: str, precision: Precision, program: str, interval_ns: int) -> None:
        self.path, self.precision = path, precision
        self.is_whole, self.is_complete = True, False
        self._program, self._interval_ns = program, interval_ns
        self._writer: TraceWriter | None = None
        self._user_ns = 0  # of earlier programs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        whole = self.is_whole and kind is None
        try:
            if whole:
                writer.end_program(_user_ns() - self._user_ns)
            writer.close(complete=whole)
            self.is_complete = whole
        except SoftSgxError as failure:
            _report_incomplete(failure)

    def open(self, epc_pages: int) -> None:
        """Open the file, just before the program's first instruction.

        Args:
            epc_pages: size of its EPC.

        Raises:
            SoftSgxError: the file cannot be written.
        """
        from softsgx.accesses import TraceWriter

        self._user_ns = _user_ns()
        self._writer = TraceWriter(
            self.path,
            precision=self.precision,
            program=self._program,
            interval_ns=self._interval_ns,
            epc_pages=epc_pages,
            resolution_ns=_RESOLUTION_NS,
        )

    def add_enclave(self, name: str, pages: int, pid: int) -> int:
        """As :meth:`TraceWriter.add_enclave`."""
        if self._writer is not None:
            try:
                return self._writer.add_enclave(name, pages, pid)
            except SoftSgxError as failure:
                self._give_up(failure)
        return 0

    def grow_enclave(self, number: int, pages: int) -> None:
        """As :meth:`TraceWriter.grow_enclave`."""
        if self._writer is not None:
            try:
                self._writer.grow_enclave(number, pages)
            except SoftSgxError as failure:
                self._give_up(failure)

    def append(self, enclave: int, page: int, write: bool, time_ns: int) -> None:
        """As :meth:`TraceWriter.append`."""
        if self._writer is not None:
            try:
                self._writer.append(enclave, page, write, time_ns)
            except SoftSgxError as failure:
                self._give_up(failure)

    def remove_page(self, enclave: int, page: int, time_ns: int) -> None:
        """As :meth:`TraceWriter.remove_page`."""
        if self._writer is not None:
            try:
                self._writer.remove_page(enclave, page, time_ns)
            except SoftSgxError as failure:
                self._give_up(failure)

    def end_enclave(self, enclave: int, time_ns: int) -> None:
        """As :meth:`TraceWriter.end_enclave`."""
        if self._writer is not None:
            try:
                self._writer.end_enclave(enclave, time_ns)
            except SoftSgxError as failure:
                self._give_up(failure)

    def add_late_interval(self) -> None:
        """As :meth:`TraceWriter.add_late_interval`."""
        if self._writer is not None:
            self._writer.add_late_interval()

    def flush(self) -> None:
        """As :meth:`TraceWriter.flush`."""
        if self._writer is not None:
            try:
                self._writer.flush()
            except SoftSgxError as failure:
                self._give_up(failure)

    def describe(
        self, *, epc_pages: int, enclaves: int, accesses: int, writes: int
    ) -> dict[str, Any]:
        """Return the summary's part about the trace."""
        size = self.size_bytes()
        return {
            "file": self.path,
            "complete": self.is_complete,
            "precision": self.precision,
            "interval_seconds": self._interval_ns / 1e9,
            "epc_bytes": epc_pages * PAGE_BYTES,
            "enclaves": enclaves,
            "accesses": accesses,
            "writes": writes,
            "bytes": size,
            "bytes_per_access": round(size / accesses, 3) if accesses else None,
        }

    def size_bytes(self) -> int:
        """Return the size of the file; 0: it does not exist."""
        try:
            return os.stat(self.path).st_size
        except OSError:
            return 0

    def _give_up(self, failure: SoftSgxError) -> None:
        self._writer = None
        _report_incomplete(failure)


def describe_overhead(
    *,
    wall_ns: int,
    hiding_ns: int,
    serving_ns: int,
    faults: int,
    intervals: int,
    late_intervals: int,
    longest_interval_ns: int,
) -> dict[str, Any]:
    """Return the summary's part about the cost of the recording."""
    return {
        "wall_seconds": round(wall_ns / 1e9, 6),
        "hiding_seconds": round(hiding_ns / 1e9, 6),
        "serving_seconds": round(serving_ns / 1e9, 6),
        "share_of_wall": round((hiding_ns + serving_ns) / wall_ns, 6) if wall_ns else 0.0,
        "faults": faults,
        "intervals": intervals,
        "late_intervals": late_intervals,
        "longest_interval_seconds": round(longest_interval_ns / 1e9, 6),
    }


def shell_status(exit_code: int) -> int:
    """Return the exit status that a shell reports."""
    return exit_code if exit_code >= 0 else 128 - exit_code


def _report_incomplete(failure: SoftSgxError) -> None:
    tell(f"softsgx: {failure}; it is not complete")


def _user_ns() -> int:
    """Return the processor time in user mode of all descendants that have ended, nanoseconds."""
    return int(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime * 1e9)
