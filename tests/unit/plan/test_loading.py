"""Traces are read in chunks as if all accesses were in memory, sorted by time.

Method: random traces in memory and in files whose batches end anywhere; the expected scene is
computed from whole arrays.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.support.accesses import trace_of

from softsgx.accesses import Chunk, Event, Trace, TraceWriter
from softsgx.errors import SoftSgxError
from softsgx.plan import spool
from softsgx.plan.curves import stack_distances
from softsgx.plan.loading import PlannedTrace, load
from softsgx.plan.merging import Timed, merged
from softsgx.plan.spool import Spool
from softsgx.plan.time_bins import TimeBins

Arrays = list[list[int]]

waits = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), max_size=5)
"""Nanoseconds between accesses, in chunks."""


@given(st.lists(waits, min_size=1, max_size=4))
def test_sources_are_merged_as_a_stable_sort_merges_them(sources: list[Arrays]) -> None:
    times = [np.cumsum([wait for chunk in source for wait in chunk]) for source in sources]
    numbers, first = [], 0
    for one in times:
        numbers.append(np.arange(first, first + len(one), dtype=np.uint32))
        first += len(one)
    order = np.argsort(np.concatenate(times), kind="stable")
    chunked = [
        _chunks(Timed(number, time.astype(np.uint64)), [len(chunk) for chunk in source])
        for number, time, source in zip(numbers, times, sources, strict=True)
    ]
    parts = list(merged(chunked))
    found = [number for part in parts for number in part.numbers.tolist()]
    assert found == np.concatenate(numbers)[order].tolist()
    assert [time for part in parts for time in part.times_ns.tolist()] == np.sort(
        np.concatenate(times)
    ).tolist()


def _chunks(whole: Timed, sizes: Sequence[int]) -> Iterator[Timed]:
    first = 0
    for size in sizes:
        yield whole[first : first + size]
        first += size


@given(st.lists(st.lists(st.integers(0, 40), max_size=8), max_size=40), st.booleans())
def test_bins_of_time_begin_where_a_search_of_all_times_finds_them(
    chunks: Arrays, timed: bool
) -> None:
    every = np.cumsum([wait for chunk in chunks for wait in chunk]).astype(np.uint64)
    span = int(every[-1]) if timed and len(every) else 0
    bins, first = TimeBins(span, len(every)), 0
    for chunk in chunks:
        bins.add(every[first : first + len(chunk)])
        first += len(chunk)
    count = max(1, min(120, len(every)))
    if span:
        limits = [span * at // count for at in range(1, count)]
        inner = np.searchsorted(every, np.array(limits, np.uint64)).tolist()
        assert bins.edges() == (0, *inner, len(every))
        assert bins.seconds == span / count / 1e9
    else:
        assert bins.edges() == tuple(len(every) * at // count for at in range(count + 1))
        assert bins.seconds == 0


@given(st.lists(st.lists(st.integers(0, 70_000), max_size=20), max_size=12))
def test_a_spool_gives_back_what_was_appended_both_ways(arrays: Arrays) -> None:
    kept = Spool()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "PART_NUMBERS", 16)
        for array in arrays:
            kept.append(np.array(array, np.uint32))
    expected = [number for array in arrays for number in array]
    assert len(kept) == len(expected)
    for _ in range(2):
        parts = [part.tolist() for part in kept]
        assert [number for part in parts for number in part] == expected
        assert all(len(part) == 16 for part in parts[:-1])
        assert [part.tolist() for part in reversed(kept)] == parts[::-1]


def test_a_long_spool_is_a_file_and_takes_the_bytes_that_its_numbers_need(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(spool, "MEMORY_BYTES", 1000)
    monkeypatch.setattr(spool, "PART_NUMBERS", 100)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept, sizes = Spool(), []
    for most in (255, 65535, 65536):
        kept.append(np.full(1000, most, np.uint32))
        sizes.append(kept._file.tell())
    assert sizes == [1000, 3000, 7000]
    assert kept._file._rolled  # type: ignore[attr-defined]
    assert [int(part[0]) for part in kept] == [255] * 10 + [65535] * 10 + [65536] * 10


def test_a_full_disk_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(spool, "PART_NUMBERS", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = Spool()

    def full(_data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kept._file, "write", full)
    with pytest.raises(SoftSgxError, match="No space left on device; set TMPDIR") as refused:
        kept.append(np.zeros(1, np.uint32))
    assert str(refused.value).startswith(str(tmp_path))


def _trace(seed: int, accesses: int, interval_ns: int = 0) -> Trace:
    """Return accesses to three enclaves."""
    chance = np.random.default_rng(seed)
    trace = trace_of([49, *chance.integers(0, 50, accesses - 1).tolist()], interval_ns=interval_ns)
    enclaves = tuple(replace(trace.info.enclaves[0], number=at, name=str(at)) for at in range(3))
    records = replace(
        trace.records,
        enclaves=chance.integers(0, 3, accesses).astype(np.uint16),
        times_ns=np.sort(chance.integers(5, 400, accesses)).astype(np.uint64),
    )
    return Trace(replace(trace.info, enclaves=enclaves), records)


def _file(path: Path, trace: Trace, batch: int) -> Path:
    info = trace.info
    with TraceWriter(path, precision=info.precision, interval_ns=info.interval_ns) as writer:
        for enclave in info.enclaves:
            writer.add_enclave(enclave.name, enclave.pages, enclave.pid)
        for first in range(0, len(trace), batch):
            writer.extend_chunk(trace.records[first : first + batch])
    return path


def _expected(traces: Sequence[Trace]) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
    """Return dense page numbers and times of all accesses, sorted by time."""
    keys, times = [], []
    for at, trace in enumerate(traces):
        keys.append(trace.accesses.keys | np.uint64(at << 48))
        times.append(trace.accesses.times_ns - trace.accesses.times_ns[0])
    order = np.argsort(np.concatenate(times), kind="stable")
    _used, numbers = np.unique(np.concatenate(keys), return_inverse=True)
    return numbers[order].astype(np.uint32), np.concatenate(times)[order]


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_a_scene_of_files_has_the_accesses_of_all_traces_in_order_of_time(
    batch: int, tmp_path: Path
) -> None:
    traces = [_trace(seed, 300 + seed) for seed in range(3)]
    files = [_file(tmp_path / f"{at}", trace, batch) for at, trace in enumerate(traces)]
    loaded = load([PlannedTrace(path, f"g{at}") for at, path in enumerate(files)])
    numbers, times = _expected(traces)
    scene = loaded.scene
    assert np.concatenate(list(scene.parts)).tolist() == numbers.tolist()
    assert scene.edges[0] == 0 and scene.edges[-1] == len(numbers)
    limits = [int(times[-1]) * at // 120 for at in range(1, 120)]
    assert scene.edges[1:-1] == tuple(np.searchsorted(times, np.array(limits, np.uint64)))
    assert [enclave.group for enclave in scene.enclaves] == [
        f"/g{at}" for at in range(3) for _ in "abc"
    ]
    assert [enclave.name for enclave in scene.enclaves] == [*"012"] * 3
    assert (loaded.distances.counts == stack_distances([numbers]).counts).all()
    assert [one.accesses for one in loaded.summaries] == [300, 301, 302]
    assert [one.footprint_pages for one in loaded.summaries] == [
        len(np.unique(trace.accesses.keys)) for trace in traces
    ]


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_a_working_set_is_what_the_largest_interval_accesses_again(
    batch: int, tmp_path: Path
) -> None:
    trace = _trace(5, 300, interval_ns=20)
    loaded = load([PlannedTrace(_file(tmp_path / "trace", trace, batch))])
    known, again = set[int](), dict[int, int]()
    first_ns = int(trace.records.times_ns[0])
    for key, time in zip(trace.records.keys.tolist(), trace.records.times_ns.tolist(), strict=True):
        interval = (time - first_ns) // 20
        again[interval] = again.get(interval, 0) + (key in known)
        known.add(key)
    assert loaded.working_set == max(again.values()) > 1


def test_times_that_decrease_are_refused() -> None:
    trace = trace_of([1, 2, 3])
    backwards = replace(trace.records, times_ns=np.array([9, 10, 1], np.uint64))
    with pytest.raises(SoftSgxError, match="times decrease; record the trace again"):
        load([PlannedTrace(Trace(trace.info, backwards))])


def test_a_trace_of_pages_that_go_alone_has_no_accesses() -> None:
    trace = trace_of([1])
    gone = Chunk(
        trace.records.enclaves,
        trace.records.pages,
        np.array([Event.REMOVED], np.uint8),
        trace.records.times_ns,
    )
    with pytest.raises(SoftSgxError, match="no accesses; record a program"):
        load([PlannedTrace(Trace(trace.info, gone))])
