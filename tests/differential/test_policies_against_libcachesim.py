"""Curves and replays of ``softsgx.plan`` against an independent cache simulator, on real traces.

Method: libcachesim counts the misses of the same pages, each an object of one byte, in a cache of
as many bytes.  The traces were recorded by ``tools/record_traces.py``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from softsgx.accesses import read_trace
from softsgx.plan.curves import stack_distances
from softsgx.plan.policies import PolicyName, misses

libcachesim = pytest.importorskip("libcachesim")

DATA = Path(__file__).parents[1] / "data"
TRACES = ("gzip", "python3-json", "sort", "sqlite3")
CACHES = {"lru": libcachesim.LRU, "fifo": libcachesim.FIFO, "clock": libcachesim.Clock}


RECORD = np.dtype([("seconds", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next", "<i8")])


def simulated_misses(policy: str, path: Path, capacity: int) -> int:
    kind = libcachesim.TraceType.ORACLE_GENERAL_TRACE
    reader = libcachesim.TraceReader(str(path), kind)
    ratio, _ = CACHES[policy](cache_size=capacity).process_trace(reader)
    accesses = path.stat().st_size // RECORD.itemsize
    missed: int = round(ratio * accesses)
    return missed


@pytest.mark.slow
@pytest.mark.parametrize("policy", CACHES)
@pytest.mark.parametrize("name", TRACES)
def test_misses_equal_the_simulators_at_ten_sizes(
    name: str, policy: PolicyName, tmp_path: Path
) -> None:
    numbers, pages = read_trace(DATA / f"{name}.trace").dense()
    capacities = np.geomspace(8, pages, 10).astype(int).tolist()
    assert len(set(capacities)) == 10
    records = np.zeros(len(numbers), RECORD)
    records["object"], records["size"] = numbers + 1, 1
    records.tofile(path := tmp_path / "pages.oracleGeneral")
    expected = [simulated_misses(policy, path, size) for size in capacities]
    assert misses(policy, [numbers], capacities) == expected


@pytest.mark.parametrize("name", TRACES)
def test_a_recorded_trace_takes_less_than_a_byte_an_access(name: str) -> None:
    path = DATA / f"{name}.trace"
    assert path.stat().st_size < len(read_trace(path))


@pytest.mark.parametrize("name", TRACES)
def test_a_recorded_curve_ends_with_a_miss_for_each_page(name: str) -> None:
    numbers, pages = read_trace(DATA / f"{name}.trace").dense()
    curve = stack_distances([numbers]).misses()
    assert (len(curve), curve[0], curve[-1]) == (pages + 1, len(numbers), pages)
