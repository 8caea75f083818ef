"""Each thread makes progress: in an EPC that is too small, between signals, beside other threads.

Method: ``programs/progress.c``, in the smallest EPC that is accepted; a bound on the pages that are
loaded for one call.  ``programs/alarms.c``: more signals than can be served; it ends only if
enclave code is executed between them.  ``programs/turns.c``: threads that stop without pause.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
from tests.e2e.native.enclave import COMPILER, NativeBuilds
from tests.soak.lifetimes import usable_pagers
from tests.support.native import needs_tracing

from softsgx.engines.native import run
from softsgx.host import PlatformConfig
from softsgx.paging import needed_pages
from softsgx.report import Collector
from softsgx.report.summary import EnclaveSummary

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"), needs_tracing]

SMALLEST = needed_pages(PlatformConfig().machine()) * 4096
PAGES = 16
"""Of data, for each thread: as in the program."""


def crowd(
    builds: NativeBuilds, mode: str, threads: int, calls: int, *, timer: int = 0, **options: Any
) -> EnclaveSummary:
    """Run the program; return its enclave."""
    more = threads * calls if mode == "augment" else 0
    enclave = builds.enclave(PAGES * threads + more, threads)
    collector = Collector(time.monotonic_ns)
    words = [builds.host("progress"), enclave, mode, threads, calls, timer]
    devnull = open("/dev/null", "w")  # noqa: SIM115
    with devnull:
        result = run(
            [str(word) for word in words],
            stdio=(0, devnull.fileno(), 2),
            observer=collector,
            **{"epc": SMALLEST} | options,
        )
    assert result.exit_code == 0
    (summary,) = collector.enclaves()
    return summary


@pytest.mark.parametrize("pager", usable_pagers())
@pytest.mark.parametrize("threads", [8, pytest.param(16, marks=pytest.mark.slow)])
def test_instructions_of_many_threads_complete_in_the_smallest_epc(
    builds: NativeBuilds, threads: int, pager: str
) -> None:
    calls = 10
    enclave = crowd(builds, "border", threads, calls, pager=pager)
    # A call is EENTER, which needs TCS and SSA frame, and one instruction in a code page on two
    # data pages; a call stores, another one loads.
    assert enclave.eenter == 2 * threads * calls
    assert enclave.reloads <= 2 * 5 * threads * calls


@pytest.mark.slow
@pytest.mark.parametrize("pager", usable_pagers())
@pytest.mark.parametrize("strict", [False, True])
def test_pages_that_threads_make_are_accepted_in_the_smallest_epc(
    builds: NativeBuilds, pager: str, strict: bool
) -> None:
    enclave = crowd(builds, "augment", 8, 5, pager=pager, strict=strict)
    assert enclave.reloads <= 2 * 5 * 8 * 6


@pytest.mark.slow
@pytest.mark.parametrize("pager", usable_pagers())
def test_instructions_complete_between_signals_of_timers(builds: NativeBuilds, pager: str) -> None:
    crowd(builds, "border", 4, 10, timer=20_000, pager=pager)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("threads", "microseconds"), [(1, 200), (4, 300)])
def test_enclave_code_is_executed_between_signals_that_take_all_time(
    builds: NativeBuilds,
    capfd: pytest.CaptureFixture[str],
    threads: int,
    *,
    strict: bool,
    microseconds: int,
) -> None:
    calls = 12
    words = [
        builds.host("alarms"),
        builds.enclave(1, threads),
        threads,
        microseconds,
        calls,
        5_000_000,
    ]
    result = run([str(word) for word in words], strict=strict)
    assert result.exit_code == 0
    *alarms, queued = map(int, capfd.readouterr().out.split())
    assert len(alarms) == threads
    assert min(alarms) > 0
    assert queued > 0


def test_threads_that_stop_without_pause_are_all_served(
    builds: NativeBuilds, capfd: pytest.CaptureFixture[str]
) -> None:
    threads, calls = 8, 8000
    result = run([builds.host("turns"), str(threads), str(calls)])
    assert result.exit_code == 0
    made = [int(word) for word in capfd.readouterr().out.split()]
    assert sum(made) == calls
    assert min(made) > calls / threads / 10
