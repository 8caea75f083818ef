"""Accesses as libCacheSim's oracleGeneral: binary records of time, object, size, next access.

Each object is one page, of any size.  The format has no signature, and does not record writes.

Source:
    libCacheSim, doc/trace format "oracleGeneral": little-endian u32 seconds, u64 object, u32 size,
    i64 next access.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from softsgx.accesses.arrow import np
from softsgx.accesses.source import BLOCK_RECORDS, Block, Source
from softsgx.errors import SoftSgxError

__all__ = ["open_oracle_general"]

_RECORD = np.dtype([("seconds", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next", "<i8")])
_NS = np.uint64(10**9)


def open_oracle_general(file: BinaryIO, name: str) -> Source:
    """Open binary records.

    Args:
        file: at the first record.
        name: its name in messages.
    """
    return Source(_blocks(file, name), timed=True)


def _blocks(file: BinaryIO, name: str) -> Iterator[Block]:
    while data := file.read(BLOCK_RECORDS * _RECORD.itemsize):
        if len(data) % _RECORD.itemsize:
            raise SoftSgxError(
                f"{name}: its size is no multiple of {_RECORD.itemsize} bytes, so it is cut short "
                "or not oracleGeneral; copy it again, or give its format"
            )
        records = np.frombuffer(data, _RECORD)
        writes = np.zeros(len(records), np.bool)
        yield Block(records["object"].copy(), writes, records["seconds"].astype(np.uint64) * _NS)
