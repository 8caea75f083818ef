"""The counts of crossings are those of the program, whatever interrupts, ends or kills its threads.

Method: that of ``tests/soak/crossings.py``, which documents how to run more.
"""

from __future__ import annotations

from typing import Any

import pytest
from tests.e2e.native.enclave import COMPILER, NativeBuilds
from tests.soak import crossings
from tests.soak.lifetimes import usable_pagers
from tests.support import modes
from tests.support.native import HAS_PERMITS, needs_tracing

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"), needs_tracing]

#: A small EPC: threads also stop for pages.
SMALL = {"epc": 28 * 4096}
#: How many calls a program makes: fewer in modes where each stops, for itself or for its pages.
#: Each 4096 calls of a thread one has an exception.
MOST = 5000 if modes.has("strict", "recorded") else 10_000_000 if HAS_PERMITS else 40_000


@pytest.fixture(scope="module")
def files(builds: NativeBuilds) -> tuple[str, str]:
    """Return program and enclave."""
    return builds.host("counts"), builds.enclave(crossings.DATA_PAGES, crossings.TCS)


@pytest.mark.parametrize(
    ("threads", "rounds", "calls", "microseconds"),
    [
        (1, 1, 100_000, 2000),
        (4, 2, 10_000, 5000),
        pytest.param(1, 1, 10_000_000, 2000, marks=pytest.mark.slow),
        pytest.param(8, 4, 312_500, 20_000, marks=pytest.mark.slow),
    ],
)
def test_all_calls_are_counted_once_under_timers_and_signals(
    files: tuple[str, str], threads: int, rounds: int, calls: int, microseconds: int
) -> None:
    crossings.many(files, threads, rounds, min(calls, MOST // threads // rounds), microseconds)


@pytest.mark.parametrize("processes", [3, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("microseconds", [2000, 50_000])
def test_a_killed_process_counts_each_crossing_that_has_happened(
    files: tuple[str, str], processes: int, microseconds: int
) -> None:
    crossings.killed(files, processes, 2, 2000, microseconds)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("pager", usable_pagers())
def test_counts_do_not_depend_on_pager_or_strictness(
    files: tuple[str, str], pager: str, strict: bool
) -> None:
    options: dict[str, Any] = {"pager": pager, "strict": strict, **SMALL}
    calls = min(5000 if strict else 100_000, MOST // 8)
    crossings.many(files, 4, 2, calls, 20_000, **options)
    crossings.killed(files, 5, 2, 500, 5000, **options)
