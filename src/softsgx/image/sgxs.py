"""SGXS streams: the measured records of an enclave in the order of the hash.

The SHA-256 of a plain stream is its MRENCLAVE.  The reader therefore refuses a stream that is not
canonical: the loaded enclave would have another hash.

Source:
    Fortanix SGXS tools, the format's description and its reader.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from softsgx.arch import (
    CHUNK_BYTES,
    CHUNKS_PER_PAGE,
    PAGE_BYTES,
    PageType,
    SecInfoFlags,
    eadd_block,
    ecreate_block,
    eextend_block,
)
from softsgx.errors import SoftSgxError
from softsgx.image._file import Bytes
from softsgx.image.enclave import EnclaveImage, plan_of
from softsgx.image.plan import ZERO, Data, Plan, Run

__all__ = ["SGXS_MAGICS", "read_sgxs", "write_sgxs"]

_ECREATE, _UNSIZED = b"ECREATE\0", b"UNSIZED\0"
_EADD, _EEXTEND, _UNMEASRD = b"EADD\0\0\0\0", b"EEXTEND\0", b"UNMEASRD"
SGXS_MAGICS = (_ECREATE, _UNSIZED)
_HEADER_BYTES = 64
_ZERO_PAGE = bytes(PAGE_BYTES)
_ZERO_CHUNK = bytes(CHUNK_BYTES)


@dataclass(slots=True)
class _Pages:
    """A run while it grows."""

    offset: int
    flags: int
    mask: int
    data: bytearray | None
    pages: int

    def run(self) -> Run:
        label = "TCS" if self.flags >> 8 == PageType.TCS else ""
        source = ZERO if self.data is None else Data(memoryview(bytes(self.data)))
        return Run(self.offset, self.pages, self.flags, source, self.mask, label)


@dataclass(slots=True)
class _Page:
    """One page while its chunks arrive."""

    offset: int
    flags: int
    at: int
    data: bytearray | None = None
    mask: int = 0
    seen: int = 0


@dataclass(slots=True)
class _Builder:
    """Collects pages into runs.

    Attributes:
        patch: bytes to write over the enclave's memory, and where.
    """

    patch: bytes = b""
    patch_at: int = 0
    page: _Page | None = None
    runs: list[_Pages] = field(default_factory=list)

    def close_page(self) -> None:
        """Append the page to the last run, or begin one with it."""
        page = self.page
        if page is None:
            return
        self._patch(page)
        data = None if page.data is None or page.data == _ZERO_PAGE else page.data
        last = self.runs[-1] if self.runs else None
        if (
            last is not None
            and last.offset + last.pages * PAGE_BYTES == page.offset
            and (last.flags, last.mask) == (page.flags, page.mask)
            and (last.data is None) == (data is None)
        ):
            last.pages += 1
            if last.data is not None and data is not None:
                last.data += data
        else:
            self.runs.append(_Pages(page.offset, page.flags, page.mask, data, 1))
        self.page = None

    def _patch(self, page: _Page) -> None:
        for nth, byte in enumerate(self.patch):
            at = self.patch_at + nth - page.offset
            if 0 <= at < PAGE_BYTES:
                if page.data is None:
                    page.data = bytearray(PAGE_BYTES)
                page.data[at] = byte


def read_sgxs(file: Bytes, *, size: int | None = None) -> EnclaveImage:
    """Read a canonical stream.

    Args:
        file: the stream.
        size: SECS.SIZE for an UNSIZED stream; the reader writes it into the enclave's memory at the
            place that the stream names.

    Raises:
        SoftSgxError: the stream is not canonical, or its size is open and none was given.
    """
    ssa_frame_size, secs_size, builder = _read_first(file, size)
    at = _HEADER_BYTES
    previous = -1
    while at < len(file):
        record = file.take(at, _HEADER_BYTES, "record")
        tag = bytes(record[:8])
        if tag == _EADD:
            builder.close_page()
            builder.page = _read_eadd(file, at, record, previous)
            previous = builder.page.offset
            at += _HEADER_BYTES
        elif tag in (_EEXTEND, _UNMEASRD):
            _read_chunk(file, at, record, builder.page, measured=tag == _EEXTEND)
            at += _HEADER_BYTES + CHUNK_BYTES
        elif tag in SGXS_MAGICS:
            raise file.bad(at, f"a second {_text(tag)}", "a stream has one, at its start")
        else:
            raise file.bad(at, f"record tag {tag.hex()}", "not a record of SGXS")
    builder.close_page()
    plan = plan_of(
        file.name, secs_size, [r.run() for r in builder.runs], ssa_frame_size=ssa_frame_size
    )
    return EnclaveImage(file.name, "sgxs", plan)


def _read_first(file: Bytes, size: int | None) -> tuple[int, int, _Builder]:
    """Return SSAFRAMESIZE, SIZE and an empty builder."""
    record = file.take(0, _HEADER_BYTES, "first record")
    tag, ssa_frame_size, value = struct.unpack_from("<8sIQ", record)
    if tag not in SGXS_MAGICS:
        raise file.bad(0, f"record tag {tag.hex()}", "SGXS begins with ECREATE or UNSIZED")
    _require_zero(file, 0, record, 20)
    if tag == _ECREATE:
        return ssa_frame_size, value, _Builder()
    if size is None:
        raise file.bad(
            0,
            "an UNSIZED stream has no enclave size, so neither measurement nor SECS",
            "give the size it is to have",
        )
    return ssa_frame_size, size, _Builder(struct.pack("<Q", size), value)


def _read_eadd(file: Bytes, at: int, record: memoryview, previous: int) -> _Page:
    offset, flags = struct.unpack_from("<QQ", record, 8)
    _require_zero(file, at, record, 24)
    if offset % PAGE_BYTES:
        raise file.bad(at + 8, f"EADD at {offset:#x}", "pages are 4096-byte aligned")
    if offset <= previous:
        raise file.bad(at + 8, f"EADD at {offset:#x} after {previous:#x}", "canonical streams rise")
    if flags >> 8 & 0xFF == PageType.TCS and flags & SecInfoFlags.RWX:
        raise file.bad(at + 16, f"TCS with SECINFO flags {flags:#x}", "a TCS has no R, W or X")
    return _Page(offset, flags, at)


def _read_chunk(
    file: Bytes, at: int, record: memoryview, page: _Page | None, *, measured: bool
) -> None:
    offset: int = struct.unpack_from("<Q", record, 8)[0]
    _require_zero(file, at, record, 16)
    data = file.take(at + _HEADER_BYTES, CHUNK_BYTES, "chunk")
    what = f"chunk at {offset:#x}"
    if offset % CHUNK_BYTES:
        raise file.bad(at + 8, what, "chunks are 256-byte aligned")
    if page is None or not page.offset <= offset < page.offset + PAGE_BYTES:
        raise file.bad(at + 8, what, "chunks belong to the page added last")
    bit = 1 << (offset - page.offset) // CHUNK_BYTES
    if page.seen & bit:
        raise file.bad(at + 8, f"{what} comes twice", "each chunk comes once")
    if measured and page.mask >= bit:
        raise file.bad(
            at + 8,
            f"{what} behind a later one",
            "loading measures chunks in ascending order, so the hash would differ",
        )
    page.seen |= bit
    page.mask |= bit if measured else 0
    if page.data is None:
        page.data = bytearray(PAGE_BYTES)
    start = offset - page.offset
    page.data[start : start + CHUNK_BYTES] = data


def _require_zero(file: Bytes, at: int, record: memoryview, start: int) -> None:
    """Refuse bytes other than zero where the instruction hashes zeros."""
    rest = bytes(record[start:])
    if any(rest):
        raise file.bad(at + start, f"reserved bytes {rest.hex()}", "they are hashed as zero")


def write_sgxs(plan: Plan) -> Iterator[bytes]:
    """Yield the stream of ``plan``, a page at a time; unmeasured bytes go into UNMEASRD records.

    Raises:
        SoftSgxError: the plan's pages are not in rising order, as a canonical stream needs them.
    """
    for before, after in zip(plan.runs, plan.runs[1:], strict=False):
        if after.offset < before.end:
            raise SoftSgxError(
                f"plan: pages at {after.offset:#x} come after those at {before.offset:#x}; "
                "canonical SGXS needs them in rising order"
            )
    yield ecreate_block(plan.ssa_frame_size, plan.size)
    for page in plan.pages():
        records = [eadd_block(page.offset, page.flags)]
        for chunk in range(CHUNKS_PER_PAGE):
            at = chunk * CHUNK_BYTES
            data = bytes(page.data[at : at + CHUNK_BYTES])
            if page.mask >> chunk & 1:
                records += [eextend_block(page.offset + at), data]
            elif data != _ZERO_CHUNK:
                records += [struct.pack("<8sQ48x", _UNMEASRD, page.offset + at), data]
        yield b"".join(records)


def _text(tag: bytes) -> str:
    return tag.rstrip(b"\0").decode("ascii")
