"""The program's time in a recording: the wall clock without what softsgx has used of it."""

from __future__ import annotations

from typing import Any

from softsgx.engines.native.recording.recorder import Recorder
from softsgx.engines.native.recording.recording import Recording


def test_the_program_s_time_stands_still_while_softsgx_works() -> None:
    wall, cpu, unused = [0], [0], Any
    writer: Any = unused
    permits: Any = unused
    recorder = Recorder(writer, interval_ns=10_000, clock=lambda: wall[0])
    recording = Recording(recorder, {}, permits, lambda: wall[0], lambda: cpu[0])
    wall[0] += 1000  # of the program alone
    recording.between()
    assert recorder.now_ns == 1000
    for faulted, paid in ((False, "supervising_ns"), (True, "serving_ns")):
        wall[0] += 700
        cpu[0] += 500
        recorder.faulted = faulted
        recording.between()
        assert getattr(recorder.overhead, paid) == 500
    assert recorder.now_ns == 1000 + 2 * 200
    assert recorder.overhead.total_ns == 500, "the recording has cost its faults alone"
