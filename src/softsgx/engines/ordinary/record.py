"""Records an ordinary program as if it ran in an enclave: one call runs and records it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from softsgx.engines.native import abi, libc
from softsgx.engines.native.limits import Limits, raise_limits, set_limits
from softsgx.engines.native.tracing.bpf import build_calls_filter
from softsgx.engines.native.tracing.start import EndedEarly, start_program
from softsgx.engines.native.tracing.tracee import Gone
from softsgx.engines.native.tracing.unsupervised import is_32_bit
from softsgx.engines.native.tracing.waits import Waits
from softsgx.engines.ordinary.calls import CALLS, Calls
from softsgx.engines.ordinary.contents import Contents
from softsgx.engines.ordinary.epc import Epc, EpcStore
from softsgx.engines.ordinary.intervals import IntervalCounts, Intervals, TraceSink
from softsgx.engines.ordinary.loads import Loads
from softsgx.engines.ordinary.loop import Loop
from softsgx.engines.ordinary.pager import Pager, Unlimited
from softsgx.engines.ordinary.program import ProgramThread
from softsgx.engines.ordinary.progress import Progress
from softsgx.engines.ordinary.space import AddressSpace
from softsgx.engines.ordinary.spaces import Spaces
from softsgx.errors import SoftSgxError
from softsgx.host import Platform, PlatformConfig

__all__ = ["AsEnclaveResult", "RecordFailed", "TraceSink", "can_record", "record_as_enclave"]


def can_record() -> bool:
    """Return whether this process may open a userfaultfd that reports accesses by the kernel."""
    try:
        os.close(libc.syscall(abi.SYS_USERFAULTFD, os.O_CLOEXEC))
    except OSError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class AsEnclaveResult:
    """How a recorded run ended.

    Attributes:
        exit_code: the program's exit status, or -n when signal n ended it.
        interval_ns: length of an interval.
        counts: what was recorded, and what it took.
        address_spaces: how many address spaces execve and fork have made.
        wall_ns: how long the run took.
        epc_pages: pages of the EPC; 0: the run had none.
        loads: pages that were added to it, or loaded into it.
        evictions: pages that were evicted from it.
    """

    exit_code: int
    interval_ns: int
    counts: IntervalCounts
    address_spaces: int
    wall_ns: int
    epc_pages: int = 0
    loads: int = 0
    evictions: int = 0


class RecordFailed(AssertionError):
    """Bugs of the recorder have ended processes of the program; its other processes continued.

    Attributes:
        result: how the run ended.
        errors: the exceptions, the earliest first.
    """

    def __init__(self, result: AsEnclaveResult, errors: Sequence[Exception]) -> None:
        super().__init__("; ".join(map(repr, errors)))
        self.result, self.errors = result, list(errors)


def record_as_enclave(
    argv: Sequence[str],
    sink: TraceSink,
    *,
    interval_ns: int = 0,
    epc: int | str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    stdio: tuple[int, int, int] | None = None,
    started: Callable[[int, Progress], None] | None = None,
) -> AsEnclaveResult:
    """Run a program with all its children, and record the accesses of their private memory.

    Without an EPC the trace has intervals.  With one the memory is really paged, and the trace has
    each page that is added to the EPC or loaded into it.

    Args:
        argv: program, looked up in PATH, and its arguments.
        sink: receives the accesses.
        interval_ns: length of an interval, of the program's own time; without ``epc``.
        epc: bytes, or text as "16MiB", of an EPC that the memory is paged in.
        env: the program's environment; by default that of this process.
        cwd: the program's working directory; by default that of this process.
        stdio: descriptors to be its standard input, output and error.
        started: called before the program's first step, with its process id, and with what other
            threads may read while it runs.

    Raises:
        NotRun: the program cannot be started, or this machine lacks something the recorder needs.
        SoftSgxError: the program cannot be recorded.
        RecordFailed: the program has ended, and bugs of the recorder have ended processes of it.
    """
    limits, began_ns = raise_limits(), time.monotonic_ns()
    start = _Start(argv, limits, env, cwd, stdio, started)
    contents = Contents()
    try:
        if epc is None:
            intervals = Intervals(interval_ns, sink)
            progress = Progress(intervals, interval_ns)
            recorder = _Recorder(contents, Unlimited(contents), intervals, sink, progress)
            return recorder.result(recorder.run(start), interval_ns, began_ns)
        store = EpcStore(contents)
        with Platform(PlatformConfig.of(epc=epc), store=store) as platform:
            pager = Epc(platform, store, contents)
            loads = Loads(pager, sink)
            progress = Progress(loads, 0, platform, pager)
            recorder = _Recorder(contents, pager, loads, sink, progress)
            exit_code = recorder.run(start)
            if not recorder.errors:  # after an error counts may be wrong: the error is reported
                platform.check()
            counters = platform.core.counters
            return replace(
                recorder.result(exit_code, 0, began_ns),
                epc_pages=platform.core.epc_pages,
                loads=pager.loads,
                evictions=counters.reclaimed,
            )
    finally:
        set_limits(limits)


@dataclass(frozen=True, slots=True)
class _Start:
    argv: Sequence[str]
    limits: Limits
    env: Mapping[str, str] | None
    cwd: str | None
    stdio: tuple[int, int, int] | None
    started: Callable[[int, Progress], None] | None


class _Recorder:
    """One run.

    Attributes:
        errors: exceptions that are bugs of the recorder.
    """

    def __init__(
        self,
        contents: Contents,
        pager: Pager,
        intervals: Intervals,
        sink: TraceSink,
        progress: Progress,
    ) -> None:
        self._sink, self._intervals, self._progress = sink, intervals, progress
        self._waits = Waits(keeps_exits=True)
        self._number = 0
        self.errors: list[Exception] = []
        self._spaces = Spaces(
            self._waits, contents, pager, intervals, self._begun, intervals.remove
        )

    def run(self, start: _Start) -> int:
        """Run the program to its end; return its exit status, or -n for signal n."""
        with self._waits.signals_blocked():
            loop = Loop(self._waits, self._spaces, Calls(), self._intervals)
            try:
                return self._follow(loop, start)
            finally:
                loop.close()
                self.errors = loop.failures.errors
                self._intervals.end_interval()

    def result(self, exit_code: int, interval_ns: int, began_ns: int) -> AsEnclaveResult:
        """Return how the run ended.

        Raises:
            RecordFailed: bugs of the recorder have ended processes.
        """
        wall_ns = time.monotonic_ns() - began_ns
        counts = self._intervals.counts
        result = AsEnclaveResult(exit_code, interval_ns, counts, self._number, wall_ns)
        if self.errors:
            raise RecordFailed(result, self.errors) from self.errors[0]
        return result

    def _follow(self, loop: Loop, start: _Start) -> int:
        try:
            bare = start_program(
                start.argv,
                build_calls_filter(CALLS),
                self._waits,
                env=start.env,
                cwd=start.cwd,
                stdio=start.stdio,
                limits=start.limits,
            )
        except EndedEarly as ended:
            return -ended.number
        first = loop.threads[bare.tid] = ProgramThread(bare.tid, bare.tid, self._waits)
        try:
            if is_32_bit(first):
                raise SoftSgxError(
                    f"{start.argv[0]}: the memory of 32-bit programs cannot be recorded; "
                    "give a 64-bit program"
                )
            if start.started is not None:
                start.started(first.pid, self._progress)
            loop.adopt(first)
            loop.run()
        except Gone:
            loop.run()
        except BaseException:
            loop.kill()
            raise
        status = loop.statuses.get(first.pid)
        return -9 if status is None else os.waitstatus_to_exitcode(status)

    def _begun(self, space: AddressSpace, thread: ProgramThread) -> None:
        name = os.path.basename(os.readlink(f"/proc/{thread.tid}/exe"))
        self._intervals.add(space, self._sink.add_enclave(name, 0, thread.pid), thread.pid)
        self._number += 1
