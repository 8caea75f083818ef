"""Page numbers of all accesses, which are read several times: in memory, or in a temporary file.

Accesses take as few bytes as their largest number allows.  What exceeds ``MEMORY_BYTES`` is in a
file without a name in the directory for temporary files (``TMPDIR``), so that memory does not grow
with the length of a trace.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np

from softsgx.errors import SoftSgxError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PART_NUMBERS", "Parts", "Spool"]

PART_NUMBERS = 1 << 20
"""How many numbers an array has that is read back; the last one of a spool may have fewer."""
MEMORY_BYTES = 1 << 26


class Parts(Protocol):
    """Numbers in arrays that can be iterated both ways."""

    def __iter__(self) -> Iterator[NDArray[np.uint32]]:
        """Yield the arrays in order."""

    def __reversed__(self) -> Iterator[NDArray[np.uint32]]:
        """Yield the same arrays, the last one first."""


class Spool:
    """Numbers that are appended, and then read any number of times in both directions."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(MEMORY_BYTES)  # noqa: SIM115 - see below
        weakref.finalize(self, self._file.close)
        self._gathered: list[NDArray[np.uint32]] = []
        self._gathered_numbers = 0
        self._places: list[tuple[int, int, np.dtype[np.unsignedinteger]]] = []
        self._end = 0
        self._numbers = 0

    def __len__(self) -> int:
        """Return how many numbers there are."""
        return self._numbers

    def append(self, numbers: NDArray[np.uint32]) -> None:
        """Append numbers.

        Raises:
            SoftSgxError: the temporary file cannot be written.
        """
        self._numbers += len(numbers)
        self._gathered.append(numbers)
        self._gathered_numbers += len(numbers)
        if self._gathered_numbers >= PART_NUMBERS:
            every = np.concatenate(self._gathered)
            whole = len(every) // PART_NUMBERS * PART_NUMBERS
            for first in range(0, whole, PART_NUMBERS):
                self.append_part(every[first : first + PART_NUMBERS])
            self._gathered = [every[whole:].copy()]
            self._gathered_numbers = len(every) - whole

    def append_part(self, numbers: NDArray[np.uint32]) -> None:
        """Append numbers that are read back as one array; not after :meth:`append`."""
        kind = np.min_scalar_type(int(numbers.max(initial=0)))
        with self._errors():
            self._file.seek(self._end)
            self._file.write(numbers.astype(kind).tobytes())
        self._places.append((self._end, len(numbers), kind))
        self._end += len(numbers) * kind.itemsize

    def __iter__(self) -> Iterator[NDArray[np.uint32]]:
        """Yield all numbers in the order in which they were appended."""
        self._finish()
        return map(self._read, range(len(self._places)))

    def __reversed__(self) -> Iterator[NDArray[np.uint32]]:
        """Yield the arrays of :meth:`__iter__`, the last one first."""
        self._finish()
        return map(self._read, reversed(range(len(self._places))))

    def _finish(self) -> None:
        if self._gathered_numbers:
            self.append_part(np.concatenate(self._gathered))
        self._gathered, self._gathered_numbers = [], 0

    def _read(self, at: int) -> NDArray[np.uint32]:
        place, count, kind = self._places[at]
        with self._errors():
            self._file.seek(place)
            data = self._file.read(count * kind.itemsize)
        return np.frombuffer(data, kind).astype(np.uint32)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SoftSgxError(
                f"{tempfile.gettempdir()}: {error.strerror or error}; "
                "set TMPDIR to a directory with more room"
            ) from error
