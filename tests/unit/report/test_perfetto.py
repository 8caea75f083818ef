"""Traces: every event is in them, in order, and what begins ends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.support.report import Story

from softsgx.errors import SoftSgxError
from softsgx.report import PerfettoWriter

pb2 = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
KINDS = pb2.TrackEvent


class Trace:
    """A written trace, read again."""

    def __init__(self, path: Path) -> None:
        trace = pb2.Trace()
        trace.ParseFromString(path.read_bytes())
        self.names = {}
        self.packets = []
        for packet in trace.packet:
            if packet.HasField("track_descriptor"):
                descriptor = packet.track_descriptor
                self.names[descriptor.uuid] = descriptor.name
            else:
                self.packets.append(packet)

    def on(self, track: str) -> list[object]:
        return [p for p in self.packets if self.names[p.track_event.track_uuid] == track]


@pytest.fixture(scope="module")
def story_and_trace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Story, Trace, int]:
    path = tmp_path_factory.mktemp("trace") / "run.pftrace"
    story = Story(listen=True)
    with PerfettoWriter(path, story.clock, story.collector.resident) as writer:
        story.platform._listeners.append(writer)
        made = story.enclave()
        story.touch(made, rounds=2)
        made.process.exit()
    return story, Trace(path), writer.written


def test_every_event_is_written(story_and_trace: tuple[Story, Trace, int]) -> None:
    _story, trace, written = story_and_trace
    told = [p for p in trace.packets if p.track_event.debug_annotations]
    assert written > 1000
    # An event is one packet with its fields, but those without fields and ends of slices.
    assert written * 0.99 <= len(told) <= written


def test_time_never_goes_back(story_and_trace: tuple[Story, Trace, int]) -> None:
    times = [packet.timestamp for packet in story_and_trace[1].packets]
    assert times == sorted(times)


def test_stays_in_the_enclave_begin_and_end_in_turn(
    story_and_trace: tuple[Story, Trace, int],
) -> None:
    kinds = [p.track_event.type for p in story_and_trace[1].on("processor 0")]  # type: ignore[attr-defined]
    slices = [kind for kind in kinds if kind != KINDS.TYPE_INSTANT]
    assert slices == [KINDS.TYPE_SLICE_BEGIN, KINDS.TYPE_SLICE_END] * (len(slices) // 2)
    assert len(slices) > 10


def test_batches_begin_and_end_in_turn(story_and_trace: tuple[Story, Trace, int]) -> None:
    kinds = [p.track_event.type for p in story_and_trace[1].on("reclaim")]  # type: ignore[attr-defined]
    slices = [kind for kind in kinds if kind != KINDS.TYPE_INSTANT]
    assert slices == [KINDS.TYPE_SLICE_BEGIN, KINDS.TYPE_SLICE_END] * (len(slices) // 2)


def test_the_counter_follows_the_resident_pages(story_and_trace: tuple[Story, Trace, int]) -> None:
    story, trace, _ = story_and_trace
    packets = trace.on("enclave 1 resident")
    values = [p.track_event.counter_value for p in packets]  # type: ignore[attr-defined]
    (enclave,) = story.collector.enclaves()
    assert max(values) * 4096 <= enclave.peak_resident_bytes
    assert values[-1] == 0, "the enclave is gone, its counter is not"


def test_fields_of_an_event_are_annotations(story_and_trace: tuple[Story, Trace, int]) -> None:
    fault = story_and_trace[1].on("enclave 1 faults")[0]
    names = [item.name for item in fault.track_event.debug_annotations]  # type: ignore[attr-defined]
    assert names == ["enclave", "linaddr", "kind", "result"]


def test_a_missing_package_is_told_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "perfetto.trace_builder", None)
    with pytest.raises(SoftSgxError, match=r"pip install 'softsgx\[report\]'"):
        PerfettoWriter(tmp_path / "trace", lambda: 0, dict)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(SoftSgxError, match="nowhere/trace: No such file"):
        PerfettoWriter(tmp_path / "nowhere" / "trace", lambda: 0, dict)
