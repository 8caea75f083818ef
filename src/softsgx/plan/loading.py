"""Traces to a scene: pages numbered densely, several traces interleaved by time.

A trace is read twice, in chunks, so that of each access only the dense number of its page stays in
memory, and with several traces its time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from softsgx.accesses import Chunk, Trace, TraceInfo, TraceReader, open_trace
from softsgx.errors import SoftSgxError
from softsgx.plan.numbering import PageNumbers
from softsgx.plan.result import TraceSummary
from softsgx.plan.scene import Scene, SceneEnclave

__all__ = ["PlannedTrace", "load_scene"]

_ENCLAVE_SHIFT = 32


@dataclass(frozen=True, slots=True)
class PlannedTrace:
    """A trace to plan with.

    Attributes:
        source: a file, or a trace in memory.
        group: the group that its enclaves are charged to, as ``jobs/a``; ``/`` is the root.
        file_format: of a file; ``None``: detected from its name and its first bytes.
    """

    source: str | Path | Trace
    group: str = "/"
    file_format: str | None = None

    @property
    def name(self) -> str:
        """The file's name."""
        return "(memory)" if isinstance(self.source, Trace) else str(self.source)

    def open(self) -> Trace | TraceReader:
        """Open it; the result has ``info``, and can be iterated more than once."""
        if isinstance(self.source, Trace):
            return self.source
        return open_trace(self.source, self.file_format)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """One trace.

    Attributes:
        info: at the end of the file.
        keys: ``enclave << 32 | page`` of each page that is accessed, ascending.
        numbers: of each access, index of its page in ``keys``.
        times_ns: of each access, from 0.
    """

    info: TraceInfo
    keys: np.ndarray[Any, Any]
    numbers: np.ndarray[Any, Any]
    times_ns: np.ndarray[Any, Any]


def load_scene(traces: Sequence[PlannedTrace]) -> tuple[Scene, tuple[TraceSummary, ...], int]:
    """Read traces.

    Returns:
        The scene; a summary of each trace; and how many pages the largest intervals of all traces
        access again, 0 unless one of them is an ``intervals`` trace.

    Raises:
        SoftSgxError: a file cannot be read, or a trace has no accesses.
    """
    loaded = [_load(trace) for trace in traces]
    enclaves: list[SceneEnclave] = []
    numbers, times = [], []
    for at, (trace, one) in enumerate(zip(traces, loaded, strict=True)):
        first = enclaves[-1].first + enclaves[-1].pages if enclaves else 0
        enclaves += _enclaves(at, trace, one, first)
        numbers.append(one.numbers + np.uint32(first) if first else one.numbers)
        times.append(one.times_ns)
    summaries = tuple(map(_summary, traces, loaded))
    working_set = sum(_largest_interval(one) for one in loaded)
    timed = all(one.info.timed for one in loaded)
    if len(loaded) == 1:
        return Scene(tuple(enclaves), numbers[0], times[0], timed), summaries, working_set
    every_time = np.concatenate(times)
    order = np.argsort(every_time, kind="stable")
    scene = Scene(tuple(enclaves), np.concatenate(numbers)[order], every_time[order], timed)
    return scene, summaries, working_set


def _load(trace: PlannedTrace) -> _Loaded:
    opened = trace.open()
    parts: Iterable[Chunk] = [opened.records] if isinstance(opened, Trace) else opened
    records = len(opened)
    if not records:
        raise SoftSgxError(f"{trace.name}: no accesses; record a program that uses an enclave")
    pages = PageNumbers()
    numbers, times_ns = np.empty(records, np.uint32), np.empty(records, np.uint64)
    at = 0
    for chunk in (part.accesses for part in parts):
        part = slice(at, at + len(chunk))
        numbers[part] = pages.of(chunk.keys)
        times_ns[part] = chunk.times_ns
        at += len(chunk)
    numbers, times_ns = numbers[:at], times_ns[:at]
    times_ns -= times_ns[0]
    keys = pages.keys()
    order = np.argsort(keys)
    place = np.empty(len(keys), np.uint32)
    place[order] = np.arange(len(keys), dtype=np.uint32)
    return _Loaded(opened.info, keys[order], place[numbers], times_ns)


def _enclaves(at: int, trace: PlannedTrace, loaded: _Loaded, first: int) -> list[SceneEnclave]:
    names = {enclave.number: enclave.name for enclave in loaded.info.enclaves}
    numbers, counts = np.unique(loaded.keys >> np.uint64(_ENCLAVE_SHIFT), return_counts=True)
    enclaves = []
    for number, pages in zip(numbers.tolist(), counts.tolist(), strict=True):
        name = names.get(number) or f"enclave {number}"
        enclaves.append(SceneEnclave(at, name, first, pages, "/" + trace.group.strip("/")))
        first += pages
    return enclaves


def _summary(trace: PlannedTrace, loaded: _Loaded) -> TraceSummary:
    info = loaded.info
    return TraceSummary(
        name=trace.name,
        program=info.program,
        precision=info.precision,
        complete=info.complete,
        enclaves=len(np.unique(loaded.keys >> np.uint64(_ENCLAVE_SHIFT))),
        accesses=len(loaded.numbers),
        footprint_pages=len(loaded.keys),
        seconds=float(loaded.times_ns[-1]) / 1e9 if info.timed else 0.0,
        group="/" + trace.group.strip("/"),
        interval_seconds=info.interval_ns / 1e9 if info.precision == "intervals" else 0.0,
        recorded_epc_pages=info.epc_pages,
        user_seconds=info.user_ns / 1e9,
    )


def _largest_interval(loaded: _Loaded) -> int:
    """Return how many pages the largest interval accesses that were accessed before.

    A first access makes its page, mostly by ADD_PAGES; the page may be evicted at once.
    """
    info = loaded.info
    if info.precision != "intervals" or not info.interval_ns:
        return 0
    again = np.ones(len(loaded.numbers), np.bool_)
    again[np.unique(loaded.numbers, return_index=True)[1]] = False
    times_ns = loaded.times_ns[again]
    if not len(times_ns):
        return 0
    _intervals, counts = np.unique(times_ns // np.uint64(info.interval_ns), return_counts=True)
    return min(int(counts.max()), len(loaded.keys))
