"""Accesses of a trace against a real enclave on a platform, with the data checked.

One debug enclave holds the trace's pages; an access is a debug read or write of a word in its page
(EDBGRD, EDBGWR), which loads the page when it was evicted.  So everything is real but the running
of code: allocation, ageing, EWB with its crypto, ELDU, SECS and VA pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from softsgx.arch import PAGE_BYTES, Attributes, AttributesFlags, Secs
from softsgx.driver import peek, poke
from softsgx.host import Platform
from softsgx.image import SECINFO_RW, Blob, SignOptions, sign_plan, throwaway_key

if TYPE_CHECKING:
    from softsgx.accesses import Trace

__all__ = ["Replay", "ReplayResult"]

_BASE = 0x7000_0000_0000
_CHUNK_PAGES = 64


@dataclass(frozen=True)
class ReplayResult:
    """What a replay did.

    Attributes:
        accesses: how many.
        misses: accesses to a page that was not in the EPC.
        evictions, reloads: pages that left and came back, those of the trace alone.
        resident_pages: pages of the trace in the EPC at the end.
    """

    accesses: int
    misses: int
    evictions: int
    reloads: int
    resident_pages: int


class Replay:
    """An enclave of ``pages`` pages on ``platform``, all evicted to begin with."""

    def __init__(self, platform: Platform, pages: int, *, group: str = "/") -> None:
        self._core = platform.core
        self._process = platform.process("replay", group=group)
        plan = Blob().heap(pages).plan()
        secs = Secs(
            size=plan.size,
            base=_BASE,
            ssa_frame_size=1,
            attributes=Attributes(flags=AttributesFlags.MODE64BIT | AttributesFlags.DEBUG, xfrm=3),
        )
        self._fd = self._process.open()
        self._process.create(self._fd, secs.pack())
        for first in range(0, pages, _CHUNK_PAGES):
            count = min(_CHUNK_PAGES, pages - first)
            data = bytes(count * PAGE_BYTES)
            at = first * PAGE_BYTES
            self._process.add_pages(self._fd, at, data, SECINFO_RW, measure=False)
        options = SignOptions(
            attributes=AttributesFlags.MODE64BIT.value | AttributesFlags.DEBUG.value
        )
        self._process.init(self._fd, sign_plan(plan, throwaway_key(), options).pack())
        self._process.mmap(self._fd, _BASE, plan.size, 3)
        self._pages = self._process.enclave_file(self._fd).enclave.pages
        self._expected = [0] * pages
        self._clock = 0
        self._evict_all()

    def _evict_all(self) -> None:
        """Empty the EPC, but for pages that stay: a VA page may have no slot to go to."""
        core, refused = self._core, 0
        while core.root.has_reclaimable() and refused <= core.epc_pages:
            batch = core.reclaim(force=True)
            refused = 0 if batch.freed else refused + max(batch.scanned, 1)

    def run(self, trace: Trace) -> ReplayResult:
        """Make the accesses; each read is compared with what was last written there.

        Args:
            trace: its pages, of whatever enclaves, are those of the one enclave here; it uses at
                most as many as this has.

        Raises:
            AssertionError: a page held something else.
        """
        evictions = self._core.counters.reclaimed
        pages, _ = trace.dense()
        accesses = zip(pages.tolist(), trace.accesses.writes.tolist(), strict=True)
        misses = sum(self._access(page, write) for page, write in accesses)
        resident = sum(entry.epc is not None for entry in self._pages.values())
        evicted = self._core.counters.reclaimed - evictions
        return ReplayResult(len(pages), misses, evicted, misses, resident)

    def _access(self, page: int, write: bool) -> bool:
        """Read or write a page; return whether it was evicted."""
        mm, task, expected = self._process.mm, self._process, self._expected
        entry = self._pages[page]
        missed = entry.epc is None
        addr = _BASE + page * PAGE_BYTES + page % 512 * 8
        if write:
            self._clock += 1
            poke(mm, addr, self._clock.to_bytes(8, "little"), task)
            expected[page] = self._clock
        else:
            got = int.from_bytes(peek(mm, addr, 8, task), "little")
            assert got == expected[page], f"page {page} holds {got}, not {expected[page]}"
        if entry.epc is not None:
            self._core.mark_accessed(entry.epc)
        return missed

    def verify(self) -> None:
        """Read every page back, the evicted ones too.

        Raises:
            AssertionError: one holds something else than was written last.
        """
        for page in range(len(self._expected)):
            self._access(page, False)

    def close(self) -> None:
        """End the process and its enclave."""
        self._process.exit()
