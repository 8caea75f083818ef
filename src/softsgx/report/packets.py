"""A file of Perfetto packets: tracks, slices, instants and counters; interned and compressed.

Names and strings are written once and referred to by number after that.  Packets are gathered and
written as one compressed packet for each quarter of a megabyte.

Source:
    Perfetto, "Writing TrackEvent Protos Synthetically"; trace_packet.proto (``interned_data``,
    ``sequence_flags``, ``compressed_packets``: zlib over a ``Trace``), track_event.proto,
    interned_data.proto.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from softsgx.errors import SoftSgxError

__all__ = ["PacketFile", "require_perfetto"]

_SEQUENCE = 1
_PROCESS = 1
_PACKET_TAG = b"\x0a"  # field 1 of Trace, a message
_GATHERED_BYTES = 256 * 1024


class PacketFile:
    """See the module.

    Args:
        path: the file to be written, which is replaced.
        process: name of the process that all tracks belong to.

    Raises:
        SoftSgxError: the package ``perfetto`` is missing, or the file cannot be written.
    """

    def __init__(self, path: str | Path, process: str) -> None:
        proto = require_perfetto()
        self._kinds = proto.TrackEvent
        self._new_packet = proto.TracePacket
        try:
            self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise SoftSgxError(f"{path}: {error.strerror or error}") from error
        self._gathered = bytearray()
        self._tracks: dict[str, int] = {}
        self._names: dict[str, int] = {}
        self._fields: dict[str, int] = {}
        self._strings: dict[str, int] = {}
        packet = self._new_packet(trusted_packet_sequence_id=_SEQUENCE)
        packet.sequence_flags = packet.SEQ_INCREMENTAL_STATE_CLEARED
        packet.track_descriptor.uuid = _PROCESS
        packet.track_descriptor.process.pid = 1
        packet.track_descriptor.process.process_name = process
        self._write(packet)

    def begin(
        self, now_ns: int, track: str, name: str, fields: Iterable[tuple[str, object]] = ()
    ) -> None:
        """Begin a slice."""
        self._event(now_ns, self._track(track), self._kinds.TYPE_SLICE_BEGIN, name, fields)

    def end(self, now_ns: int, track: str, fields: Iterable[tuple[str, object]] = ()) -> None:
        """End the slice that was begun last."""
        self._event(now_ns, self._track(track), self._kinds.TYPE_SLICE_END, "", fields)

    def instant(
        self, now_ns: int, track: str, name: str, fields: Iterable[tuple[str, object]] = ()
    ) -> None:
        """Write something that takes no time."""
        self._event(now_ns, self._track(track), self._kinds.TYPE_INSTANT, name, fields)

    def counter(self, now_ns: int, track: str, value: int) -> None:
        """Write how many pages there are; the counter is below the track."""
        packet = self._packet(now_ns, self._track(track, pages=True), self._kinds.TYPE_COUNTER)
        packet.track_event.counter_value = value
        self._write(packet)

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        self._file.close()

    def _track(self, name: str, *, pages: bool = False) -> int:
        """Return a track's number; describe it when it is used for the first time.

        Args:
            name: of the track.
            pages: whether it is the counter of pages below the track.
        """
        key = f"{name} pages" if pages else name
        uuid = self._tracks.get(key)
        if uuid is not None:
            return uuid
        parent = self._track(name) if pages else _PROCESS
        uuid = self._tracks[key] = _PROCESS + 1 + len(self._tracks)
        packet = self._new_packet(trusted_packet_sequence_id=_SEQUENCE)
        descriptor = packet.track_descriptor
        descriptor.uuid, descriptor.parent_uuid, descriptor.name = uuid, parent, key
        if pages:
            descriptor.counter.unit_name = "pages"
        self._write(packet)
        return uuid

    def _event(
        self, now_ns: int, track: int, kind: int, name: str, fields: Iterable[tuple[str, object]]
    ) -> None:
        packet = self._packet(now_ns, track, kind)
        event, new = packet.track_event, packet.interned_data
        if name:
            event.name_iid = _interned(self._names, name, new.event_names)
        for key, value in fields:
            made = event.debug_annotations.add()
            made.name_iid = _interned(self._fields, key, new.debug_annotation_names)
            if isinstance(value, bool):
                made.bool_value = value
            elif isinstance(value, int) and value >= 0:
                made.uint_value = value
            elif isinstance(value, int):
                made.int_value = value
            else:
                text = str(value)
                known = self._strings.get(text)
                if known is None:
                    known = self._strings[text] = len(self._strings) + 1
                    string = new.debug_annotation_string_values.add()
                    string.iid, string.str = known, text.encode()
                made.string_value_iid = known
        self._write(packet)

    def _packet(self, now_ns: int, track: int, kind: int) -> Any:
        packet = self._new_packet(timestamp=now_ns, trusted_packet_sequence_id=_SEQUENCE)
        packet.sequence_flags = packet.SEQ_NEEDS_INCREMENTAL_STATE
        packet.track_event.type, packet.track_event.track_uuid = kind, track
        return packet

    def _write(self, packet: Any) -> None:
        data = packet.SerializeToString()
        self._gathered += _PACKET_TAG + _varint(len(data)) + data
        if len(self._gathered) >= _GATHERED_BYTES:
            self._flush()

    def _flush(self) -> None:
        packet = self._new_packet(compressed_packets=zlib.compress(bytes(self._gathered)))
        data = packet.SerializeToString()
        self._file.write(_PACKET_TAG + _varint(len(data)) + data)
        self._gathered.clear()


def _interned(known: dict[str, int], text: str, new: Any) -> int:
    """Return the number of a name; write the name if it is new."""
    number = known.get(text)
    if number is None:
        number = known[text] = len(known) + 1
        made = new.add()
        made.iid, made.name = number, text
    return number


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    made.append(number)
    return bytes(made)


def require_perfetto() -> Any:
    """Return the module of Perfetto's messages.

    Raises:
        SoftSgxError: the package is missing.
    """
    try:
        from perfetto.protos.perfetto.trace import perfetto_trace_pb2
    except ImportError as error:
        raise SoftSgxError(
            "Perfetto traces: package perfetto is missing; pip install 'softsgx[report]'"
        ) from error
    return perfetto_trace_pb2
