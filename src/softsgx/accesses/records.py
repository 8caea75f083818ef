"""Accesses in memory, as numpy arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from softsgx.accesses.arrow import np
from softsgx.accesses.description import PAGE_BYTES, VERSION, Event, TracedEnclave, TraceInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Chunk", "Trace"]


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Records in order of time: four arrays of one length.

    Attributes:
        enclaves: uint16, the enclave's number.
        pages: uint32, the page's number in the enclave.
        events: uint8, what happens, see :class:`Event`.
        times_ns: uint64; see :attr:`TraceInfo.timed`.
    """

    enclaves: NDArray[np.uint16]
    pages: NDArray[np.uint32]
    events: NDArray[np.uint8]
    times_ns: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.pages)

    def __getitem__(self, part: slice) -> Chunk:
        return Chunk(self.enclaves[part], self.pages[part], self.events[part], self.times_ns[part])

    @property
    def writes(self) -> NDArray[np.bool]:
        """Which records are accesses that write."""
        writes: NDArray[np.bool] = self.events == Event.WRITE
        return writes

    @property
    def accesses(self) -> Chunk:
        """The accesses, without records of removed pages and ended enclaves."""
        which = self.events <= Event.WRITE
        if which.all():
            return self
        return Chunk(
            self.enclaves[which], self.pages[which], self.events[which], self.times_ns[which]
        )

    @property
    def keys(self) -> NDArray[np.uint64]:
        """One number for each page of all enclaves: ``enclave << 32 | page``."""
        return self.enclaves.astype(np.uint64) << np.uint64(32) | self.pages

    @classmethod
    def joined(cls, chunks: Iterable[Chunk]) -> Chunk:
        """Return the accesses of several chunks as one."""
        parts = list(chunks)
        if not parts:
            return _EMPTY
        return cls(
            np.concatenate([part.enclaves for part in parts]),
            np.concatenate([part.pages for part in parts]),
            np.concatenate([part.events for part in parts]),
            np.concatenate([part.times_ns for part in parts]),
        )


_EMPTY = Chunk(
    np.empty(0, np.uint16), np.empty(0, np.uint32), np.empty(0, np.uint8), np.empty(0, np.uint64)
)


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """A whole trace in memory, 15 bytes a record.

    Attributes:
        info: the description of the trace.
        records: all of them.
    """

    info: TraceInfo
    records: Chunk

    @classmethod
    def of(cls, accesses: Iterable[tuple[int, bool]], program: str = "") -> Trace:
        """Return a trace of ``(page, write)`` pairs of one enclave; times count accesses."""
        pairs = list(accesses)
        pages = np.array([page for page, _ in pairs], np.uint32)
        range_pages = int(pages.max()) + 1 if len(pages) else 0
        info = TraceInfo(
            version=VERSION,
            precision="accesses",
            interval_ns=0,
            epc_pages=0,
            program=program,
            page_bytes=PAGE_BYTES,
            timed=False,
            enclaves=(TracedEnclave(0, program, range_pages, 0),),
            complete=True,
        )
        chunk = Chunk(
            np.zeros(len(pairs), np.uint16),
            pages,
            np.array([write for _, write in pairs], np.uint8),
            np.arange(len(pairs), dtype=np.uint64),
        )
        return cls(info, chunk)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, part: slice) -> Trace:
        return Trace(self.info, self.records[part])

    @property
    def accesses(self) -> Chunk:
        """The accesses, without records of removed pages and ended enclaves."""
        return self.records.accesses

    def span_ns(self) -> tuple[int, int]:
        """Return the times of the first and the last record, 0 and 0 without any."""
        times = self.records.times_ns
        return (int(times[0]), int(times[-1])) if len(times) else (0, 0)

    @property
    def used_pages(self) -> int:
        """Number of different pages that are used."""
        return self.dense()[1]

    def dense(self) -> tuple[NDArray[np.uint32], int]:
        """Number the pages that are used.

        Returns:
            For each access the number of its page, from 0 in order of (enclave, page); and how
            many pages there are.
        """
        used, numbers = np.unique(self.accesses.keys, return_inverse=True)
        return numbers.astype(np.uint32), len(used)
