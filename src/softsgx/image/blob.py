"""Plans built from parts: code, data, threads, heap.

Tests, examples and the C builder use it.  A program that reads a format which softsgx does not know
can use it, too.
"""

from __future__ import annotations

from typing import Self

from softsgx.arch import PAGE_BYTES, Tcs
from softsgx.image.plan import (
    MASK_ALL,
    MASK_NONE,
    SECINFO_RW,
    SECINFO_TCS,
    ZERO,
    Buffer,
    Data,
    Fill,
    Plan,
    Run,
    lay,
)

__all__ = ["Blob", "enclave_size", "tcs_page"]

_ANY_LIMIT = 0xFFFF_FFFF


def enclave_size(end: int) -> int:
    """Return the smallest SECS.SIZE that holds ``end`` bytes: a power of two, at least 8192."""
    return max(2 * PAGE_BYTES, 1 << max(0, end - 1).bit_length())


def tcs_page(
    *,
    ossa: int,
    oentry: int,
    nssa: int = 2,
    ofs_base: int = 0,
    ogs_base: int = 0,
    flags: int = 0,
) -> bytes:
    """Return the 4096 bytes of a TCS; all addresses are offsets from BASEADDR."""
    return Tcs(
        flags=flags,
        ossa=ossa,
        nssa=nssa,
        oentry=oentry,
        ofs_base=ofs_base,
        ogs_base=ogs_base,
        fs_limit=_ANY_LIMIT,
        gs_limit=_ANY_LIMIT,
    ).pack()


class Blob:
    r"""Collects pages in the order of EADD.

    Each method takes the offset of its pages; by default they follow the previous ones.

    Example:
        >>> blob = Blob()
        >>> _ = blob.data(b"\x0f\x01\xd7", flags=0x205)
        >>> tcs = blob.thread(oentry=0)
        >>> plan = blob.heap(16).plan()
        >>> hex(plan.size), plan.tcs == (tcs,)
        ('0x20000', True)
    """

    def __init__(self, *, ssa_frame_size: int = 1) -> None:
        self._ssa_frame_size = ssa_frame_size
        self._runs: list[Run] = []
        self.end = 0

    def data(
        self,
        data: Buffer,
        *,
        flags: int = SECINFO_RW,
        offset: int | None = None,
        mask: int = MASK_ALL,
        label: str = "data",
    ) -> Self:
        """Add bytes, zero-filled to whole pages."""
        at = self.end if offset is None else offset
        return self._add(*lay(at, data, flags, mask=mask, label=label))

    def zeros(
        self,
        pages: int,
        *,
        flags: int = SECINFO_RW,
        offset: int | None = None,
        mask: int = MASK_ALL,
        word: int = 0,
        label: str = "zeros",
    ) -> Self:
        """Add pages that repeat a 32-bit word, by default zero."""
        at = self.end if offset is None else offset
        source = Fill(word) if word else ZERO
        return self._add(Run(at, pages, flags, source, mask, label)) if pages else self

    def heap(self, pages: int, *, offset: int | None = None) -> Self:
        """Add unmeasured pages of zeros that may be read and written."""
        return self.zeros(pages, offset=offset, mask=MASK_NONE, label="heap")

    def gap(self, pages: int) -> Self:
        """Leave a gap of ``pages`` pages, as a guard."""
        self.end += pages * PAGE_BYTES
        return self

    def tcs(self, page: Buffer, *, offset: int | None = None) -> Self:
        """Add one TCS page, given as its 4096 bytes."""
        at = self.end if offset is None else offset
        view = memoryview(bytes(page))
        assert view.nbytes == PAGE_BYTES, f"a TCS of {view.nbytes} bytes"
        return self._add(Run(at, 1, SECINFO_TCS, Data(view), MASK_ALL, "TCS"))

    def thread(
        self,
        *,
        oentry: int,
        stack_pages: int = 2,
        nssa: int = 2,
        offset: int | None = None,
        flags: int = 0,
    ) -> int:
        """Add stack, TCS, SSA frames and a thread-data page; return the offset of the TCS.

        The bases of FS and GS are the thread-data page.  The stack ends where the TCS begins.
        """
        if offset is not None:
            self.end = offset
        self.zeros(stack_pages, label="stack")
        at = self.end
        ssa_pages = nssa * self._ssa_frame_size
        ossa = at + PAGE_BYTES
        data = ossa + ssa_pages * PAGE_BYTES
        self.tcs(
            tcs_page(ossa=ossa, oentry=oentry, nssa=nssa, ofs_base=data, ogs_base=data, flags=flags)
        )
        self.zeros(ssa_pages, label="SSA").zeros(1, label="thread data")
        return at

    def plan(self, size: int | None = None) -> Plan:
        """Return the plan; without ``size`` it has the smallest SECS.SIZE that holds all pages."""
        end = max((run.end for run in self._runs), default=0)
        return Plan(size or enclave_size(end), tuple(self._runs), self._ssa_frame_size)

    def _add(self, *runs: Run) -> Self:
        for run in runs:
            self._runs.append(run)
            self.end = run.end
        return self
