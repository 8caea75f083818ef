"""A run as a trace for Perfetto: every event of every layer, when it happened.

A listener that writes as it is told, so long runs need no memory.  A track of each logical
processor shows when it was inside which enclave; there is one for ENCLS leaves, one for reclaim,
one for the page faults of each enclave, and a counter of its resident pages.  Whatever has no track
of its own is an instant with all its fields on the track of its layer.

Source:
    Perfetto, "Writing TrackEvent Protos Synthetically"; trace_packet.proto, track_event.proto.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from softsgx.driver import FaultHandled
from softsgx.errors import SoftSgxError
from softsgx.hw import AsynchronousExit, LeafDone
from softsgx.paging import events
from softsgx.trace import Event

__all__ = ["PerfettoWriter"]

_SEQUENCE = 1
_PROCESS = 1
_ENTERING = frozenset({"eenter", "eresume"})
_USER_LEAVES = _ENTERING | {
    *("eexit", "ereport", "egetkey", "eaccept", "emodpe"),
    *("eacceptcopy", "everifyreport2", "edeccssa"),
}
_SUCCESS = "SGX_SUCCESS"


class PerfettoWriter:
    """See the module; a :data:`~softsgx.trace.Tracer`, and a context manager that closes the file.

    Args:
        path: the file to be written, which is replaced.
        clock_ns: nanoseconds since an arbitrary start.
        resident: resident pages of each living enclave; asked when they may have changed.

    Attributes:
        written: events so far.

    Raises:
        SoftSgxError: the package ``perfetto`` is missing, or the file cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        clock_ns: Callable[[], int],
        resident: Callable[[], Mapping[int, int]],
    ) -> None:
        proto, builder = _import()
        self._kinds = proto.TrackEvent
        try:
            self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise SoftSgxError(f"{path}: {error.strerror or error}") from error
        self._builder = builder.StreamingTraceProtoBuilder(self._file)
        self._clock_ns, self._resident = clock_ns, resident
        self._tracks: dict[str, int] = {}
        self._shown: dict[int, int] = {}
        self._inside: set[int] = set()
        self._in_batch = False
        self.written = 0
        packet = self._builder.create_packet()
        packet.trusted_packet_sequence_id = _SEQUENCE
        descriptor = packet.track_descriptor
        descriptor.uuid = _PROCESS
        descriptor.process.pid, descriptor.process.process_name = 1, "softsgx"
        self._builder.write_packet(packet)

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
                self._instant(now, f"enclave {event.enclave} faults", event.kind, event)
                self._count(now)
            case events.Isolated() if not self._in_batch:
                self._in_batch = True
                self._slice(now, "reclaim", self._kinds.TYPE_SLICE_BEGIN, "batch", event)
            case events.BatchDone():
                self._batch_done(now, event)
                self._count(now)
            case _:
                layer = _layer(event)
                self._instant(now, layer, event.NAME.removeprefix("sgx:"), event)
                if layer == "driver":
                    self._count(now)

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
        if event.leaf not in _USER_LEAVES:
            self._instant(now, "ENCLS", name, event)
            return
        track = f"processor {event.cpu}"
        if event.leaf == "eexit":
            self._leave(now, event.cpu)
        self._instant(now, track, name, event)
        if event.leaf in _ENTERING and event.result == _SUCCESS:
            self._leave(now, event.cpu)
            self._inside.add(event.cpu)
            begin = self._kinds.TYPE_SLICE_BEGIN
            self._slice(now, track, begin, f"in enclave eid {event.eid}", None)

    def _leave(self, now: int, cpu: int) -> None:
        if cpu in self._inside:
            self._inside.remove(cpu)
            self._slice(now, f"processor {cpu}", self._kinds.TYPE_SLICE_END, "", None)

    def _batch_done(self, now: int, event: events.BatchDone) -> None:
        if self._in_batch:
            self._in_batch = False
            self._slice(now, "reclaim", self._kinds.TYPE_SLICE_END, "", event)
        else:
            self._instant(now, "reclaim", "empty batch", event)

    def _count(self, now: int) -> None:
        """Write the resident pages of every enclave where they have changed."""
        resident = self._resident()
        for number in [*self._shown.keys() - resident.keys()]:
            if self._shown[number]:
                self._counter(now, number, 0)
        for number, pages in resident.items():
            if self._shown.get(number) != pages:
                self._counter(now, number, pages)

    # --- packets --------------------------------------------------------------------------------

    def _track(self, name: str, *, counter: bool = False) -> int:
        uuid = self._tracks.get(name)
        if uuid is not None:
            return uuid
        uuid = self._tracks[name] = _PROCESS + 1 + len(self._tracks)
        packet = self._builder.create_packet()
        packet.trusted_packet_sequence_id = _SEQUENCE
        descriptor = packet.track_descriptor
        descriptor.uuid, descriptor.parent_uuid, descriptor.name = uuid, _PROCESS, name
        if counter:
            descriptor.counter.unit_name = "pages"
        self._builder.write_packet(packet)
        return uuid

    def _packet(self, now: int, track: int, kind: int) -> tuple[Any, Any]:
        packet = self._builder.create_packet()
        packet.timestamp = now
        packet.trusted_packet_sequence_id = _SEQUENCE
        packet.track_event.type, packet.track_event.track_uuid = kind, track
        return packet, packet.track_event

    def _instant(self, now: int, track: str, name: str, event: Event) -> None:
        self._slice(now, track, self._kinds.TYPE_INSTANT, name, event)

    def _slice(self, now: int, track: str, kind: int, name: str, event: Event | None) -> None:
        packet, written = self._packet(now, self._track(track), kind)
        if name:
            written.name = name
        if event is not None:
            for item in fields(event):
                _annotate(written.debug_annotations.add(), item.name, getattr(event, item.name))
        self._builder.write_packet(packet)

    def _counter(self, now: int, number: int, pages: int) -> None:
        self._shown[number] = pages
        track = self._track(f"enclave {number} resident", counter=True)
        packet, written = self._packet(now, track, self._kinds.TYPE_COUNTER)
        written.counter_value = pages
        self._builder.write_packet(packet)


def _annotate(annotation: Any, name: str, value: object) -> None:
    annotation.name = name
    if isinstance(value, bool):
        annotation.bool_value = value
    elif isinstance(value, int) and value >= 0:
        annotation.uint_value = value
    elif isinstance(value, int):
        annotation.int_value = value
    else:
        annotation.string_value = str(value)


def _layer(event: Event) -> str:
    """Return the package that an event's class comes from: ``paging``, ``driver``, …."""
    return type(event).__module__.removeprefix("softsgx.").partition(".")[0]


def _import() -> tuple[Any, Any]:
    try:
        from perfetto.protos.perfetto.trace import perfetto_trace_pb2
        from perfetto.trace_builder import proto_builder
    except ImportError as error:
        raise SoftSgxError(
            "a Perfetto trace needs the package perfetto: pip install 'softsgx[report]'"
        ) from error
    return perfetto_trace_pb2, proto_builder
