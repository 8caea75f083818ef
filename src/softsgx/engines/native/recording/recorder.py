"""Decides which uses of pages are accesses, and appends them to the trace.

A page is *fresh* after page tables map it, and, where intervals are recorded, from the start of an
interval.  The first use of a fresh page is an access.  The access of an interval is a write when
the page is written to at any time in the interval.  ADD_PAGES counts as a write to each page that
it adds, since the page takes a page of the EPC.

When REMOVE_PAGES has removed a page, the recorder writes that the page is gone.  When an enclave
has ended, the recorder writes the end once, not for each page.

Times are those of the program: nanoseconds since the recording began, without the time that the
recording itself has taken.

Deviation: pages that only ioctls use (EMODPR, EMODT, EREMOVE, EDBGRD) are not accesses; the leaves
by which an enclave accepts such a change are.

Deviation: of a thread that stays inside, TCS and SSA frame are accesses at the start of each
interval: the processor needs them to be in the EPC.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import Protocol

from softsgx.arch import PAGE_BYTES, PAGE_SHIFT
from softsgx.engines.native.memory.memory_file import EnclaveMemory
from softsgx.ondemand import dataclass

__all__ = ["AccessWriter", "Overhead", "Recorder"]

_FLUSH_NS = 1_000_000_000


class AccessWriter(Protocol):
    """Where accesses go: a :class:`softsgx.accesses.TraceWriter`."""

    def add_enclave(self, name: str, pages: int, pid: int) -> int:
        """Add an address range of ``pages`` pages; return its number."""

    def append(self, enclave: int, page: int, write: bool, time_ns: int) -> None:
        """Add one access, later than those before."""

    def remove_page(self, enclave: int, page: int, time_ns: int) -> None:
        """Add that a page has left its enclave."""

    def end_enclave(self, enclave: int, time_ns: int) -> None:
        """Add that an enclave has ended."""

    def add_late_interval(self) -> None:
        """Count an interval that took more than twice its time."""

    def flush(self) -> None:
        """Write what was appended to the file."""


@dataclass(slots=True)
class Overhead:
    """What a recording has cost so far.

    Attributes:
        intervals: how many intervals had an access.
        late_intervals: how many of them took more than twice the length of an interval.
        longest_interval_ns: the longest of them.
        faults: uses of pages that stopped the program because they were recorded.
        hiding_ns: time for beginning intervals, in which the program does not run.
        serving_ns: processor time of the supervisor for the faults.
    """

    intervals: int = 0
    late_intervals: int = 0
    longest_interval_ns: int = 0
    faults: int = 0
    hiding_ns: int = 0
    serving_ns: int = 0

    @property
    def total_ns(self) -> int:
        """Time for beginning intervals and for faults."""
        return self.hiding_ns + self.serving_ns


class _Traced:
    """An enclave; pages are numbers in its range.

    Attributes:
        pages: those that it has, of the pages that were recorded.
        places: of the pages that were accessed in this interval, in the list of its records.
    """

    __slots__ = ("base", "number", "pages", "places")

    def __init__(self, number: int, base: int) -> None:
        self.number, self.base = number, base
        self.pages: set[int] = set()
        self.places: dict[int, int] = {}


_Record = tuple["_Traced", int | None, bool | None, int]
"""An enclave, a page of it or all, whether it is written or gone (``None``), and when."""


class Recorder:
    """See the module.

    Args:
        writer: receives the accesses.
        interval_ns: length of an interval, from its first access on, in the program's time;
            ``None``: accesses are recorded without intervals.
        clock: returns nanoseconds.

    Attributes:
        interval_ns: see the argument.
        overhead: what the recording has cost.
        accesses: how many were recorded.
        writes: how many of them are writes.
        enclaves: how many enclaves have been created.
        faulted: a fault was served since this was set to ``False``.
        shown: the same, for another reader.
    """

    def __init__(
        self,
        writer: AccessWriter,
        *,
        interval_ns: int | None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.interval_ns = interval_ns
        self.overhead = Overhead()
        self.accesses = self.writes = self.enclaves = 0
        self.faulted = self.shown = False
        self._writer, self._clock = writer, clock
        self._began_ns = self._flushed_ns = clock()
        self._latest_ns = self._first_ns = 0  # the latest time; that of the interval's first access
        self._used: set[int] = set()  # EPC addresses of pages that are not fresh
        self._stored: set[int] = set()  # those of them that were written to
        self._traced: dict[EnclaveMemory, _Traced] = {}
        self._interval: list[_Record] = []  # in order; the first is an access
        self._appended = False

    @property
    def now_ns(self) -> int:
        """The program's time: it does not advance while the recording works."""
        now_ns = self._clock() - self._began_ns - self.overhead.total_ns
        self._latest_ns = max(self._latest_ns, now_ns)
        return self._latest_ns

    @property
    def wall_ns(self) -> int:
        """The time since the recording began."""
        return self._clock() - self._began_ns

    @property
    def interval_end_ns(self) -> int | None:
        """When the interval ends, in the program's time; ``None``: it has no access yet."""
        if self.interval_ns is None or not self._interval:
            return None
        return self._first_ns + self.interval_ns

    # --- for the engine -------------------------------------------------------------------------

    def enclave_created(self, memory: EnclaveMemory, base: int, size: int, pid: int) -> None:
        """ECREATE has succeeded on the device that ``memory`` stands for."""
        self.enclaves += 1
        name = f"{_command(pid)} {self.enclaves}"
        number = self._writer.add_enclave(name, size >> PAGE_SHIFT, pid)
        self._traced[memory] = _Traced(number, base)

    def pages_added(self, memory: EnclaveMemory, start: int, size: int) -> None:
        """EADD has succeeded for each page of a range."""
        for linaddr in range(start, start + size, PAGE_BYTES):
            self._access(memory, linaddr, write=True)

    def pages_removed(self, memory: EnclaveMemory, left: Container[int]) -> None:
        """REMOVE_PAGES has returned: the enclave has the pages ``left``, by number."""
        traced = self._traced[memory]
        for page in sorted(page for page in traced.pages if page not in left):
            traced.pages.remove(page)
            traced.places.pop(page, None)
            self._gone(traced, page)

    def enclave_ended(self, memory: EnclaveMemory) -> None:
        """The device is released: the enclave that it stands for, if any, has no pages any more."""
        traced = self._traced.pop(memory, None)
        if traced is not None:
            self._gone(traced, None)

    def page_mapped(self, epc_addr: int) -> None:
        """The first page table maps the page at ``epc_addr``: it is fresh."""
        self._used.discard(epc_addr)
        self._stored.discard(epc_addr)

    def page_used(self, epc_addr: int, memory: EnclaveMemory, linaddr: int, *, write: bool) -> None:
        """A page is used; uses that cannot change the trace need not be reported."""
        if epc_addr not in self._used:
            self._used.add(epc_addr)
        elif not write or self.interval_ns is None or epc_addr in self._stored:
            return
        if write:
            self._stored.add(epc_addr)
        self._access(memory, linaddr, write=write)

    def _access(self, memory: EnclaveMemory, linaddr: int, *, write: bool) -> None:
        traced = self._traced[memory]
        page = linaddr - traced.base >> PAGE_SHIFT
        traced.pages.add(page)
        if self.interval_ns is None:
            self._append(traced, page, write, self.now_ns)
            return
        place = traced.places.get(page)
        if place is None:
            now_ns = self.now_ns
            if not self._interval:
                self._first_ns = now_ns
            traced.places[page] = len(self._interval)
            self._interval.append((traced, page, write, now_ns))
        elif write:
            self._interval[place] = traced, page, True, self._interval[place][3]

    def _gone(self, traced: _Traced, page: int | None) -> None:
        """A page, or the whole enclave, is gone: after the accesses of this interval so far."""
        if self._interval:
            self._interval.append((traced, page, None, self.now_ns))
        else:
            self._append(traced, page, None, self.now_ns)

    def _append(self, traced: _Traced, page: int | None, write: bool | None, time_ns: int) -> None:
        self._appended = True
        if page is None:
            self._writer.end_enclave(traced.number, time_ns)
        elif write is None:
            self._writer.remove_page(traced.number, page, time_ns)
        else:
            self._writer.append(traced.number, page, write, time_ns)
            self.accesses += 1
            self.writes += write

    # --- for the recording ----------------------------------------------------------------------

    def start(self) -> None:
        """Begin the program's time; its first instruction follows."""
        self._began_ns = self._flushed_ns = self._clock()

    def end_interval(self) -> None:
        """Append the accesses of the interval, if it has any; then every page is fresh."""
        if self.interval_ns is None or not self._interval:
            return
        overhead, length_ns = self.overhead, self.now_ns - self._first_ns
        overhead.intervals += 1
        if length_ns > 2 * self.interval_ns:
            overhead.late_intervals += 1
            self._writer.add_late_interval()
        overhead.longest_interval_ns = max(overhead.longest_interval_ns, length_ns)
        for record in self._interval:
            self._append(*record)
            record[0].places.clear()
        self._interval.clear()
        self._used.clear()
        self._stored.clear()

    def flush_when_due(self) -> int | None:
        """Write to the file, once a second.

        Returns:
            The clock's time of the next flush; ``None``: nothing is waiting to be written.
        """
        if not self._appended:
            return None
        now_ns = self._clock()
        if now_ns - self._flushed_ns >= _FLUSH_NS:
            self._writer.flush()
            self._flushed_ns, self._appended = now_ns, False
            return None
        return self._flushed_ns + _FLUSH_NS


def _command(pid: int) -> str:
    """Return the name of a process."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    except OSError:
        return f"process {pid}"
