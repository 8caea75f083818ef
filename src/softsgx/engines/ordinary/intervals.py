"""Accesses by interval: each page's first access in an interval, in order, and whether it stores.

An interval is a length of the program's own time: the time in which the recorder answers faults
does not count.  At its end the recorder hides every page.  While a system call changes the mappings
of an address space, its pages are not hidden; they are as soon as the call has ended.

An address space is an enclave of the trace.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from softsgx.engines.ordinary.numbers import PageNumbers
from softsgx.engines.ordinary.space import AddressSpace

__all__ = ["IntervalCounts", "Intervals", "TraceSink"]

_SHIFT, _PAGE_MASK = 12, 4095
_RETRY_S = 0.001
_FLUSH_NS = 1_000_000_000


class TraceSink(Protocol):
    """Receives accesses; :class:`softsgx.accesses.TraceWriter` is one."""

    def add_enclave(self, name: str, pages: int, pid: int) -> int:
        """Add an address space; return its number."""

    def grow_enclave(self, number: int, pages: int) -> None:
        """An address space has pages of numbers below ``pages``."""

    def append(self, enclave: int, page: int, write: bool, time_ns: int) -> None:
        """Add an access, which is not earlier than those before."""

    def remove_page(self, enclave: int, page: int, time_ns: int) -> None:
        """Add that a page has left its address space."""

    def end_enclave(self, enclave: int, time_ns: int) -> None:
        """Add that an address space has ended."""

    def flush(self) -> None:
        """Write the accesses added so far, so that they survive a killed recorder."""


@dataclass(slots=True)
class IntervalCounts:
    """What was recorded, and what it took.

    Attributes:
        intervals: intervals that had accesses.
        faults: page faults that were answered.
        accesses: first accesses of pages in intervals.
        shown: faults of pages that were not present, with a finite EPC; else 0.
        writes: those ``accesses`` to which the program stores in the interval.
        stores: faults of stores to pages that had been read before in the interval.
        pages: different pages that were accessed, of all address spaces together.
        most_pages: pages that were accessed in the interval that accessed most.
        long: intervals that took more than twice their length, since the recorder waited for a
            processor.
        longest_ns: length of the longest interval.
        late: address spaces that a system call kept from being hidden at the end of an interval.
        hiding_ns: time for hiding pages.
        serving_ns: time for answering faults and stops.
    """

    intervals: int = 0
    faults: int = 0
    accesses: int = 0
    shown: int = 0
    writes: int = 0
    stores: int = 0
    pages: int = 0
    most_pages: int = 0
    long: int = 0
    longest_ns: int = 0
    late: int = 0
    hiding_ns: int = 0
    serving_ns: int = 0


class _Traced:
    """What the trace knows of one address space.

    Attributes:
        number: its number in the trace.
        pid: the process that has made it.
        faults: page faults that the recorder has answered.
        numbers: of its pages.
        pages: size of its range, which grows.
        known: numbers of the pages that were accessed.
        mapped: the pages that were accessed, and are still mapped.
        places: of the pages that were accessed in this interval, in the list of its records.
    """

    __slots__ = ("faults", "known", "mapped", "number", "numbers", "pages", "pid", "places")

    def __init__(self, number: int, pid: int, numbers: PageNumbers) -> None:
        self.number, self.pid, self.numbers = number, pid, numbers
        self.pages = self.faults = 0
        self.known: set[int] = set()
        self.mapped: set[int] = set()
        self.places: dict[int, int] = {}


_Record = tuple[_Traced, int | None, bool | None, int]
"""An address space, a page of it or all, whether it is written or gone (``None``), and when."""


class Intervals:
    """See the module.

    Args:
        interval_ns: length of an interval.
        sink: receives the accesses.
        clock: returns nanoseconds.
    """

    def __init__(
        self,
        interval_ns: int,
        sink: TraceSink,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        assert interval_ns > 0, "an interval has a length"
        self._interval_ns, self._sink, self._clock = interval_ns, sink, clock
        self.counts = IntervalCounts()
        self._traced: dict[AddressSpace, _Traced] = {}
        self._records: list[_Record] = []  # in order; the first is an access
        self._started_ns = clock()
        self._due_ns, self._flushed_ns = 0, self._started_ns
        self._latest_ns = 0
        self._late: set[AddressSpace] = set()

    def add(self, space: AddressSpace, number: int, pid: int) -> None:
        """Add a new address space of process ``pid``, which is enclave ``number`` of the trace."""
        self._traced[space] = _Traced(number, pid, space.numbers)

    def spaces(self) -> list[tuple[AddressSpace, _Traced]]:
        """Return the address spaces, also to another thread."""
        return list(self._traced.items())

    def remove(self, space: AddressSpace) -> None:
        """An address space has ended."""
        self._late.discard(space)
        self._gone(self._traced.pop(space), None)

    # --- accesses -------------------------------------------------------------------------------

    def accessed(self, space: AddressSpace, page: int, write: bool) -> None:
        """A hidden page was accessed; ``page`` is its address divided by 4096."""
        traced = self._traced[space]
        traced.faults += 1
        self.counts.faults += 1
        now_ns = self._clock()
        if not self._records and not self._due_ns:
            self._due_ns = now_ns + self._interval_ns
        traced.places[page] = len(self._records)
        traced.mapped.add(page)
        self._records.append((traced, page, write, self._program_ns(now_ns)))

    def written(self, space: AddressSpace, page: int) -> None:
        """A page that was read has been written."""
        self.counts.stores += 1
        if self.note_written(space, page):
            self._traced[space].faults += 1
            self.counts.faults += 1
        else:
            self.accessed(space, page, True)  # read in an earlier interval, and present since then

    def note_written(self, space: AddressSpace, page: int) -> bool:
        """Note a store to a page, if it is one of this interval; return whether it is."""
        place = self._traced[space].places.get(page)
        if place is not None:
            traced, _page, _write, time_ns = self._records[place]
            self._records[place] = traced, page, True, time_ns
        return place is not None

    def unmapped(self, space: AddressSpace, start: int, end: int) -> None:
        """Addresses are not mapped any more: their pages have left the enclave."""
        traced = self._traced[space]
        low, high = start >> _SHIFT, end + _PAGE_MASK >> _SHIFT
        if high - low < len(traced.mapped):
            gone = [page for page in range(low, high) if page in traced.mapped]
        else:
            gone = sorted(page for page in traced.mapped if low <= page < high)
        for page in gone:
            traced.mapped.remove(page)
            traced.places.pop(page, None)
            self._gone(traced, page)

    def _gone(self, traced: _Traced, page: int | None) -> None:
        """A page, or the whole address space, is gone."""
        record = traced, page, None, self._program_ns(self._clock())
        if self._records:
            self._records.append(record)
        else:
            self._hand_over(*record)

    def _program_ns(self, now_ns: int) -> int:
        """Return the program's own time; :meth:`spent` adds the recorder's time afterwards."""
        counts = self.counts
        own_ns = now_ns - self._started_ns - counts.serving_ns - counts.hiding_ns
        self._latest_ns = max(self._latest_ns, own_ns)
        return self._latest_ns

    # --- intervals ------------------------------------------------------------------------------

    def spent(self, ns: int) -> None:
        """Take ``ns``, spent on answers to faults and stops, out of the program's time."""
        self.counts.serving_ns += ns
        if self._due_ns:
            self._due_ns += ns

    def between(self) -> float | None:
        """End the interval if it is over, and hide pages.

        Returns:
            Seconds until the next call has work; ``None``: no interval has begun.
        """
        now_ns = self._clock()
        if self._due_ns and now_ns >= self._due_ns:
            length_ns = now_ns - self._due_ns + self._interval_ns
            self.counts.long += length_ns > 2 * self._interval_ns
            self.counts.longest_ns = max(self.counts.longest_ns, length_ns)
            self.end_interval()
            self._late.update(self._traced)
            self._hide()
            self.counts.late += len(self._late)
        elif self._late:
            self._hide()
        if self._late:
            return _RETRY_S
        return max(self._due_ns - self._clock(), 0) / 1e9 if self._due_ns else None

    def hand_over_if_due(self) -> float | None:
        """End the interval if it is over, without hiding pages; return as :meth:`between`."""
        now_ns = self._clock()
        if self._due_ns and now_ns >= self._due_ns:
            self.end_interval()
        return max(self._due_ns - now_ns, 0) / 1e9 if self._due_ns else None

    def end_interval(self) -> None:
        """Pass the accesses of the interval to the sink."""
        self._due_ns = 0
        counts, before = self.counts, self.counts.accesses
        counts.intervals += bool(self._records)
        for record in self._records:
            self._hand_over(*record)
        counts.most_pages = max(counts.most_pages, counts.accesses - before)
        self._records.clear()
        if self._clock() - self._flushed_ns > _FLUSH_NS:
            self._flushed_ns = self._clock()
            self._sink.flush()
        for traced in self._traced.values():
            traced.places.clear()

    def _hand_over(
        self, traced: _Traced, page: int | None, write: bool | None, time_ns: int
    ) -> None:
        if page is None:
            self._sink.end_enclave(traced.number, time_ns)
            return
        number, counts = traced.numbers.number(page), self.counts
        if write is None:
            self._sink.remove_page(traced.number, number, time_ns)
            return
        if number >= traced.pages:
            traced.pages = traced.numbers.end
            self._sink.grow_enclave(traced.number, traced.pages)
        if number not in traced.known:
            traced.known.add(number)
            counts.pages += 1
        counts.accesses += 1
        counts.writes += write
        self._sink.append(traced.number, number, write, time_ns)

    def _hide(self) -> None:
        began_ns = self._clock()
        for space in list(self._late):
            if space.holds:
                continue
            self._late.discard(space)
            space.hide_all()
        self.counts.hiding_ns += self._clock() - began_ns
