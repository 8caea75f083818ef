"""Recording an ordinary program as if it were enclosed, from one call."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from softsgx.engines.native import abi, libc
from softsgx.engines.native.limits import Limits, raise_limits, set_limits
from softsgx.engines.native.tracing.bpf import build_calls_filter
from softsgx.engines.native.tracing.start import EndedEarly, start_program
from softsgx.engines.native.tracing.tracee import Gone
from softsgx.engines.native.tracing.waits import Waits
from softsgx.engines.ordinary.calls import CALLS, Calls
from softsgx.engines.ordinary.contents import Contents
from softsgx.engines.ordinary.intervals import IntervalCounts, Intervals, TraceSink
from softsgx.engines.ordinary.loop import Loop
from softsgx.engines.ordinary.program import ProgramThread
from softsgx.engines.ordinary.space import AddressSpace
from softsgx.engines.ordinary.spaces import Spaces

__all__ = ["AsEnclaveResult", "RecordFailed", "TraceSink", "can_record", "record_as_enclave"]


def can_record() -> bool:
    """Return whether this process may have a userfaultfd for accesses of system calls."""
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
        address_spaces: how many programs were executed, and copied by fork.
        wall_ns: how long the run took.
    """

    exit_code: int
    interval_ns: int
    counts: IntervalCounts
    address_spaces: int
    wall_ns: int


class RecordFailed(AssertionError):
    """Mistakes of ours have ended processes; the other processes continued.

    Attributes:
        result: how the run ended.
        errors: the mistakes, the earliest first.
    """

    def __init__(self, result: AsEnclaveResult, errors: Sequence[Exception]) -> None:
        super().__init__("; ".join(map(repr, errors)))
        self.result, self.errors = result, list(errors)


def record_as_enclave(
    argv: Sequence[str],
    sink: TraceSink,
    *,
    interval_ns: int,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    stdio: tuple[int, int, int] | None = None,
    started: Callable[[int], None] | None = None,
) -> AsEnclaveResult:
    """Run a program with all its children, and record the accesses of their private memory.

    Args:
        argv: program, looked up in PATH, and its arguments.
        sink: receives the accesses.
        interval_ns: length of an interval, of the program's own time.
        env: the program's environment; by default that of this process.
        cwd: the program's working directory; by default that of this process.
        stdio: descriptors to be its standard input, output and error.
        started: called with the program's process id before its first step.

    Raises:
        NotRun: the program cannot be started, or this machine lacks something the recorder needs.
        SoftSgxError: the program cannot be recorded.
        RecordFailed: the program has ended, and we have made mistakes.
    """
    limits, began_ns = raise_limits(), time.monotonic_ns()
    try:
        recorder = _Recorder(sink, interval_ns, started)
        return recorder.run(argv, limits, began_ns, env, cwd, stdio)
    finally:
        set_limits(limits)


class _Recorder:
    def __init__(
        self, sink: TraceSink, interval_ns: int, started: Callable[[int], None] | None
    ) -> None:
        self._started, self._interval_ns = started, interval_ns
        self._sink, self._waits = sink, Waits(keeps_exits=True)
        self._intervals = Intervals(interval_ns, sink)
        self._number = 0
        self._spaces = Spaces(
            self._waits, Contents(), self._intervals, self._begun, self._intervals.remove
        )

    def run(
        self,
        argv: Sequence[str],
        limits: Limits,
        began_ns: int,
        env: Mapping[str, str] | None,
        cwd: str | None,
        stdio: tuple[int, int, int] | None,
    ) -> AsEnclaveResult:
        with self._waits.signals_blocked():
            loop = Loop(self._waits, self._spaces, Calls(), self._intervals)
            try:
                exit_code = self._follow(loop, argv, limits, env, cwd, stdio)
            finally:
                loop.close()
        self._intervals.end_interval()
        wall_ns = time.monotonic_ns() - began_ns
        result = AsEnclaveResult(
            exit_code, self._interval_ns, self._intervals.counts, self._number, wall_ns
        )
        errors = loop.failures.errors
        if errors:
            raise RecordFailed(result, errors) from errors[0]
        return result

    def _follow(
        self,
        loop: Loop,
        argv: Sequence[str],
        limits: Limits,
        env: Mapping[str, str] | None,
        cwd: str | None,
        stdio: tuple[int, int, int] | None,
    ) -> int:
        try:
            bare = start_program(
                argv,
                build_calls_filter(CALLS),
                self._waits,
                env=env,
                cwd=cwd,
                stdio=stdio,
                limits=limits,
            )
        except EndedEarly as ended:
            return -ended.number
        first = ProgramThread(bare.tid, bare.tid, self._waits)
        try:
            if self._started is not None:
                self._started(first.pid)
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
        self._intervals.add(space, self._sink.add_enclave(name, 0, thread.pid))
        self._number += 1
