"""A run as a trace for Perfetto: every event of every layer, when it happened.

A listener that writes each event at once, so long runs need no memory.  Its tracks:

* ``processor 0`` and so on: a slice while it executes an enclave, and its crossings.  A thread
  of the program has its own processor until it ends.
* ``enclave 1`` and so on: a slice for each page fault; below it, its resident pages.
* ``reclaim``: a slice for each batch.
* ``group /jobs`` and so on: refused charges; below it, the pages charged to it.
* ``EPC``: below it, the pages in use.
* ``ENCLS``, and one for each layer: events without a track of their own, as instants.

Each slice or instant has all fields of its event, except those that its track shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Self

from softsgx import cgroup
from softsgx.driver import EnclaveCreated, FaultHandled
from softsgx.hw import AsynchronousExit, LeafDone
from softsgx.paging import events
from softsgx.report.packets import PacketFile
from softsgx.trace import Event

__all__ = ["PerfettoWriter"]

_ENTERING = frozenset({"eenter", "eresume"})
_USER_LEAVES = _ENTERING | {
    *("eexit", "ereport", "egetkey", "eaccept", "emodpe"),
    *("eacceptcopy", "everifyreport2", "edeccssa"),
}
_SUCCESS = "SGX_SUCCESS"
_TOLD = frozenset({"leaf", "duration_ns"})
"""Fields that the name or the length of a slice shows."""


class PerfettoWriter:
    """See the module; a :data:`~softsgx.trace.Tracer`, and a context manager that closes the file.

    Args:
        path: the file to be written, which is replaced.
        clock_ns: nanoseconds since an arbitrary start.
        levels: pages by the track that they are shown below; asked when they may have changed.

    Attributes:
        written: events so far.

    Raises:
        SoftSgxError: the package ``perfetto`` is missing, or the file cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        clock_ns: Callable[[], int],
        levels: Callable[[], Mapping[str, int]],
    ) -> None:
        self._file = PacketFile(path, "softsgx")
        self._clock_ns, self._levels = clock_ns, levels
        self._shown: dict[str, int] = {}
        self._numbers: dict[int, int] = {}  # of enclaves, by EID
        self._created_eid = 0
        self._inside: set[int] = set()
        self._fault_ended: dict[int, int] = {}
        self._in_batch = False
        self.written = 0

    def __call__(self, event: Event) -> None:
        """Write an event."""
        self.written += 1
        now = self._clock_ns()
        match event:
            case LeafDone():
                self._leaf(now, event)
            case AsynchronousExit():
                self._leave(now, event.cpu)
                self._instant(now, f"processor {event.cpu}", f"AEX {event.vector}", event)
            case FaultHandled():
                self._fault(now, event)
            case events.Isolated() if not self._in_batch:
                self._in_batch = True
                self._file.begin(now, "reclaim", "batch", _fields(event))
            case events.BatchDone():
                self._batch_done(now, event)
            case cgroup.ChargeRefused() | cgroup.VictimKilled():
                self._instant(now, f"group {event.group}", event.NAME.removeprefix("sgx:"), event)
            case _:
                self._other(now, event)

    def close(self) -> None:
        """End the trace."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # --- events ---------------------------------------------------------------------------------

    def _leaf(self, now: int, event: LeafDone) -> None:
        name = event.leaf.upper()
        succeeded = event.result == _SUCCESS
        if event.leaf not in _USER_LEAVES:
            if event.leaf == "ecreate" and succeeded:
                self._created_eid = event.eid
            self._instant(now, "ENCLS", name, event)
            return
        track = f"processor {event.cpu}"
        if event.leaf == "eexit":
            self._leave(now, event.cpu)
        self._instant(now, track, name, event)
        if event.leaf in _ENTERING and succeeded:
            self._leave(now, event.cpu)
            self._inside.add(event.cpu)
            self._file.begin(now, track, f"in enclave {self._numbers.get(event.eid, event.eid)}")

    def _leave(self, now: int, cpu: int) -> None:
        if cpu in self._inside:
            self._inside.remove(cpu)
            self._file.end(now, f"processor {cpu}")

    def _fault(self, now: int, event: FaultHandled) -> None:
        """Write a slice that ends now.

        Two threads may fault in one enclave at the same time, and slices of a track must not
        overlap: the second one begins where the first one ends.
        """
        track = f"enclave {event.enclave}"
        began = max(now - event.duration_ns, self._fault_ended.get(event.enclave, 0))
        self._fault_ended[event.enclave] = now
        self._file.begin(began, track, f"{event.kind} fault", _fields(event))
        self._file.end(now, track)
        self._count(now)

    def _batch_done(self, now: int, event: events.BatchDone) -> None:
        if self._in_batch:
            self._in_batch = False
            self._file.end(now, "reclaim", _fields(event))
        else:
            self._instant(now, "reclaim", "empty batch", event)
        self._count(now)

    def _other(self, now: int, event: Event) -> None:
        layer = _layer(event)
        self._instant(now, layer, event.NAME.removeprefix("sgx:"), event)
        if isinstance(event, EnclaveCreated):
            self._numbers[self._created_eid] = event.enclave
        if layer == "driver":
            self._count(now)

    def _instant(self, now: int, track: str, name: str, event: Event) -> None:
        self._file.instant(now, track, name, _fields(event))

    def _count(self, now: int) -> None:
        """Write every level that has changed."""
        levels, shown = self._levels(), self._shown
        for track in [track for track in shown if track not in levels and shown[track]]:
            shown[track] = 0
            self._file.counter(now, track, 0)
        for track, pages in levels.items():
            if shown.get(track) != pages:
                shown[track] = pages
                self._file.counter(now, track, pages)


def _fields(event: Event) -> Iterable[tuple[str, object]]:
    for item in fields(event):
        if item.name not in _TOLD:
            yield item.name, getattr(event, item.name)


def _layer(event: Event) -> str:
    """Return the package that an event's class comes from: ``paging``, ``driver``, …."""
    return type(event).__module__.removeprefix("softsgx.").partition(".")[0]
