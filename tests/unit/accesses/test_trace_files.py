"""A trace file is read as it was written, whole or cut off, and cannot cost much memory.

Method: files in memory; a small file is cut at every byte; hostile ones are made by pyarrow, whose
messages may have values that :class:`TraceWriter` never writes.
"""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softsgx.accesses import (
    MOST_ACCESSES,
    Chunk,
    Event,
    Trace,
    TraceReader,
    TraceWriter,
    description,
    parse_trace,
    read_trace,
    write_trace,
)
from softsgx.accesses.arrow import schema
from softsgx.errors import SoftSgxError

PAGES = 50
Record = tuple[int, int, int, int]

records = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(0, PAGES - 1),
        st.sampled_from(Event),
        st.integers(0, 1 << 34),
    ).map(lambda record: record if record[2] is not Event.ENDED else (record[0], 0, *record[2:])),
    max_size=30,
)
"""Enclave, page, event, nanoseconds since the record before."""


def rows(chunk: Chunk) -> list[Record]:
    columns = (chunk.enclaves, chunk.pages, chunk.events, chunk.times_ns)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def opened(data: bytes) -> TraceReader:
    return parse_trace(io.BytesIO(data), "file", "softsgx")


def written(batches: list[list[Record]]) -> tuple[bytes, list[Record], list[int]]:
    """Write batches; return the file, its records, and its size before and after each batch."""
    file, everything, ends, now_ns = io.BytesIO(), [], [], 0
    with TraceWriter(file, precision="accesses", program="make -j2") as writer:
        ends.append(len(file.getvalue()))
        for name in "abc":
            writer.add_enclave(name, PAGES, 7)
        for batch in batches:
            for enclave, page, event, wait_ns in batch:
                now_ns += wait_ns
                if event == Event.REMOVED:
                    writer.remove_page(enclave, page, now_ns)
                elif event == Event.ENDED:
                    writer.end_enclave(enclave, now_ns)
                else:
                    writer.append(enclave, page, event == Event.WRITE, now_ns)
                everything.append((enclave, page, event, now_ns))
            writer.flush()
            ends.append(len(file.getvalue()))
    return file.getvalue(), everything, ends


@given(st.lists(records, max_size=3))
def test_what_is_written_is_read(batches: list[list[Record]]) -> None:
    data, everything, _ = written(batches)
    reader = opened(data)
    assert rows(reader.read().records) == everything
    assert len(reader) == len(everything)
    assert reader.info.complete
    assert [(one.number, one.name, one.pages, one.pid) for one in reader.info.enclaves] == [
        (0, "a", PAGES, 7),
        (1, "b", PAGES, 7),
        (2, "c", PAGES, 7),
    ]


def test_late_intervals_are_counted_in_a_file_that_was_cut() -> None:
    file = io.BytesIO()
    with TraceWriter(file, precision="intervals", interval_ns=10**7) as writer:
        number = writer.add_enclave("a", PAGES, 7)
        sizes = []
        for time_ns in range(3):
            writer.add_late_interval()
            writer.append(number, 0, False, time_ns)
            writer.flush()
            sizes.append(len(file.getvalue()))
    late = [opened(file.getvalue()[:size]).info.late_intervals for size in sizes]
    assert late == [1, 2, 3]


def test_processor_time_is_known_of_a_program_that_has_ended() -> None:
    file = io.BytesIO()
    with TraceWriter(file, precision="faults") as writer:
        writer.append(writer.add_enclave("a", PAGES, 7), 0, False, 1)
        writer.flush()
        before = len(file.getvalue())
        writer.end_program(5_000)
    assert opened(file.getvalue()[:before]).info.user_ns == 0
    assert opened(file.getvalue()).info.user_ns == 5_000
    assert [len(chunk) for chunk in opened(file.getvalue()) if len(chunk)] == [1]


def test_a_trace_that_is_read_and_written_again_is_the_same() -> None:
    first, second = io.BytesIO(), io.BytesIO()
    with TraceWriter(first, precision="intervals", interval_ns=10**7) as writer:
        writer.add_late_interval()
        enclave = writer.add_enclave("a", PAGES, 7)
        writer.append(enclave, 3, True, 1)
        writer.remove_page(enclave, 3, 2)
        writer.end_enclave(enclave, 3)
        writer.end_program(5_000)
    before = opened(first.getvalue()).read()
    write_trace(second, before)
    after = opened(second.getvalue()).read()
    assert after.info == before.info
    assert rows(after.records) == rows(before.records) == [(0, 3, 1, 1), (0, 3, 2, 2), (0, 0, 3, 3)]
    assert after.info.late_intervals == 1


def test_a_description_is_read_as_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with TraceWriter(
        path, precision="intervals", interval_ns=10**7, epc_pages=25, program="a 'b' \udcff\n"
    ):
        pass
    info = read_trace(path).info
    assert (info.precision, info.interval_ns, info.epc_pages) == ("intervals", 10**7, 25)
    assert (info.program, info.timed, info.version) == ("a 'b' \udcff\n", True, 2)


def test_arrays_are_written_as_single_accesses_are() -> None:
    one, other = io.BytesIO(), io.BytesIO()
    with TraceWriter(one, precision="faults") as writer:
        writer.add_enclave("a", PAGES, 1)
        writer.extend(0, range(PAGES), [True] * PAGES, range(10**12, 10**12 + PAGES))
    with TraceWriter(other, precision="faults") as writer:
        writer.add_enclave("a", PAGES, 1)
        for page in range(PAGES):
            writer.append(0, page, True, 10**12 + page)
    found = [opened(file.getvalue()).read() for file in (one, other)]
    assert rows(found[0].accesses) == rows(found[1].accesses)


def test_an_enclave_can_grow_and_another_can_come_later() -> None:
    file = io.BytesIO()
    with TraceWriter(file, precision="accesses") as writer:
        first = writer.add_enclave("heap", 1, 5)
        writer.append(first, 0, False, 1)
        writer.grow_enclave(first, 9)
        second = writer.add_enclave("other", 3, 6)
        writer.append(first, 8, False, 2)
        writer.append(second, 2, True, 3)
    trace = opened(file.getvalue()).read()
    assert [(one.pages, one.pid) for one in trace.info.enclaves] == [(9, 5), (3, 6)]
    assert rows(trace.accesses) == [(0, 0, False, 1), (0, 8, False, 2), (1, 2, True, 3)]


@pytest.mark.slow
def test_a_file_cut_at_any_byte_has_each_whole_batch_and_is_incomplete() -> None:
    data, everything, ends = written([[(0, page, True, 5) for page in range(9)]] * 3)
    began, *after = ends
    for cut in range(len(data)):
        whole = 9 * sum(end <= cut for end in after)
        try:
            reader = opened(data[:cut])
        except SoftSgxError:
            assert cut < began, "its description is not whole"
            continue
        assert not reader.info.complete
        assert rows(reader.read().records) == everything[:whole], f"cut at {cut}"


def test_a_recorder_that_fails_leaves_what_it_had_and_an_incomplete_file(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with suppress(KeyboardInterrupt), TraceWriter(path, precision="accesses") as writer:
        writer.append(writer.add_enclave("a", 1, 1), 0, True, 4)
        raise KeyboardInterrupt
    trace = read_trace(path)
    assert rows(trace.accesses) == [(0, 0, True, 4)]
    assert not trace.info.complete


def test_a_reader_sees_the_flushed_part_of_a_file_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with TraceWriter(path, precision="accesses") as writer:
        enclave = writer.add_enclave("a", 4, 1)
        writer.append(enclave, 1, False, 1)
        writer.flush()
        writer.append(enclave, 2, False, 2)
        assert rows(read_trace(path).accesses) == [(0, 1, False, 1)]
    assert len(read_trace(path)) == 2


def test_one_reader_can_be_iterated_twice_at_once() -> None:
    data, everything, _ = written([[(0, 1, True, 5)], [(1, 2, False, 6)]])
    reader = opened(data)
    pairs = list(zip(reader, reader, strict=True))
    assert [rows(one) for one, _ in pairs] == [rows(other) for _, other in pairs]
    assert [row for one, _ in pairs for row in rows(one)] == everything


def test_dense_numbers_tell_pages_of_different_enclaves_apart() -> None:
    data, _, _ = written([[(0, 7, True, 1), (1, 7, True, 1), (0, 3, True, 1), (0, 7, True, 1)]])
    numbers, pages = opened(data).read().dense()
    assert pages == 3
    assert numbers.tolist() == [1, 2, 0, 1]


def test_accesses_are_records_without_pages_that_go() -> None:
    data, everything, _ = written([[(0, 7, 1, 1), (0, 7, 2, 1), (1, 0, 3, 1), (0, 7, 0, 1)]])
    trace = opened(data).read()
    assert len(trace) == 4
    assert rows(trace.accesses) == [everything[0], everything[3]]
    assert trace.accesses.writes.tolist() == [True, False]
    assert trace.used_pages == 1


def test_an_enclave_without_pages_can_end() -> None:
    file = io.BytesIO()
    with TraceWriter(file, precision="faults") as writer:
        writer.end_enclave(writer.add_enclave("sh", 0, 7), 5)
    assert rows(opened(file.getvalue()).read().records) == [(0, 0, 3, 5)]


@given(st.lists(st.integers(0, 1 << 34), max_size=20), st.sampled_from([1, 7, 1000, 1 << 33]))
def test_times_are_rounded_down_to_the_resolution(waits: list[int], resolution_ns: int) -> None:
    file, now_ns, expected = io.BytesIO(), 0, []
    with TraceWriter(file, precision="faults", resolution_ns=resolution_ns) as writer:
        writer.add_enclave("a", 1, 1)
        for at, wait_ns in enumerate(waits):
            now_ns += wait_ns
            writer.append(0, 0, False, now_ns)
            expected.append(now_ns // resolution_ns * resolution_ns)
            if at % 3 == 0:
                writer.flush()
    trace = opened(file.getvalue()).read()
    assert trace.records.times_ns.tolist() == expected
    assert trace.info.resolution_ns == resolution_ns
    again = io.BytesIO()
    write_trace(again, trace)
    assert opened(again.getvalue()).read().info == trace.info


def test_records_of_a_jittered_clock_take_at_most_three_bytes_each() -> None:
    chance, count = np.random.default_rng(2), 1 << 16
    times = np.cumsum(chance.integers(0, 20_000, count)).astype(np.uint64)
    file = io.BytesIO()
    with TraceWriter(file, precision="accesses", resolution_ns=1000) as writer:
        writer.add_enclave("a", 1 << 15, 1)
        pages = np.minimum(chance.zipf(1.2, count), 1 << 15) - 1
        writer.extend(0, pages, chance.random(count) < 0.3, times)
    assert len(file.getvalue()) <= 3 * count


def test_typical_records_take_at_most_four_bytes_each() -> None:
    chance, count = np.random.default_rng(1), 1 << 17
    pages = np.minimum(chance.zipf(1.3, count), 4096) - 1
    times = np.cumsum(chance.exponential(20_000, count)).astype(np.uint64)
    file = io.BytesIO()
    with TraceWriter(file, precision="faults") as writer:
        writer.add_enclave("a", 4096, 1)
        writer.extend(0, pages, chance.random(count) < 0.3, times)
    assert len(file.getvalue()) <= 4 * count


# --- what is refused -----------------------------------------------------------------------------


def refusal(data: bytes) -> str:
    with pytest.raises(SoftSgxError) as refused:
        opened(data).read()
    text = str(refused.value)
    assert text.startswith("file: ")
    assert len(text.splitlines()) == 1
    return text


def stream(
    trace: object,
    batch: object,
    rows: int = 1,
    *,
    columns: pa.Schema | None = None,
    values: Mapping[str, int] = MappingProxyType({}),
) -> bytes:
    """Return an Arrow stream with any metadata; values of columns are 0 if not given."""
    named = schema() if columns is None else columns
    file = io.BytesIO()
    described = named.with_metadata({"softsgx.trace": json.dumps(trace)})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(file, described, options=options) as out:
        arrays = [pa.array(np.full(rows, values.get(kind.name, 0)), kind.type) for kind in named]
        made = pa.record_batch(arrays, schema=named)
        out.write_batch(made, custom_metadata={"softsgx.batch": json.dumps(batch)})
    return file.getvalue()


TRACE = json.loads(description.trace_text(Trace.of([]).info))
ENCLAVE = {"number": 0, "name": "a", "pages": 1, "pid": 1}
BATCH = {"start_ns": 0, "enclaves": [ENCLAVE]}


def test_the_streams_that_are_damaged_here_are_read_undamaged() -> None:
    assert len(opened(stream(TRACE, BATCH, 5)).read()) == 5


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": 3}, "version 3 of the format, where this softsgx reads 1 and 2"),
        ({"precision": "pages"}, "unknown precision"),
        ({"page_bytes": 8192}, "pages of 8192 bytes"),
        ({"epc_pages": -1}, "epc_pages is not from 0"),
        ({"resolution_ns": -1}, "resolution_ns is not from 0"),
        ({"interval_ns": True}, "interval_ns is not from 0"),
        ({"program": 5}, "program is not a string"),
        ({"timed": 1}, "timed is not true or false"),
    ],
)
def test_a_description_with_another_value_is_refused(
    change: dict[str, object], problem: str
) -> None:
    assert problem in refusal(stream(TRACE | change, BATCH))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"enclaves": 5}, "without a list of enclaves"),
        ({"enclaves": [5]}, "without a list of enclaves"),
        ({"enclaves": [ENCLAVE | {"number": 1}]}, "enclave 1 is described before enclave 0"),
        ({"enclaves": [ENCLAVE | {"pages": 1 << 40}]}, "pages is not from 0"),
        ({"enclaves": [ENCLAVE | {"pages": 0}]}, "a page outside its enclave"),
        ({"enclaves": []}, "of an enclave that is not described"),
        ({"start_ns": "now"}, "start_ns is not from 0"),
    ],
)
def test_a_batch_with_another_description_is_refused(
    change: dict[str, object], problem: str
) -> None:
    assert problem in refusal(stream(TRACE, BATCH | change))


@pytest.mark.parametrize(
    ("event", "page", "problem"),
    [
        (2, 1, "a page outside its enclave"),
        (3, 1, "the end of an enclave has a page"),
        (4, 0, "an event 4; the largest is 3"),
    ],
)
def test_an_impossible_event_is_refused(event: int, page: int, problem: str) -> None:
    assert problem in refusal(stream(TRACE, BATCH, values={"event": event, "page": page}))


def test_a_file_of_the_first_version_has_accesses_alone() -> None:
    first = schema(version=1)
    assert first.names == ["enclave", "page", "write", "delta_ns"]
    data = stream(TRACE | {"version": 1}, BATCH, columns=first, values={"write": 1, "delta_ns": 5})
    trace = opened(data).read()
    assert rows(trace.records) == rows(trace.accesses) == [(0, 0, Event.WRITE, 5)]
    assert trace.info.version == 1
    assert "its columns are not" in refusal(stream(TRACE, BATCH, columns=first))
    assert "its columns are not" in refusal(stream(TRACE | {"version": 1}, BATCH))


def test_other_columns_are_refused() -> None:
    columns = pa.schema([pa.field("page", pa.uint32(), nullable=False)])
    assert "its columns are not" in refusal(stream(TRACE, BATCH, columns=columns))
    plain = io.BytesIO()
    with pa.ipc.new_stream(plain, schema()):
        pass
    assert "no softsgx.trace" in refusal(plain.getvalue())


def test_bytes_after_the_end_are_refused() -> None:
    assert "1 bytes after the end" in refusal(stream(TRACE, BATCH) + b"\0")
    assert "bytes after the end" in refusal(stream(TRACE, BATCH) * 2)


def test_an_invalid_stream_is_refused() -> None:
    for data in (b"", b"12 r\n", b"\x1f\x8b" + bytes(20), b"\xff\xff\xff\xff\x10\0\0\0" + bytes(9)):
        refusal(data)


def peak_bytes(data: bytes) -> int:
    """Return the memory that a reader takes to iterate or refuse a file, pyarrow's included."""
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    most = 0
    try:
        for _ in opened(data):
            most = max(most, pa.total_allocated_bytes() - before)
    except SoftSgxError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return peak + most


def test_a_batch_of_more_records_than_a_reader_takes_is_refused_undecoded() -> None:
    data = stream(TRACE, BATCH, 1 << 23)
    assert len(data) < 1 << 16
    assert "a batch of 8388608" in refusal(data)
    assert peak_bytes(data) < 1 << 20


def test_a_buffer_that_claims_to_be_huge_is_refused_undecoded() -> None:
    good = stream(TRACE, BATCH, 1 << 16)
    claim = struct.pack("<q", 4 << 16)  # the length of the pages, decompressed
    places = [at for at in range(len(good)) if good.startswith(claim, at)]
    assert places
    for size in (1 << 30, 1 << 60, -5):
        for at in places:
            data = good[:at] + struct.pack("<q", size) + good[at + 8 :]
            refusal(data)
            assert peak_bytes(data) < 4 << 20


def test_many_accesses_in_a_small_file_are_read_in_parts_only() -> None:
    records, batches = 1 << 20, MOST_ACCESSES // (1 << 20) + 1
    whole = stream(TRACE, BATCH, records)
    began = len(schema({"softsgx.trace": json.dumps(TRACE)}).serialize())
    data = whole[:began] + whole[began:-8] * batches + whole[-8:]
    assert len(data) < 1 << 18
    reader = opened(data)
    assert sum(len(chunk) for chunk in reader) == len(reader) == records * batches
    assert f"more than {MOST_ACCESSES} at once" in refusal(data)


def test_a_trace_that_cannot_be_written_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(SoftSgxError, match=r"Is a directory"):
        TraceWriter(tmp_path, precision="accesses")
    with pytest.raises(SoftSgxError, match=r"/dev/full: No space left on device"):
        write_trace("/dev/full", Trace.of([(1, True)]))
