"""The messages of an Arrow IPC stream, and how much memory each needs, before it is decoded.

A compressed buffer begins with its decompressed length, which a decoder allocates without a check.
So this module reads these lengths, for a comparison with a limit.  It reads only the fields that
it needs; pyarrow checks and decodes the message.

Source:
    Apache Arrow, "Columnar format", sections "Encapsulated message format" and "Compression";
    Message.fbs.  FlatBuffers, "FlatBuffer internals".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import BinaryIO

__all__ = ["CONTINUATION", "Damaged", "Kind", "Message", "messages"]

CONTINUATION = b"\xff\xff\xff\xff"
"""First bytes of each message, and therefore of a stream."""
_PREFIX_BYTES = 8  # CONTINUATION and the size of the header
_MOST_BODY_BYTES = 1 << 26
_MOST_ITEMS = 64  # of a list in a header
_UNCOMPRESSED = -1


class Damaged(ValueError):
    """The file is not a stream, or it was changed after it was written; the text says how."""


class Kind(IntEnum):
    """Kinds of messages in a trace: the end of the stream, and members of ``MessageHeader``."""

    END = 0
    SCHEMA = 1
    BATCH = 3


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Attributes:
        kind: what it is.
        data: its bytes, for pyarrow.
        metadata: of the message; a schema's own metadata is within the schema.
        records: how many a batch has.
        decoded_bytes: decompressed length of the longest buffer of a batch.
        place: the byte of the file where it begins.
    """

    kind: Kind
    data: bytes = b""
    metadata: Mapping[bytes, bytes] = field(default_factory=dict)
    records: int = 0
    decoded_bytes: int = 0
    place: int = 0


def messages(file: BinaryIO, end: int, *, bodies: bool = True, start: int = 0) -> Iterator[Message]:
    """Yield the complete messages of a stream, and its end if that is marked.

    Args:
        file: the stream starts at offset 0.
        end: size of the file in bytes; bytes that are appended later are not read.
        bodies: read bodies too; without them, ``data`` and ``decoded_bytes`` of a batch lack them.
        start: where to begin, 0 or the ``place`` of a message.

    Raises:
        Damaged: this is not an Arrow stream.
        OSError: the file cannot be read.
    """
    at = start
    while at + _PREFIX_BYTES <= end:
        file.seek(at)  # each time: another iteration may use the same file
        prefix = file.read(_PREFIX_BYTES)
        if prefix[:4] != CONTINUATION[: len(prefix)]:
            raise Damaged(f"no message of an Arrow stream at byte {at}")
        at += _PREFIX_BYTES
        header_bytes = int.from_bytes(prefix[4:], "little")
        if header_bytes == 0:
            if at != end:
                raise Damaged(f"{end - at} bytes after the end of the stream")
            yield Message(Kind.END)
            return
        if at + header_bytes > end:
            return
        header = file.read(header_bytes)
        try:
            table = _Table.root(header)
            body_bytes = table.integer(3, "<q")
            if not 0 <= body_bytes <= _MOST_BODY_BYTES:
                raise Damaged(f"a body of {body_bytes} bytes at byte {at}")
            at += header_bytes + body_bytes
            if at > end:
                return
            body = file.read(body_bytes) if bodies else b""
            place = at - header_bytes - body_bytes - _PREFIX_BYTES
            message = replace(_message(prefix + header + body, table, body), place=place)
        except struct.error as error:
            raise Damaged(f"a damaged header before byte {at}") from error
        yield message


def _message(data: bytes, table: _Table, body: bytes) -> Message:
    metadata = {pair.string(0): pair.string(1) for pair in table.tables(4)}
    kind = table.integer(1, "<B")
    if kind == Kind.SCHEMA:
        return Message(Kind.SCHEMA, data, metadata)
    if kind != Kind.BATCH:
        raise Damaged(f"a message of kind {kind}; a trace has a schema and batches of records")
    batch = table.table(2)
    compressed = batch.has(3)
    decoded = max(
        (_decoded_bytes(body, *place) if compressed else place[1] for place in batch.pairs(2)),
        default=0,
    )
    return Message(Kind.BATCH, data, metadata, batch.integer(0, "<q"), decoded)


def _decoded_bytes(body: bytes, offset: int, length: int) -> int:
    """Return the decompressed length of a compressed buffer."""
    if offset < 0 or len(prefix := body[offset : offset + 8]) < 8:
        return length  # empty, or outside the body, which pyarrow refuses
    claimed = int.from_bytes(prefix, "little", signed=True)
    if claimed < _UNCOMPRESSED:
        raise Damaged(f"a buffer of {claimed} bytes")
    return length if claimed == _UNCOMPRESSED else claimed


@dataclass(frozen=True, slots=True)
class _Table:
    """A table of a FlatBuffer; fields are named by their numbers in the schema.

    A position outside the buffer raises ``struct.error``.
    """

    data: bytes
    at: int

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, _unpack("<I", data, 0))

    def has(self, field: int) -> bool:
        return self._place(field) is not None

    def integer(self, field: int, code: str) -> int:
        """Return a number; an absent one is 0, the default of all fields that are read here."""
        place = self._place(field)
        return 0 if place is None else _unpack(code, self.data, place)

    def table(self, field: int) -> _Table:
        """Return a table; the field must be present."""
        return _Table(self.data, self._target(field))

    def tables(self, field: int) -> list[_Table]:
        """Return a vector of tables, empty if it is absent."""
        places = self._vector(field, 4)
        return [_Table(self.data, place + _unpack("<I", self.data, place)) for place in places]

    def pairs(self, field: int) -> list[tuple[int, int]]:
        """Return a vector of structures of two 64-bit numbers, empty if it is absent."""
        return [
            (_unpack("<q", self.data, place), _unpack("<q", self.data, place + 8))
            for place in self._vector(field, 16)
        ]

    def string(self, field: int) -> bytes:
        """Return a string; the field must be present."""
        at = self._target(field)
        size = _unpack("<I", self.data, at)
        return self.data[at + 4 : at + 4 + size]

    def _vector(self, field: int, item_bytes: int) -> range:
        if not self.has(field):
            return range(0)
        at = self._target(field)
        count = _unpack("<I", self.data, at)
        if count > _MOST_ITEMS:
            raise Damaged(f"a header with a list of {count} items")
        return range(at + 4, at + 4 + count * item_bytes, item_bytes)

    def _target(self, field: int) -> int:
        place = self._place(field)
        if place is None:
            raise Damaged(f"a header without field {field}")
        return place + _unpack("<I", self.data, place)

    def _place(self, field: int) -> int | None:
        """Return the position of a field, from the vtable; ``None``: it is absent."""
        vtable = self.at - _unpack("<i", self.data, self.at)
        if 4 + 2 * field >= _unpack("<H", self.data, vtable):
            return None
        offset = _unpack("<H", self.data, vtable + 4 + 2 * field)
        return self.at + offset if offset else None


def _unpack(code: str, data: bytes, at: int) -> int:
    if at < 0:
        raise struct.error("a position before the buffer")
    number: int = struct.unpack_from(code, data, at)[0]
    return number
