"""Traces to a scene: pages numbered densely, several traces interleaved by time.

A trace is read once, in chunks.  Of each access the number of its page goes to a
:class:`~softsgx.plan.spool.Spool`, which replays read, and to the LRU curve; the rest is counted.
So memory is proportional to the pages of all traces, not to their length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from softsgx.accesses import Chunk, Event, Trace, TraceReader, open_trace
from softsgx.errors import SoftSgxError
from softsgx.plan.curves import Distances, StackDistances
from softsgx.plan.living import Living
from softsgx.plan.merging import Timed, merged
from softsgx.plan.numbering import PageNumbers
from softsgx.plan.result import TraceSummary
from softsgx.plan.scene import ENDS, GOES, MOST_PAGES, Scene, SceneEnclave
from softsgx.plan.spool import PART_NUMBERS, Spool
from softsgx.plan.time_bins import TimeBins

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Loaded", "PlannedTrace", "load"]

_TRACE_SHIFT, _ENCLAVE_SHIFT = 48, 32
_MOST_TRACES = 1 << 16
Item = TypeVar("Item")


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

    @property
    def group_path(self) -> str:
        """The group from the root, as ``/jobs/a``."""
        return "/" + self.group.strip("/")

    def open(self) -> Trace | TraceReader:
        """Open it; the result has ``info`` and ``span_ns``."""
        if isinstance(self.source, Trace):
            return self.source
        return open_trace(self.source, self.file_format)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Traces that were read.

    Attributes:
        scene: for replays.
        summaries: of each trace.
        working_set: how many pages the largest intervals of all traces access again; 0 unless one
            of them is an ``intervals`` trace.
        distances: of LRU, over all traces together.
    """

    scene: Scene
    summaries: tuple[TraceSummary, ...]
    working_set: int
    distances: Distances


@dataclass(slots=True)
class _Source:
    """A trace that is being read.

    Attributes:
        keys: ``trace << 48``, which separates its pages from those of other traces.
        span_ns: times of its first and its last record.
        accesses: read so far.
        last_ns: time of the last of them, from 0.
        pages: how many pages it has accessed.
        interval: the interval of the last access.
        again: accesses in that interval to pages that were accessed before.
        most_again: the largest such number.
    """

    trace: PlannedTrace
    opened: Trace | TraceReader
    keys: np.uint64
    span_ns: tuple[int, int]
    accesses: int = 0
    last_ns: int = 0
    pages: int = 0
    interval: int = -1
    again: int = 0
    most_again: int = 0

    @classmethod
    def of(cls, at: int, trace: PlannedTrace) -> _Source:
        opened = trace.open()
        return cls(trace, opened, np.uint64(at << _TRACE_SHIFT), opened.span_ns())

    def chunks(self, numbers: PageNumbers, living: Living) -> Iterator[Timed]:
        """Yield its accesses and the pages that leave it: numbers of pages, and times from 0."""
        first_ns = np.uint64(self.span_ns[0])
        for chunk in _chunks(self.opened):
            if not len(chunk):
                continue
            accesses, known = chunk.accesses, numbers.pages
            keys = accesses.keys | self.keys
            found = numbers.of(keys)
            if numbers.pages > MOST_PAGES:
                raise SoftSgxError(
                    f"{self.trace.name}: more than {MOST_PAGES} pages are used; give fewer traces"
                )
            times = chunk.times_ns - first_ns
            first, last = int(times[0]), int(times[-1])
            # Times of a chunk, and what they are counted from, have wrapped around at most once.
            if not self.last_ns <= first <= last or chunk.times_ns[-1] < first_ns:
                raise SoftSgxError(f"{self.trace.name}: times decrease; record the trace again")
            self.accesses += len(found)
            self.pages += numbers.pages - known
            self.last_ns = last
            if self._has_intervals and len(found):
                self._count_again(found, times[chunk.events <= Event.WRITE], known)
            owners = (keys >> np.uint64(_ENCLAVE_SHIFT)).astype(np.uint32)
            if len(found) == len(chunk):
                living.access(found, owners, numbers.pages)
                yield Timed(found, times)
            else:
                yield from self._mixed(chunk, times, found, numbers, living, owners)

    def _mixed(
        self,
        chunk: Chunk,
        times: NDArray[np.uint64],
        found: NDArray[np.uint32],
        numbers: PageNumbers,
        living: Living,
        owners: NDArray[np.uint32],
    ) -> Iterator[Timed]:
        """Yield the records of a chunk in which pages go, or enclaves end.

        Args:
            chunk: accesses and others.
            times: of all records.
            found: numbers of the pages that are accessed.
            numbers: has them.
            living: pages that are there before.
            owners: of the pages that are accessed.
        """
        living.own(found, owners, numbers.pages)
        every = np.zeros(len(chunk), np.uint32)
        every[chunk.events <= Event.WRITE] = found
        keys = chunk.keys | self.keys
        removed = np.flatnonzero(chunk.events == Event.REMOVED)
        known = numbers.known(keys[removed])
        every[removed[known]] = numbers.of(keys[removed[known]]) | np.uint32(GOES)
        ended = np.flatnonzero(chunk.events == Event.ENDED)
        keep = np.ones(len(chunk), np.bool)
        keep[removed[~known]] = False
        for first, end in pairwise(sorted({0, *(ended + 1).tolist(), len(chunk)})):
            last = end - (end - 1 in ended)
            part = slice(first, last)
            kept = keep[part].copy()
            kept[kept] = living.removals(every[part][kept])
            if kept.any():
                yield Timed(every[part][kept], times[part][kept])
            if last < end:
                gone = living.end(int(keys[last] >> np.uint64(_ENCLAVE_SHIFT)))
                if len(gone):
                    yield Timed(gone, np.full(len(gone), times[last], np.uint64))

    @property
    def _has_intervals(self) -> bool:
        return self.opened.info.precision == "intervals" and self.opened.info.interval_ns > 0

    def _count_again(
        self, numbers: NDArray[np.uint32], times: NDArray[np.uint64], known: int
    ) -> None:
        """Count accesses again in each interval; pages from ``known`` on are new in ``numbers``.

        A first access makes its page, mostly by ADD_PAGES; the page may be evicted at once.
        """
        highest = np.maximum.accumulate(np.maximum(numbers.astype(np.int64), known - 1))
        before = np.concatenate((np.array([known - 1]), highest[:-1]))
        again = times[numbers <= before]
        intervals, counts = np.unique(
            again // np.uint64(self.opened.info.interval_ns), return_counts=True
        )
        for interval, count in zip(intervals.tolist(), counts.tolist(), strict=True):
            self.again = count if interval != self.interval else self.again + count
            self.interval = interval
            self.most_again = max(self.most_again, self.again)

    def working_set(self) -> int:
        """Return how many pages its largest interval accesses that were accessed before."""
        return min(self.most_again, self.pages)

    def summary(self, enclaves: int) -> TraceSummary:
        info = self.opened.info
        return TraceSummary(
            name=self.trace.name,
            program=info.program,
            precision=info.precision,
            complete=info.complete,
            enclaves=enclaves,
            accesses=self.accesses,
            footprint_pages=self.pages,
            seconds=self.last_ns / 1e9 if info.timed else 0.0,
            group=self.trace.group_path,
            interval_seconds=info.interval_ns / 1e9 if info.precision == "intervals" else 0.0,
            recorded_epc_pages=info.epc_pages,
            user_seconds=info.user_ns / 1e9,
        )


@dataclass(slots=True)
class _Renumbered:
    """Numbers in order of first use, read as dense numbers in order of their keys."""

    spool: Spool
    places: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))

    def __iter__(self) -> Iterator[NDArray[np.uint32]]:
        return map(self._dense, self.spool)

    def __reversed__(self) -> Iterator[NDArray[np.uint32]]:
        return map(self._dense, reversed(self.spool))

    def _dense(self, part: NDArray[np.uint32]) -> NDArray[np.uint32]:
        if len(part) and part.max() >= GOES:
            flags = np.uint32(GOES | ENDS)
            dense: NDArray[np.uint32] = self.places[part & ~flags] | (part & flags)
            return dense
        return np.asarray(self.places[part])


def load(
    traces: Sequence[PlannedTrace], progress: Callable[[int, int], None] = lambda _done, _of: None
) -> Loaded:
    """Read traces.

    Args:
        traces: all begin at the same time.
        progress: called with the accesses that were read, and how many there are.

    Raises:
        SoftSgxError: a file cannot be read, a trace has no accesses, or the temporary directory has
            no room.
    """
    if len(traces) > _MOST_TRACES:
        raise SoftSgxError(f"plan: {len(traces)} traces; give at most {_MOST_TRACES}")
    sources = [_Source.of(at, trace) for at, trace in enumerate(traces)]
    records = sum(len(source.opened) for source in sources)
    numbers, spool, distances = PageNumbers(), Spool(), StackDistances()
    bins, living, goes = TimeBins(_span_ns(sources), records), Living(), False
    for part in _ahead(merged([source.chunks(numbers, living) for source in sources])):
        goes = goes or bool(part.numbers.max() >= GOES)
        distances.add(part.numbers)
        spool.append(part.numbers)
        bins.add(part.times_ns)
        progress(len(spool), records)
    for source in sources:
        if not source.accesses:
            name = source.trace.name
            raise SoftSgxError(f"{name}: no accesses; record a program that uses an enclave")
    keys = numbers.keys()
    order = np.argsort(keys)
    places = np.empty(len(keys), np.uint32)
    places[order] = np.arange(len(keys), dtype=np.uint32)
    enclaves = _enclaves(sources, keys[order])
    scene = Scene(enclaves, _Renumbered(spool, places), bins.edges(), bins.seconds, goes)
    owners = [enclave.trace for enclave in enclaves]
    return Loaded(
        scene,
        tuple(source.summary(owners.count(at)) for at, source in enumerate(sources)),
        sum(source.working_set() for source in sources),
        distances.result(),
    )


def _span_ns(sources: Sequence[_Source]) -> int:
    """Return the time from the first record to the last of all traces; 0 without times."""
    if not all(source.opened.info.timed for source in sources):
        return 0
    return max(last - first for first, last in (source.span_ns for source in sources))


def _chunks(opened: Trace | TraceReader) -> Iterator[Chunk]:
    if isinstance(opened, TraceReader):
        return iter(opened)
    records = opened.records
    return (records[at : at + PART_NUMBERS] for at in range(0, len(records), PART_NUMBERS))


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield items; a thread makes the next one meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _enclaves(sources: Sequence[_Source], keys: NDArray[np.uint64]) -> tuple[SceneEnclave, ...]:
    """Return the enclaves that have pages; ``keys`` are ascending."""
    numbers, firsts, counts = np.unique(
        keys >> np.uint64(_ENCLAVE_SHIFT), return_index=True, return_counts=True
    )
    enclaves = []
    for number, first, pages in zip(
        numbers.tolist(), firsts.tolist(), counts.tolist(), strict=True
    ):
        at, enclave = number >> 16, number & 0xFFFF
        source = sources[at]
        names = {one.number: one.name for one in source.opened.info.enclaves}
        name = names.get(enclave) or f"enclave {enclave}"
        enclaves.append(SceneEnclave(at, name, first, pages, source.trace.group_path))
    return tuple(enclaves)
