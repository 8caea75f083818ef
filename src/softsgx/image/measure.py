"""MRENCLAVE of a build plan, almost as fast as SHA-256 itself.

The digest covers, for each page, an EADD block and for each measured chunk an EEXTEND block and its
256 bytes.  Headers differ only in their offsets, so a batch of pages has one template whose offsets
are patched with strided writes; a run of equal pages is hashed from the template alone.

Source:
    SDM vol. 3D, "ECREATE", "EADD", "EEXTEND", "EINIT", Operation.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from typing import Final

from softsgx.arch import (
    CHUNK_BYTES,
    CHUNKS_PER_PAGE,
    PAGE_BYTES,
    eadd_block,
    ecreate_block,
    eextend_block,
)
from softsgx.errors import SoftSgxError
from softsgx.image.plan import Data, Plan, Run

__all__ = ["MEASURE_LIMIT_BYTES", "hashed_bytes", "measure", "same_measurement"]

MEASURE_LIMIT_BYTES: Final = 1 << 37
"""The default limit of what ``measure`` hashes: about two minutes of work."""

_BLOCK = 64
_PROGRESS_BYTES = 64 << 20
_BATCH_PAGES = 64
_BARE_BATCH_PAGES = 1024  # pages without a measured chunk are one block each
_U64 = 8


def hashed_bytes(plan: Plan) -> int:
    """Return how many bytes the digest covers, without producing them."""
    per_run = (run.pages * (_BLOCK + _chunk_bytes(run.mask)) for run in plan.runs)
    return _BLOCK + sum(per_run)


def same_measurement(one: Plan, other: Plan, *, limit_bytes: int = MEASURE_LIMIT_BYTES) -> bool:
    """Return whether two plans have the same MRENCLAVE; equal plans are not hashed.

    Raises:
        SoftSgxError: they differ, and one asks for more hashing than ``limit_bytes``.
    """
    if one == other:
        return True
    return measure(one, limit_bytes=limit_bytes) == measure(other, limit_bytes=limit_bytes)


def measure(
    plan: Plan,
    *,
    limit_bytes: int = MEASURE_LIMIT_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> bytes:
    """Return the MRENCLAVE that building ``plan`` gives.

    Args:
        plan: the enclave.
        limit_bytes: the most bytes to hash; a small file can ask for terabytes.
        progress: called about every 64 MiB with the number of bytes hashed and of all bytes.

    Raises:
        SoftSgxError: the plan asks for more hashing than ``limit_bytes``.
    """
    asked = hashed_bytes(plan)
    if asked > limit_bytes:
        raise SoftSgxError(
            f"plan: measuring {plan.page_count} pages means hashing {asked} bytes, more than the "
            f"limit of {limit_bytes}; raise it with --limit, or measure(limit_bytes=…)"
        )
    digest = hashlib.sha256(ecreate_block(plan.ssa_frame_size, plan.size))
    done = told = 0
    for run in plan.runs:
        for piece in _batches(run):
            digest.update(piece)
            done += memoryview(piece).nbytes
            if progress is not None and done - told >= _PROGRESS_BYTES:
                progress(done, asked)
                told = done
    return digest.digest()


def _chunk_bytes(mask: int) -> int:
    return mask.bit_count() * (_BLOCK + CHUNK_BYTES)


class _Template:
    """The digest's input for a batch of pages, whose offsets are patched for each batch.

    Attributes:
        words: per page one EADD block, then for each measured chunk an EEXTEND block and, in runs
            of equal pages, its bytes.
        chunks: the indices of the measured chunks.
        page_bytes: the part of ``words`` that belongs to one page.
    """

    def __init__(self, run: Run, pages: int) -> None:
        self._run, self._pages = run, pages
        self.chunks = [i for i in range(CHUNKS_PER_PAGE) if run.mask >> i & 1]
        data = b"" if isinstance(run.source, Data) else run.source.page(0)
        page, self._at = eadd_block(0, run.flags), [0]
        for i in self.chunks:
            self._at.append(len(page))
            page += eextend_block(0) + data[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES]
        self.page_bytes = len(page)
        self.words = array("Q", page * pages)

    def move_to(self, first_page: int) -> None:
        """Write the offsets of the pages from ``first_page`` of the run on."""
        start = self._run.offset + first_page * PAGE_BYTES
        span = self._pages * PAGE_BYTES
        stride = self.page_bytes // _U64
        for at, chunk in zip(self._at, [0, *self.chunks], strict=True):
            first = start + chunk * CHUNK_BYTES
            offsets = array("Q", range(first, first + span, PAGE_BYTES))
            self.words[at // _U64 + 1 :: stride] = offsets


def _batches(run: Run) -> Iterator[array[int] | bytes]:
    """Yield the digest's input for ``run``, a batch of pages at a time."""
    if run.pages == 1:  # making a template would cost more than hashing the page
        yield _one_page(run)
        return
    batch = _BATCH_PAGES if run.mask else _BARE_BATCH_PAGES
    done = 0
    while done < run.pages:
        pages = min(batch, run.pages - done)
        end = done + (run.pages - done) // pages * pages
        if run.mask and isinstance(run.source, Data):
            yield from _joined(run, run.source.view, range(done, end, pages))
        else:
            yield from _patched(run, range(done, end, pages))
        done = end


def _one_page(run: Run) -> bytes:
    pieces: list[bytes | memoryview] = [eadd_block(run.offset, run.flags)]
    data = run.source.page(0) if run.mask else b""
    for at in range(0, len(data), CHUNK_BYTES):
        if run.mask >> at // CHUNK_BYTES & 1:
            pieces += [eextend_block(run.offset + at), data[at : at + CHUNK_BYTES]]
    return b"".join(pieces)


def _patched(run: Run, starts: range) -> Iterator[array[int]]:
    """Yield batches of pages that differ only in their offsets."""
    template = _Template(run, starts.step)
    for start in starts:
        template.move_to(start)
        yield template.words


def _joined(run: Run, view: memoryview, starts: range) -> Iterator[bytes]:
    """Yield batches of pages whose chunks lie between their header blocks."""
    pages = starts.step
    template = _Template(run, pages)
    stage = bytearray(pages * PAGE_BYTES)
    pieces = _interleave(template, memoryview(stage), pages)
    for start in starts:
        template.move_to(start)
        stage[:] = view[start * PAGE_BYTES : (start + pages) * PAGE_BYTES]
        yield b"".join(pieces)


def _interleave(template: _Template, stage: memoryview, pages: int) -> list[memoryview]:
    """Return views of headers and chunks in hash order; made once, joined for every batch."""
    blocks = memoryview(template.words).cast("B")
    pieces: list[memoryview] = []
    for page in range(pages):
        at = cut = page * template.page_bytes
        for nth, chunk in enumerate(template.chunks, start=1):
            behind = at + (nth + 1) * _BLOCK  # the EADD block goes with the first EEXTEND block
            pieces.append(blocks[cut:behind])
            cut = behind
            data = page * PAGE_BYTES + chunk * CHUNK_BYTES
            pieces.append(stage[data : data + CHUNK_BYTES])
    return pieces
