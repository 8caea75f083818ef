"""Traces: every event is in them, in order, what begins ends, and they stay small."""

from __future__ import annotations

import sys
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tests.support.report import Story

from softsgx.driver import FaultHandled
from softsgx.errors import SoftSgxError
from softsgx.paging import events
from softsgx.report import PerfettoWriter

pb2 = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
KINDS = pb2.TrackEvent
PAGE = 4096
MOST_BYTES_A_FAULT = 250


class Packet:
    """An event of a trace, with its numbers resolved."""

    def __init__(self, packet: Any, track: str, name: str, fields: dict[str, object]) -> None:
        self.time, self.type = packet.timestamp, packet.track_event.type
        self.value = packet.track_event.counter_value
        self.track, self.name, self.fields = track, name, fields


class Trace:
    """A written trace, read again as Perfetto's reader reads it."""

    def __init__(self, path: Path) -> None:
        self.tracks: dict[int, Any] = {}
        self.packets: list[Packet] = []
        self._names: dict[int, str] = {}
        self._fields: dict[int, str] = {}
        self._strings: dict[int, str] = {}
        outer = pb2.Trace.FromString(path.read_bytes())
        for compressed in outer.packet:
            inner = zlib.decompress(compressed.compressed_packets)
            for packet in pb2.Trace.FromString(inner).packet:
                self._take(packet)

    def _take(self, packet: Any) -> None:
        assert packet.trusted_packet_sequence_id
        if packet.HasField("track_descriptor"):
            descriptor = packet.track_descriptor
            assert descriptor.uuid not in self.tracks, "a track is described twice"
            assert not descriptor.parent_uuid or descriptor.parent_uuid in self.tracks
            self.tracks[descriptor.uuid] = descriptor
            return
        assert packet.sequence_flags & packet.SEQ_NEEDS_INCREMENTAL_STATE
        new = packet.interned_data
        self._names |= {one.iid: one.name for one in new.event_names}
        self._fields |= {one.iid: one.name for one in new.debug_annotation_names}
        self._strings |= {one.iid: one.str.decode() for one in new.debug_annotation_string_values}
        event = packet.track_event
        values = {self._fields[one.name_iid]: self._value(one) for one in event.debug_annotations}
        name = self._names[event.name_iid] if event.name_iid else ""
        self.packets.append(Packet(packet, self.tracks[event.track_uuid].name, name, values))

    def _value(self, annotation: Any) -> object:
        kind = annotation.WhichOneof("value")
        value: object = getattr(annotation, kind)
        return self._strings[annotation.string_value_iid] if kind == "string_value_iid" else value

    def on(self, track: str) -> list[Packet]:
        return [packet for packet in self.packets if packet.track == track]

    def slices(self, track: str) -> list[tuple[str, int, int]]:
        """Name, begin and end of each slice of a track that has no slice within a slice."""
        found, open_ = [], None
        for packet in self.on(track):
            if packet.type == KINDS.TYPE_SLICE_BEGIN:
                assert open_ is None, f"{packet.name} begins in a slice"
                open_ = packet
            elif packet.type == KINDS.TYPE_SLICE_END:
                assert open_ is not None, "a slice ends that did not begin"
                found.append((open_.name, open_.time, packet.time))
                open_ = None
        assert open_ is None, "a slice never ends"
        return found


Written = tuple[Story, Trace, int]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    path = tmp_path_factory.mktemp("trace") / "run.pftrace"
    story = Story(listen=True, groups={"jobs": {"max": 26 * PAGE}})
    with PerfettoWriter(path, story.clock, story.collector.levels) as writer:
        story.platform._listeners.append(writer)
        made = story.enclave(group="jobs")
        story.touch(made, rounds=2)
        made.process.exit()
    return story, Trace(path), writer.written


def test_every_event_is_written(written: Written) -> None:
    story, trace, count = written
    told = [p for p in trace.packets if p.type != KINDS.TYPE_COUNTER]
    slices = sum(p.type == KINDS.TYPE_SLICE_BEGIN for p in told)
    stays = sum(p.name.startswith("in enclave") for p in told)
    batches = sum(isinstance(event, events.BatchDone) for event in story.events)
    assert count == len(story.events) > 1000
    # A fault is two packets and a stay is two beside its events; each end of a batch is an event.
    faults = sum(isinstance(event, FaultHandled) for event in story.events)
    assert len(told) == count + faults + 2 * stays
    assert slices <= faults + stays + batches


def test_instants_and_levels_are_in_order_of_time(written: Written) -> None:
    """A slice of a fault is written at its end; everything else when it happens."""
    backwards = [p for p in written[1].packets if not p.name.endswith(" fault")]
    times = [packet.time for packet in backwards]
    assert times == sorted(times)


def test_stays_in_the_enclave_are_slices(written: Written) -> None:
    slices = written[1].slices("processor 0")
    assert len(slices) > 10
    assert {name for name, _begin, _end in slices} == {"in enclave 1"}
    assert all(begin < end for _name, begin, end in slices)


def test_each_fault_is_a_slice_as_long_as_it_took(written: Written) -> None:
    story, trace, _ = written
    faults = [event for event in story.events if isinstance(event, FaultHandled)]
    slices = trace.slices("enclave 1")
    assert [name for name, _begin, _end in slices] == [f"{event.kind} fault" for event in faults]
    for (_name, begin, end), event in zip(slices, faults, strict=True):
        assert 0 < end - begin <= event.duration_ns
    starts = [begin for _name, begin, _end in slices]
    assert starts == sorted(starts)


def test_batches_are_slices(written: Written) -> None:
    slices = written[1].slices("reclaim")
    assert slices
    assert {name for name, _begin, _end in slices} == {"batch"}


@pytest.mark.parametrize("track", ["enclave 1", "EPC", "group /jobs"])
def test_each_level_is_a_counter_below_its_track(written: Written, track: str) -> None:
    story, trace, _ = written
    (counter,) = (one for one in trace.tracks.values() if one.name == f"{track} pages")
    assert trace.tracks[counter.parent_uuid].name == track
    assert counter.counter.unit_name == "pages"
    values = [packet.value for packet in trace.on(counter.name)]
    assert 0 < max(values) <= story.platform.core.epc_pages
    if track == "enclave 1":
        (enclave,) = story.collector.enclaves()
        assert max(values) * PAGE <= enclave.peak_resident_bytes
        assert values[-1] == 0, "the enclave is gone, its counter is not"
    if track == "group /jobs":
        assert max(values) <= 26


def test_a_refused_charge_is_on_the_track_of_its_group(written: Written) -> None:
    refused = [p for p in written[1].on("group /jobs") if p.name == "charge_refused"]
    assert refused
    assert {p.fields["limit"] for p in refused} == {"/jobs"}


def test_fields_of_an_event_are_annotations(written: Written) -> None:
    story, trace, _ = written
    event = next(event for event in story.events if isinstance(event, FaultHandled))
    fault = trace.on("enclave 1")[0]
    names = [item.name for item in fields(event) if item.name != "duration_ns"]
    assert fault.fields == {name: getattr(event, name) for name in names}


@pytest.mark.slow
def test_a_trace_has_few_bytes_for_each_fault(tmp_path: Path) -> None:
    """Every page that is loaded is one that was evicted: the most events that a fault has."""
    path = tmp_path / "run.pftrace"
    story = Story(listen=True)
    with PerfettoWriter(path, story.clock, story.collector.levels) as writer:
        made = story.enclave()
        story.platform._listeners.append(writer)
        story.touch(made, rounds=20)
    faults = story.collector.totals().faults
    assert faults > 700 and writer.written > 10 * faults
    assert path.stat().st_size < MOST_BYTES_A_FAULT * faults


def test_a_missing_package_is_reported_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "perfetto.protos.perfetto.trace", None)
    with pytest.raises(SoftSgxError, match=r"pip install 'softsgx\[report\]'"):
        PerfettoWriter(tmp_path / "trace", lambda: 0, dict)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(SoftSgxError, match="nowhere/trace: No such file"):
        PerfettoWriter(tmp_path / "nowhere" / "trace", lambda: 0, dict)
