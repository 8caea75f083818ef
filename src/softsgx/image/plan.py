"""The build plan: the common form of all enclave files.

A plan has the measured fields of SECS and an ordered list of *runs*: adjacent pages with the same
SECINFO, content rule and chunk mask.  Its order is the order of EADD, and therefore of the hash.
Pages of zeros and of a repeated word exist on access only, so a plan with a terabyte of heap takes
as much memory as one with a page.

The constructor accepts only what EADD accepts: aligned pages inside the enclave, without overlap,
with a page type, rights and contents that the instruction takes.  A TCS has the bytes that EADD
stores, which may differ from those of the file.  The readers check the further rules of their
*file format*.

Deviation: a plan does not depend on the machine that builds it.  It accepts everything that a
processor with CET accepts, and its enclaves are 64-bit.

Source:
    SDM vol. 3D, "EADD", "EEXTEND", Operation.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

from softsgx.arch import (
    CHUNKS_PER_PAGE,
    PAGE_BYTES,
    SHADOW_STACK_TYPES,
    PageType,
    SecInfoFlags,
    Tcs,
    tcs_as_added,
    tcs_ok,
)
from softsgx.errors import SoftSgxError

__all__ = [
    "LARGEST_SECS_SIZE",
    "MASK_ALL",
    "MASK_NONE",
    "MOST_TCS",
    "SECINFO_R",
    "SECINFO_RW",
    "SECINFO_RWX",
    "SECINFO_RX",
    "SECINFO_TCS",
    "ZERO",
    "Buffer",
    "Data",
    "Fill",
    "Padded",
    "Page",
    "Plan",
    "Run",
    "Source",
    "lay",
]

Buffer = bytes | bytearray | memoryview

MASK_ALL = (1 << CHUNKS_PER_PAGE) - 1
MASK_NONE = 0

SECINFO_R = PageType.REG << 8 | SecInfoFlags.R.value
SECINFO_RW = SECINFO_R | SecInfoFlags.W.value
SECINFO_RX = SECINFO_R | SecInfoFlags.X.value
SECINFO_RWX = SECINFO_RW | SecInfoFlags.X.value
SECINFO_TCS = PageType.TCS << 8

_ADDABLE = {PageType.TCS, PageType.REG, PageType.SS_FIRST, PageType.SS_REST}
# A plain number: inverting an IntFlag keeps only the bits that have names.
_SETTABLE = SecInfoFlags.RWX.value | SecInfoFlags.TYPE_MASK.value
_SMALLEST_SECS_SIZE = 8192
LARGEST_SECS_SIZE = 1 << 56
"""SECS.SIZE in bytes: no processor has more linear addresses."""
_TOKEN_BYTES = 8
MOST_TCS = 1 << 16
"""The most threads of a plan: a small file could otherwise ask for any number of TCS pages."""


@dataclass(frozen=True, slots=True)
class Data:
    """Pages with their bytes.

    Attributes:
        view: a whole number of pages.
    """

    view: memoryview

    def page(self, index: int) -> memoryview:
        """Return the 4096 bytes of page ``index``, not copied."""
        return self.view[index * PAGE_BYTES : (index + 1) * PAGE_BYTES]


@dataclass(frozen=True, slots=True)
class Fill:
    """Pages that repeat one 32-bit little-endian word.

    Attributes:
        word: the repeated word; 0 for pages of zeros.
    """

    word: int = 0

    def page(self, index: int) -> bytes:
        """Return 4096 bytes, the same object for every page of zeros."""
        if self.word == 0:
            return _ZERO_PAGE
        return struct.pack("<I", self.word) * (PAGE_BYTES // 4)


_ZERO_PAGE = bytes(PAGE_BYTES)


@dataclass(frozen=True, slots=True)
class Padded:
    """One page with bytes of a file in some part, and zeros elsewhere.

    Attributes:
        view: at most a page of bytes.
        lead: zeros before them.
    """

    view: memoryview
    lead: int = 0

    def page(self, index: int) -> bytes:
        """Return its 4096 bytes, built on each call: many such pages must not take a page each."""
        assert index == 0, f"page {index} of one"
        return (bytes(self.lead) + self.view).ljust(PAGE_BYTES, b"\0")


ZERO = Fill(0)
Source = Data | Fill | Padded


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a plan.

    Attributes:
        offset: bytes from BASEADDR.
        flags: SECINFO.FLAGS.
        data: its 4096 bytes.
        mask: bit i: EEXTEND chunk i.
    """

    offset: int
    flags: int
    data: bytes | memoryview
    mask: int


@dataclass(frozen=True, slots=True)
class Run:
    """Adjacent pages that EADD adds with the same SECINFO.

    Attributes:
        offset: bytes from BASEADDR to the first page.
        pages: how many.
        flags: SECINFO.FLAGS of each.
        source: provides their bytes.
        mask: which 256-byte chunks of each page EEXTEND measures: bit i, chunk i.
        label: their name in the file; for output only.
    """

    offset: int
    pages: int
    flags: int
    source: Source = ZERO
    mask: int = MASK_ALL
    label: str = field(default="", compare=False)

    @property
    def end(self) -> int:
        """Return the offset after the last page."""
        return self.offset + self.pages * PAGE_BYTES

    @property
    def page_type(self) -> int:
        """Return SECINFO's page type."""
        return self.flags >> 8 & 0xFF

    @property
    def is_tcs(self) -> bool:
        """Return whether the pages are thread control structures."""
        return self.page_type == PageType.TCS

    def page(self, index: int) -> Page:
        """Return page ``index`` of the run."""
        assert 0 <= index < self.pages, f"page {index} of a run of {self.pages}"
        return Page(
            self.offset + index * PAGE_BYTES, self.flags, self.source.page(index), self.mask
        )


@dataclass(frozen=True)
class Plan:
    """ECREATE's measured operands and the pages, in the order in which they are added.

    Attributes:
        size: SECS.SIZE in bytes, a power of two.
        runs: the pages.
        ssa_frame_size: SECS.SSAFRAMESIZE in pages.
        base: the BASEADDR that the file requires; None: any aligned one.

    Raises:
        SoftSgxError: EADD or ECREATE would refuse the plan.
    """

    size: int
    runs: tuple[Run, ...] = ()
    ssa_frame_size: int = 1
    base: int | None = None

    def __post_init__(self) -> None:
        """Make the checks of ECREATE and EADD."""
        if not _SMALLEST_SECS_SIZE <= self.size <= LARGEST_SECS_SIZE or self.size & (self.size - 1):
            raise SoftSgxError(
                f"plan: enclave size {self.size:#x}: invalid; give a power of two from 0x2000 to "
                "2**56"
            )
        if not 0 < self.ssa_frame_size < 1 << 32:
            raise SoftSgxError(
                f"plan: SSA frame size of {self.ssa_frame_size} pages; it takes 1 to 2**32-1"
            )
        if self.base is not None and (self.base % self.size or self.base < 0):
            raise SoftSgxError(
                f"plan: base {self.base:#x} is not a multiple of the size {self.size:#x}; give one"
            )
        for run in self.runs:
            _check_run(run, self.size)
        _check_overlap(self.runs)
        threads = sum(run.pages for run in self.runs if run.is_tcs)
        if threads > MOST_TCS:
            raise SoftSgxError(f"plan: {threads} TCS pages; at most {MOST_TCS} are taken")
        object.__setattr__(self, "runs", tuple(_as_added(run, self.size) for run in self.runs))

    @property
    def page_count(self) -> int:
        """Return how many pages are added."""
        return sum(run.pages for run in self.runs)

    @property
    def tcs(self) -> tuple[int, ...]:
        """Return the offsets of the TCS pages, in plan order."""
        return tuple(
            run.offset + index * PAGE_BYTES
            for run in self.runs
            if run.is_tcs
            for index in range(run.pages)
        )

    def pages(self) -> Iterator[Page]:
        """Yield the pages one by one, in the order of EADD."""
        for run in self.runs:
            for index in range(run.pages):
                yield run.page(index)

    def find(self, offset: int) -> Run | None:
        """Return the run that holds the page at ``offset``, or None for a hole."""
        for run in self.runs:
            if run.offset <= offset < run.end:
                return run
        return None


def _check_run(run: Run, size: int) -> None:
    where = f"plan: pages at {run.offset:#x}" + (f" ({run.label})" if run.label else "")
    if run.pages <= 0 or run.offset < 0 or run.offset % PAGE_BYTES:
        raise SoftSgxError(f"{where}: {run.pages} pages; offsets are page aligned, counts positive")
    if run.end > size:
        raise SoftSgxError(
            f"{where}: end at {run.end:#x}, beyond the enclave's size {size:#x}; "
            "give the enclave a larger size"
        )
    if isinstance(run.source, Data):
        have = run.source.view.nbytes
        assert have == run.pages * PAGE_BYTES, f"{have} bytes for {run.pages} pages"
    elif isinstance(run.source, Padded):
        have = run.source.lead + run.source.view.nbytes
        assert run.pages == 1 and have <= PAGE_BYTES, f"{have} bytes for {run.pages} pages"
    elif not 0 <= run.source.word < 1 << 32:
        raise SoftSgxError(
            f"{where}: fill word {run.source.word:#x} has more than 32 bits; give a smaller one"
        )
    if not 0 <= run.mask <= MASK_ALL:
        raise SoftSgxError(
            f"{where}: chunk mask {run.mask:#x} has more than 16 bits; give one bit a chunk"
        )
    rights = run.flags & SecInfoFlags.RWX
    if run.flags & ~_SETTABLE or run.page_type not in _ADDABLE:
        raise SoftSgxError(
            f"{where}: SECINFO flags {run.flags:#x}: EADD refuses them; give a type that EADD "
            "adds, with R, W and X"
        )
    if run.is_tcs and rights:
        raise SoftSgxError(
            f"{where}: SECINFO flags {run.flags:#x}: a TCS has no R, W or X; clear them"
        )
    if rights & SecInfoFlags.W and not rights & SecInfoFlags.R:
        raise SoftSgxError(f"{where}: SECINFO flags {run.flags:#x}: W needs R; set R")


def _as_added(run: Run, size: int) -> Run:
    """Return the pages as EADD stores them.

    Raises:
        SoftSgxError: EADD refuses their content.
    """
    where = f"plan: pages at {run.offset:#x}" + (f" ({run.label})" if run.label else "")
    if run.page_type in SHADOW_STACK_TYPES:
        _check_shadow_stack(run, size, where)
    if not run.is_tcs:
        return run
    changed, contents = False, []
    for index in range(1 if isinstance(run.source, Fill) else run.pages):
        tcs = Tcs.unpack(run.source.page(index))
        if not tcs_ok(tcs, mode64=True, cet=True):
            raise SoftSgxError(
                f"{where}: EADD refuses a TCS with PREVSSP or bytes from 88 on set; "
                "clear them, or give the page its right type"
            )
        added = tcs_as_added(tcs)
        changed |= added != tcs
        contents.append(added.pack())
    return replace(run, source=Data(memoryview(b"".join(contents)))) if changed else run


def _check_shadow_stack(run: Run, size: int, where: str) -> None:
    """Refuse shadow-stack pages that EADD refuses; the token follows from BASEADDR."""
    if run.flags & SecInfoFlags.RWX != SecInfoFlags.R | SecInfoFlags.W:
        raise SoftSgxError(
            f"{where}: SECINFO flags {run.flags:#x}: not those of a shadow stack; give R and W"
        )
    if run.offset == 0 or run.end == size:
        raise SoftSgxError(
            f"{where}: a shadow stack at an end of the enclave's range; leave a page before and "
            "behind it"
        )
    if run.source == ZERO and run.page_type == PageType.SS_REST:
        return
    zeros = PAGE_BYTES - (_TOKEN_BYTES if run.page_type == PageType.SS_FIRST else 0)
    pages = 1 if isinstance(run.source, Fill) else run.pages
    if any(any(run.source.page(index)[:zeros]) for index in range(pages)):
        raise SoftSgxError(
            f"{where}: a shadow stack with more in it than its token; set the other bytes to zero"
        )


def _check_overlap(runs: tuple[Run, ...]) -> None:
    """Refuse two runs that share a page."""
    ordered = sorted(runs, key=lambda run: run.offset)
    for before, after in pairwise(ordered):
        if after.offset < before.end:
            raise SoftSgxError(
                f"plan: pages at {after.offset:#x} overlap those from {before.offset:#x} "
                f"to {before.end:#x}; each page can be added once"
            )


def lay(
    offset: int, data: Buffer, flags: int, *, mask: int = MASK_ALL, label: str = ""
) -> list[Run]:
    """Return runs for ``data`` at any ``offset``: whole pages uncopied, partial ones zero-filled.

    Args:
        offset: bytes from BASEADDR; need not be page aligned.
        data: any number of bytes; none gives no run.
        flags: SECINFO.FLAGS.
        mask: chunks to measure in each page.
        label: the name of the pages in the file.
    """
    view = memoryview(data).cast("B").toreadonly()
    runs: list[Run] = []

    lead = offset % PAGE_BYTES
    if lead and view.nbytes:
        head, view = view[: PAGE_BYTES - lead], view[PAGE_BYTES - lead :]
        runs.append(Run(offset - lead, 1, flags, Padded(head, lead), mask, label))
        offset += PAGE_BYTES - lead
    whole = view.nbytes // PAGE_BYTES * PAGE_BYTES
    if whole:
        runs.append(Run(offset, whole // PAGE_BYTES, flags, Data(view[:whole]), mask, label))
    if view.nbytes > whole:
        runs.append(Run(offset + whole, 1, flags, Padded(view[whole:]), mask, label))
    return runs
