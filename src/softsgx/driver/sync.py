"""Reader-writer locks and SRCU, built on the locks of a runtime.

If the runtime does not interleave tasks, no other task runs between two statements, so a reader
counts itself in and out without taking a lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from softsgx.compiled import record
from softsgx.runtime import Runtime

__all__ = ["RwLock", "Srcu"]


class _Reading:
    """Holds an :class:`RwLock` for reading; all readers share one object."""

    __slots__ = ("_acquire", "_release")

    def __init__(self, lock: RwLock) -> None:
        self._acquire, self._release = lock.acquire_read, lock.release_read

    def __enter__(self) -> None:
        self._acquire()

    def __exit__(self, *_error: object) -> None:
        self._release()


@record
class RwLock:
    """A sleeping reader-writer lock; readers may nest: they never wait for a waiting writer.

    Attributes:
        has_writer: whether a writer holds it.
    """

    __slots__ = (
        "_changed",
        "_lock",
        "_readers",
        "_reading",
        "_uninterleaved",
        "_waiting",
        "has_writer",
    )

    def __init__(self, runtime: Runtime, name: str) -> None:
        self._lock = runtime.lock(name)
        self._changed = runtime.condition(self._lock)
        self._uninterleaved = not runtime.interleaves
        self._readers = 0
        self.has_writer = False
        self._waiting = 0
        self._reading = _Reading(self)

    def acquire_read(self) -> None:
        """Wait until no writer holds it, then hold it with other readers."""
        if self._uninterleaved and not self.has_writer:
            self._readers += 1
            return
        with self._lock:
            while self.has_writer:
                self._wait()
            self._readers += 1

    def release_read(self) -> None:
        """Release it as a reader."""
        assert self._readers, f"{self._lock.name} has no reader"
        if self._uninterleaved and not self._waiting:
            self._readers -= 1
            return
        with self._lock:
            self._readers -= 1
            if not self._readers:
                self._changed.notify_all()

    def _wait(self) -> None:
        self._waiting += 1
        self._changed.wait()
        self._waiting -= 1

    def reading(self) -> _Reading:
        """Hold it with other readers."""
        return self._reading

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold it alone."""
        with self._lock:
            while self.has_writer or self._readers:
                self._wait()
            self.has_writer = True
        try:
            yield
        finally:
            with self._lock:
                self.has_writer = False
                self._changed.notify_all()

    def held(self) -> bool:
        """Return whether a task holds it: for assertions only."""
        return self.has_writer or bool(self._readers)


class Srcu:
    """Sleepable read-copy-update: a writer that has unlinked an entry waits for old readers.

    It has two counters of readers; :meth:`synchronize` makes new readers use the other one, and
    waits until the old one is 0.
    """

    __slots__ = (
        "_drained",
        "_gone",
        "_index",
        "_lock",
        "_readers",
        "_turn",
        "_turning",
        "_uninterleaved",
    )

    def __init__(self, runtime: Runtime, name: str) -> None:
        self._lock = runtime.lock(name)
        self._drained = runtime.condition(self._lock)
        self._turn = runtime.lock(f"{name} grace period")
        self._uninterleaved = not runtime.interleaves
        self._readers = [0, 0]
        self._index = 0
        self._turning = self._gone = False

    def enter(self) -> int:
        """Begin to read; pass the result to :meth:`leave`."""
        if self._uninterleaved and not self._gone:
            self._readers[self._index] += 1
            return self._index
        with self._lock:
            assert not self._gone, "SRCU read side after cleanup"
            self._readers[self._index] += 1
            return self._index

    def leave(self, index: int) -> None:
        """End reading."""
        if self._uninterleaved and not self._turning:
            self._readers[index] -= 1
            return
        with self._lock:
            self._readers[index] -= 1
            if not self._readers[index]:
                self._drained.notify_all()

    def synchronize(self) -> None:
        """Wait for every reader that entered before this call."""
        with self._turn, self._lock:
            assert not self._gone, "SRCU used after cleanup"
            old, self._index = self._index, 1 - self._index
            self._turning = True
            while self._readers[old]:
                self._drained.wait()
            self._turning = False
            assert not self._gone, "SRCU cleaned up during a grace period"

    def cleanup(self) -> None:
        """End its use: the owner is destroyed, and all readers have left."""
        assert not any(self._readers), "SRCU cleaned up with readers"
        assert not self._turn.held(), "SRCU cleaned up during a grace period"
        self._gone = True
