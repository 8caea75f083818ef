"""Writing a trace file: records are collected in arrays, and written as batches of an Arrow stream.

The writer only appends to the file, and flushes it to the kernel after each batch.  A recorder that
is killed loses only the records since its last :meth:`TraceWriter.flush`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self

from softsgx.accesses.arrow import np, pa, schema
from softsgx.accesses.description import (
    BATCH_KEY,
    MOST_ENCLAVES,
    MOST_PAGES,
    PAGE_BYTES,
    TRACE_KEY,
    VERSION,
    Event,
    Precision,
    TracedEnclave,
    TraceInfo,
    batch_text,
    trace_text,
)
from softsgx.accesses.records import Chunk, Trace
from softsgx.errors import SoftSgxError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["TraceWriter", "write_trace"]

_BATCH_RECORDS = 1 << 16
_COMPRESSION_LEVEL = 3  # higher levels save at most a tenth, in several times the time
_BATCH_ENCLAVES = 256  # described in one batch: bounds the size of its metadata
_MOST_DELTA_NS = (1 << 32) - 1


class TraceWriter:
    """A trace file that is being written, a context manager.

    When an exception ends the block, the appended records are written, but the file is not marked
    complete.

    Args:
        file: a path, where an existing file is replaced, or an open file, which stays open.
        precision, interval_ns, epc_pages, program, timed: see :class:`TraceInfo`.
        resolution_ns: times are rounded down to a multiple of it, which makes the file smaller.

    Raises:
        SoftSgxError: the file cannot be written; :meth:`flush`, and methods that call it, raise it
            too.
    """

    def __init__(
        self,
        file: str | Path | BinaryIO,
        *,
        precision: Precision,
        program: str = "",
        interval_ns: int = 0,
        epc_pages: int = 0,
        timed: bool = True,
        resolution_ns: int = 1,
    ) -> None:
        info = TraceInfo(
            version=VERSION,
            precision=precision,
            interval_ns=interval_ns,
            epc_pages=epc_pages,
            program=program,
            page_bytes=PAGE_BYTES,
            timed=timed,
            enclaves=(),
            complete=False,
            resolution_ns=resolution_ns,
        )
        self._resolution_ns = resolution_ns
        self._enclaves: list[TracedEnclave] = []
        self._undescribed: dict[int, None] = {}  # numbers of new or grown enclaves
        self._now_ns = self._late_intervals = self._user_ns = 0
        self._clear()
        self._owns_file = isinstance(file, str | Path)
        self._name = str(file) if self._owns_file else str(getattr(file, "name", "trace"))
        with self._write_errors():
            self._file: BinaryIO = (
                open(file, "wb")  # noqa: SIM115 - closed by close()
                if isinstance(file, str | Path)
                else file
            )
            described = schema({TRACE_KEY: trace_text(info)})
            codec = pa.Codec("zstd", compression_level=_COMPRESSION_LEVEL)
            options = pa.ipc.IpcWriteOptions(compression=codec)
            self._stream = pa.ipc.new_stream(self._file, described, options=options)
        try:
            self._write(Chunk.joined(()))  # pyarrow writes the schema with the first batch
        except SoftSgxError:
            with self._write_errors():
                self._close_file()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(complete=kind is None)

    def add_enclave(self, name: str, pages: int, pid: int) -> int:
        """Add an address range; return its number.

        Args:
            name: for display.
            pages: its size.
            pid: the process that it belongs to; 0: none.

        Raises:
            SoftSgxError: the file has ``MOST_ENCLAVES`` already.
        """
        number = len(self._enclaves)
        if number == MOST_ENCLAVES:
            raise SoftSgxError(
                f"{self._name}: more than {MOST_ENCLAVES} enclaves; record fewer processes"
            )
        self._enclaves.append(TracedEnclave(number, name, 0, pid))
        self.grow_enclave(number, pages)
        return number

    def grow_enclave(self, number: int, pages: int) -> None:
        """Change the size of an enclave's range.

        Raises:
            SoftSgxError: it has more than ``MOST_PAGES``.
        """
        before = self._enclaves[number]
        assert pages >= before.pages, "a range shrinks"
        if pages > MOST_PAGES:
            raise SoftSgxError(
                f"{self._name}: {before.name}: {pages} pages, more than {MOST_PAGES}; "
                "record a program with less memory"
            )
        self._enclaves[number] = TracedEnclave(number, before.name, int(pages), before.pid)
        self._undescribed[number] = None
        if len(self._undescribed) == _BATCH_ENCLAVES:
            self.flush()

    def add_late_interval(self) -> None:
        """Count an interval that took more than twice its time."""
        self._late_intervals += 1

    def end_program(self, user_ns: int) -> None:
        """Write the appended records, and the ended program's processor time in user mode.

        Raises:
            SoftSgxError: the file cannot be written.
        """
        self.flush()
        self._user_ns = user_ns
        self._write(Chunk.joined(()))

    def append(self, enclave: int, page: int, write: bool, time_ns: int) -> None:
        """Append an access; its time is not before that of the last record."""
        self._append(enclave, page, Event.WRITE if write else Event.READ, time_ns)

    def remove_page(self, enclave: int, page: int, time_ns: int) -> None:
        """Append that a page was removed from its enclave; a later access is to a new page."""
        self._append(enclave, page, Event.REMOVED, time_ns)

    def end_enclave(self, enclave: int, time_ns: int) -> None:
        """Append that an enclave has ended, with all of its pages."""
        self._append(enclave, 0, Event.ENDED, time_ns)

    def _append(self, enclave: int, page: int, event: int, time_ns: int) -> None:
        self._gathered_enclaves.append(enclave)
        self._gathered_pages.append(page)
        self._gathered_events.append(event)
        self._gathered_times.append(time_ns)
        if len(self._gathered_times) == _BATCH_RECORDS:
            self.flush()

    def extend(
        self, enclave: int, pages: ArrayLike, writes: ArrayLike, times_ns: ArrayLike
    ) -> None:
        """Append accesses to one enclave."""
        numbers = np.asarray(pages, np.uint32)
        self.extend_chunk(
            Chunk(
                np.full(len(numbers), enclave, np.uint16),
                numbers,
                np.asarray(writes, np.bool).astype(np.uint8),
                np.asarray(times_ns, np.uint64),
            )
        )

    def extend_chunk(self, chunk: Chunk) -> None:
        """Append records of several enclaves."""
        self.flush()
        for first in range(0, len(chunk), _BATCH_RECORDS):
            self._write(chunk[first : first + _BATCH_RECORDS])

    def flush(self) -> None:
        """Write the appended records, so that they survive a recorder that is killed.

        Raises:
            SoftSgxError: the file cannot be written.
        """
        chunk = Chunk(
            np.frombuffer(self._gathered_enclaves, np.uint16),
            np.frombuffer(self._gathered_pages, np.uint32),
            np.frombuffer(self._gathered_events, np.uint8),
            np.frombuffer(self._gathered_times, np.uint64),
        )
        self._clear()
        if len(chunk) or self._undescribed:
            self._write(chunk)

    def close(self, *, complete: bool = True) -> None:
        """Write the appended records, and the mark of a complete file; then close the file.

        Raises:
            SoftSgxError: the file cannot be written.
        """
        with self._write_errors():
            try:
                self.flush()
                if complete:
                    self._stream.close()
                    self._file.flush()
            finally:
                self._close_file()

    def _close_file(self) -> None:
        if self._owns_file:
            self._file.close()

    def _clear(self) -> None:
        self._gathered_enclaves, self._gathered_pages = array("H"), array("I")
        self._gathered_events, self._gathered_times = array("B"), array("Q")

    def _write(self, chunk: Chunk) -> None:
        """Write a chunk: one batch, or several where a difference of times exceeds 32 bits."""
        times = chunk.times_ns - chunk.times_ns % np.uint64(self._resolution_ns)
        before = np.concatenate((np.array([self._now_ns], np.uint64), times[:-1]))[: len(times)]
        assert (before <= times).all(), "records are not in order of time"
        sizes = np.array([one.pages for one in self._enclaves], np.uint64)
        inside = (chunk.pages < sizes[chunk.enclaves]) | (chunk.events == Event.ENDED)
        assert inside.all(), "a page outside its enclave"
        deltas = times - before
        late = np.flatnonzero(deltas > _MOST_DELTA_NS)
        deltas[late] = 0
        starts = sorted({0, *late.tolist()})
        for first, end in pairwise([*starts, len(chunk)]):
            if first in late:
                self._now_ns = int(times[first])
            self._write_batch(chunk[first:end], deltas[first:end])
            if end > first:
                self._now_ns = int(times[end - 1])

    def _write_batch(self, chunk: Chunk, deltas: NDArray[np.uint64]) -> None:
        described = [self._enclaves[number] for number in self._undescribed]
        text = batch_text(self._now_ns, described, self._late_intervals, self._user_ns)
        metadata = {BATCH_KEY: text}
        columns = (chunk.enclaves, chunk.pages, chunk.events, deltas.astype(np.uint32))
        batch = pa.record_batch([pa.array(column) for column in columns], schema=schema())
        with self._write_errors():
            self._stream.write_batch(batch, custom_metadata=metadata)
            self._file.flush()
        self._undescribed.clear()

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SoftSgxError(f"{self._name}: {error.strerror or error}") from error


def write_trace(file: str | Path | BinaryIO, trace: Trace) -> None:
    """Write a whole trace.

    Raises:
        SoftSgxError: the file cannot be written.
    """
    info = trace.info
    with TraceWriter(
        file,
        precision=info.precision,
        program=info.program,
        interval_ns=info.interval_ns,
        epc_pages=info.epc_pages,
        timed=info.timed,
        resolution_ns=info.resolution_ns,
    ) as writer:
        for enclave in info.enclaves:
            writer.add_enclave(enclave.name, enclave.pages, enclave.pid)
        for _ in range(info.late_intervals):
            writer.add_late_interval()
        writer.extend_chunk(trace.records)
        if info.user_ns:
            writer.end_program(info.user_ns)
