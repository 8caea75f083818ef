"""Untrusted bytes: every read is bounded, every error names file, offset and value."""

from __future__ import annotations

import os
import stat
import struct
from typing import TypeVar

from softsgx.errors import SoftSgxError
from softsgx.layout import Structure

__all__ = ["MAX_FILE_BYTES", "Bytes", "read_bytes"]

MAX_FILE_BYTES = 4 << 30

S = TypeVar("S", bound=Structure)


class Bytes:
    """A file's contents, or part of them, under the file's name.

    Attributes:
        name: its name in messages.
        view: the bytes, read-only.
        origin: where ``view`` begins in the file; messages give offsets in the file.
    """

    def __init__(self, name: str, data: bytes | bytearray | memoryview, *, origin: int = 0) -> None:
        self.name, self.origin = name, origin
        self.view = memoryview(data).cast("B").toreadonly()

    def __len__(self) -> int:
        return self.view.nbytes

    def bad(self, offset: int, what: str, remedy: str = "the file is damaged") -> SoftSgxError:
        """Return the error for ``what`` at ``offset``."""
        return SoftSgxError(f"{self.name}: offset {self.origin + offset:#x}: {what}; {remedy}")

    def take(self, offset: int, size: int, what: str) -> memoryview:
        """Return ``size`` bytes at ``offset``; errors name them ``what``."""
        if offset < 0 or size < 0 or offset + size > len(self):
            raise self.bad(
                offset,
                f"{what} takes {size} bytes, but there are {len(self)} in all",
                "the file is cut short or damaged",
            )
        return self.view[offset : offset + size]

    def part(self, offset: int, size: int, what: str) -> Bytes:
        """Return the bytes as a binary stream."""
        return Bytes(self.name, self.take(offset, size, what), origin=self.origin + offset)

    def u32(self, offset: int, what: str) -> int:
        """Return the little-endian 32-bit number at ``offset``."""
        value: int = struct.unpack("<I", self.take(offset, 4, what))[0]
        return value

    def u64(self, offset: int, what: str) -> int:
        """Return the little-endian 64-bit number at ``offset``."""
        value: int = struct.unpack("<Q", self.take(offset, 8, what))[0]
        return value

    def structure(self, kind: type[S], offset: int, what: str) -> S:
        """Return the declared structure at ``offset``."""
        return kind.unpack(self.take(offset, kind.SIZE, what))


def read_bytes(path: str | os.PathLike[str]) -> Bytes:
    """Read a whole regular file.

    Raises:
        SoftSgxError: it cannot be read, is no regular file, or is larger than 4 GiB.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb", opener=_without_blocking) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise SoftSgxError(f"{name}: not a regular file; give the enclave file itself")
            if status.st_size > MAX_FILE_BYTES:
                raise SoftSgxError(
                    f"{name}: {status.st_size} bytes, more than the {MAX_FILE_BYTES} that an "
                    "enclave file may have here; is this the right file?"
                )
            return Bytes(name, file.read(MAX_FILE_BYTES))
    except OSError as error:
        raise SoftSgxError(f"{name}: {error.strerror or error}") from error


def _without_blocking(path: str, flags: int) -> int:
    """Open without waiting: the caller refuses a FIFO, which could otherwise block the open."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
