"""Reading a trace file: its description at once, its accesses in chunks.

The memory that a file can cost is bounded by the size of the file and of one batch; lengths that
the file claims do not matter.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO, Self

from softsgx.accesses.arrow import np, pa, schema
from softsgx.accesses.description import (
    BATCH_KEY,
    MOST_BATCH_RECORDS,
    TRACE_KEY,
    Event,
    TracedEnclave,
    TraceInfo,
    read_batch_text,
    read_trace_text,
)
from softsgx.accesses.messages import Damaged, Kind, Message, messages
from softsgx.accesses.records import Chunk, Trace
from softsgx.errors import SoftSgxError, first_line

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MOST_ACCESSES", "TraceReader"]

MOST_ACCESSES = 1 << 24
"""The most records that :meth:`TraceReader.read` returns: a small file can hold very many."""
_MOST_BUFFER_BYTES = 8 * MOST_BATCH_RECORDS


class TraceReader:
    """A trace in a file, which can be iterated any number of times; a context manager.

    The file is closed at the end of the block, or when the reader is no longer used.

    Args:
        file: an open file, which can seek.
        name: its name in messages.

    Attributes:
        info: the description of the trace.

    Raises:
        SoftSgxError: this is not a trace, or it cannot be read; also while iterating.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        with self._refusals():
            self._end = file.seek(0, os.SEEK_END)
            self._ends = (0, 0)  # places of the first and the last batch with records
            self.info, self._records = self._scan()
        self.close = weakref.finalize(self, file.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Return the number of records: accesses, removed pages and ended enclaves."""
        return self._records

    def __iter__(self) -> Iterator[Chunk]:
        """Yield the records in order, at most ``MOST_BATCH_RECORDS`` at a time."""
        with self._refusals():
            for message in messages(self._file, self._end):
                if message.kind is Kind.BATCH and message.records:
                    yield self._decoded(message)

    def span_ns(self) -> tuple[int, int]:
        """Return the times of the first and the last record, 0 and 0 without any."""
        if not self._records:
            return 0, 0
        with self._refusals():
            first, last = (
                self._decoded(next(messages(self._file, self._end, start=place)))
                for place in self._ends
            )
        return int(first.times_ns[0]), int(last.times_ns[-1])

    def read(self) -> Trace:
        """Return all records.

        Raises:
            SoftSgxError: there are more than ``MOST_ACCESSES``.
        """
        if len(self) > MOST_ACCESSES:
            raise SoftSgxError(
                f"{self._name}: {len(self)} records, more than {MOST_ACCESSES} at once; "
                "iterate over the reader"
            )
        return Trace(self.info, Chunk.joined(self))

    def _decoded(self, message: Message) -> Chunk:
        sizes = np.array([enclave.pages for enclave in self.info.enclaves], np.uint64)
        return _decoded(message, sizes, self.info.version)

    def _scan(self) -> tuple[TraceInfo, int]:
        """Return the trace's description and its number of records, from the headers."""
        stream = messages(self._file, self._end, bodies=False)
        info = _described(next(stream, None))
        enclaves: list[TracedEnclave] = []
        records = late_intervals = user_ns = 0
        for message in stream:
            if message.kind is Kind.END:
                info = replace(info, complete=True)
                break
            if message.kind is not Kind.BATCH:
                raise Damaged("a second schema")
            if not 0 <= message.records <= MOST_BATCH_RECORDS:
                raise Damaged(f"a batch of {message.records}, more than {MOST_BATCH_RECORDS}")
            text = message.metadata.get(BATCH_KEY.encode(), b"")
            _, changed, late_intervals, user_ns = read_batch_text(text)
            for enclave in changed:
                if enclave.number > len(enclaves):
                    raise Damaged(
                        f"enclave {enclave.number} is described before enclave {len(enclaves)}"
                    )
                enclaves[enclave.number : enclave.number + 1] = [enclave]
            if message.records:
                self._ends = (message.place if not records else self._ends[0], message.place)
            records += message.records
        info = replace(info, late_intervals=late_intervals, user_ns=user_ns)
        return replace(info, enclaves=tuple(enclaves)), records

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, pa.ArrowException) as error:
            raise SoftSgxError(
                f"{self._name}: not a trace, or damaged: {first_line(error)}; record it again"
            ) from error
        except OSError as error:
            raise SoftSgxError(f"{self._name}: {error.strerror or first_line(error)}") from error


def _described(first: Message | None) -> TraceInfo:
    if first is None or first.kind is not Kind.SCHEMA:
        raise Damaged("no schema at the beginning")
    found = pa.ipc.read_schema(pa.ipc.read_message(first.data))
    text = (found.metadata or {}).get(TRACE_KEY.encode())
    if text is None:
        raise Damaged(f"no {TRACE_KEY} in the metadata of the schema")
    info = read_trace_text(text)
    wanted = schema(version=info.version)
    if not found.equals(wanted):
        raise Damaged(f"its columns are not {', '.join(wanted.names)} of the right types")
    return info


def _decoded(message: Message, sizes: NDArray[np.uint64], version: int) -> Chunk:
    """Return the records of a batch.

    Args:
        message: the batch.
        sizes: pages of each enclave.
        version: of the format.
    """
    if message.decoded_bytes > _MOST_BUFFER_BYTES:
        raise Damaged(f"a batch with a buffer of {message.decoded_bytes} bytes")
    batch = pa.ipc.read_record_batch(pa.ipc.read_message(message.data), schema(version=version))
    batch.validate(full=True)
    if batch.num_rows != message.records or any(column.null_count for column in batch.columns):
        raise Damaged("a batch with missing values")
    enclaves, pages, events, deltas = (
        column.to_numpy(zero_copy_only=False) for column in batch.columns
    )
    events = events.astype(np.uint8, copy=False)  # version 1 has booleans: a write or a read
    if events.max() > max(Event):
        raise Damaged(f"an event {events.max()}; the largest is {max(Event)}")
    if enclaves.max() >= len(sizes):
        raise Damaged("a record of an enclave that is not described")
    if (pages[events == Event.ENDED] != 0).any():
        raise Damaged("the end of an enclave has a page")
    if ((pages >= sizes[enclaves]) & (events != Event.ENDED)).any():
        raise Damaged("a page outside its enclave")
    start_ns, *_ = read_batch_text(message.metadata[BATCH_KEY.encode()])
    times = np.cumsum(deltas, dtype=np.uint64) + np.uint64(start_ns)
    return Chunk(enclaves, pages, events, times)
