"""Paging under plain LRU against an independent cache simulator, on a recorded memory trace.

Method: every access of the trace is made to a real enclave, whose pages leave and return with
crypto and all checks; libcachesim counts the misses of an LRU cache with as many objects.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from softsgx.accesses import Trace, read_trace
from softsgx.engines.replay import Replay
from softsgx.host import Platform

libcachesim = pytest.importorskip("libcachesim")

TRACE = read_trace(Path(__file__).parents[1] / "data" / "sort.trace")


def simulated_misses(trace: Trace, pages: int) -> int:
    cache = libcachesim.LRU(cache_size=pages)
    numbers, _ = trace.dense()
    requests = (libcachesim.Request(obj_id=page, obj_size=1) for page in numbers.tolist())
    return sum(not cache.get(request) for request in requests)


@pytest.mark.slow
@pytest.mark.parametrize("epc_pages", [28, 36, 48, 96])
def test_misses_equal_the_simulators_and_the_data_is_what_was_written(epc_pages: int) -> None:
    trace = TRACE[: 60_000 if epc_pages >= 48 else 20_000]
    with Platform(epc=epc_pages * 4096, policy="lru") as platform:
        replay = Replay(platform, TRACE.used_pages)
        result = replay.run(trace)
        assert result.misses == simulated_misses(trace, result.resident_pages)
        assert result.evictions == result.misses - result.resident_pages
        replay.verify()
        platform.check()
        replay.close()
        assert platform.core.free_pages == epc_pages
