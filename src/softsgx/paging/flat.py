"""Contents and PCMDs of evicted pages in memory, those of a page side by side.

A second implementation of a :class:`~softsgx.paging.swapfile.SwapFile` over a
:class:`~softsgx.paging.MemoryBacking`: counts, limits and events are those of its backing pages,
but no page of 32 PCMDs exists.  It has no broken forms, so defects need the other one.
``tests/differential`` runs both on the same histories.

Lock order: one lock protects a file, and is held at each call.
"""

from __future__ import annotations

import struct

from softsgx.arch import PAGE_BYTES, PageType, Pcmd, SecInfo
from softsgx.compiled import record
from softsgx.defects import Defect
from softsgx.hw import Sealed
from softsgx.paging.counters import Counters
from softsgx.paging.events import Truncated
from softsgx.paging.failures import BackingError
from softsgx.paging.interfaces import BackingFile
from softsgx.paging.sealed import SealedPages
from softsgx.paging.sparse import SparseNumbers
from softsgx.paging.swapfile import PCMDS_PER_PAGE, Layout, Pinned, SwapFile
from softsgx.trace import Tracer

__all__ = ["Backing", "FlatBacking", "FlatFile", "open_swap_file"]

_HEAP = SecInfo.of(PageType.REG, 3).flags
_PCMD = struct.Struct("<Q56xQ40x16s")  # SECINFO.FLAGS, ENCLAVEID, MAC; the rest is reserved
assert _PCMD.size == Pcmd.SIZE, "a PCMD is 128 bytes"


@record
class FlatBacking:
    """The backing of one owner's evicted pages in this process' memory.

    Args:
        limit_pages: how many backing pages it may hold, as Linux would count them: one for each
            content, one for each 32 PCMDs; ``None`` for any number.

    Attributes:
        sealed: ciphertext ‖ MAC of each evicted page.
        usual: SECINFO flags and enclave identifier in the PCMD of most pages, which are regular
            ones R W; ``None`` before the first.
        unusual: by index, those of the other pages.
        kinds: one object for all equal ones.
        reserved: evictions that have reserved their backing.
        sharers: of each PCMD page that Linux would have, the PCMDs in it, and the evictions that
            are about to write one.
        pcmd_pages: how many PCMD pages have any.
    """

    __slots__ = (
        "kinds",
        "limit_pages",
        "pcmd_pages",
        "reserved",
        "sealed",
        "sharers",
        "unusual",
        "usual",
    )

    def __init__(self, limit_pages: int | None = None) -> None:
        self.limit_pages = limit_pages
        self.sealed = SealedPages()
        self.usual: tuple[int, int] | None = None
        self.unusual: dict[int, tuple[int, int]] = {}
        self.kinds: dict[tuple[int, int], tuple[int, int]] = {}
        self.reserved = self.pcmd_pages = 0
        self.sharers = SparseNumbers()

    def pages(self) -> int:
        """As :meth:`BackingFile.pages`."""
        return len(self.sealed) + self.reserved + self.pcmd_pages

    def close(self) -> None:
        """As :meth:`BackingFile.close`."""
        self.sealed.clear()
        self.unusual.clear()
        self.sharers.clear()
        self.pcmd_pages = 0


Backing = BackingFile | FlatBacking
"""What evicted pages go to."""


class FlatFile:
    """See the module.

    Args:
        backing: the backing.
        layout: which backing page has the PCMD of a page.
        counters: the core's.
        tracer: receives events; ``None`` for none.
    """

    __slots__ = (
        "_buffers",
        "_counters",
        "_flat",
        "_layout",
        "_sealed",
        "_sharers",
        "_tracer",
    )

    def __init__(
        self, backing: FlatBacking, layout: Layout, *, counters: Counters, tracer: Tracer | None
    ) -> None:
        self._flat, self._layout, self._counters, self._tracer = backing, layout, counters, tracer
        self._sealed, self._sharers = backing.sealed, backing.sharers
        self._buffers: list[Pinned] = []

    def reserve(self, index: int, *, announced: bool = True) -> Pinned:
        """As :meth:`SwapFile.reserve`."""
        flat, sharers = self._flat, self._sharers
        group = index // PCMDS_PER_PAGE
        count = sharers.get(group)
        limit = flat.limit_pages
        if limit is not None and flat.pages() + (1 if count else 2) > limit:
            raise BackingError(f"backing file is full: {limit} pages")
        if len(self._sealed.free) <= flat.reserved:
            self._make_room(flat.reserved + 1)
        sharers.put(group, count + 1)
        flat.pcmd_pages += not count
        flat.reserved += 1
        return self.buffer(index)

    def buffer(self, index: int) -> Pinned:
        """Return what EWB of a page writes to, once its backing is reserved."""
        if self._buffers:
            pinned = self._buffers.pop()
            pinned.index = index
            return pinned
        return Pinned(index, bytearray(PAGE_BYTES), bytearray(Pcmd.SIZE))

    def _make_room(self, pages: int) -> None:
        try:
            self._sealed.make_room(pages)
        except OSError as error:
            raise BackingError(f"backing memory cannot grow: {error.strerror}") from error

    def announce(self, pinned: Pinned) -> None:
        """As :meth:`SwapFile.announce`: :meth:`reserve` has done it."""

    def written(self, pinned: Pinned) -> None:
        """As :meth:`SwapFile.written`."""
        flags, eid, mac = _PCMD.unpack(pinned.pcmd_bytes)
        self.keep(pinned, (b"".join((pinned.data, mac)), flags, eid))

    def keep(self, pinned: Pinned, page: Sealed) -> None:
        """As :meth:`written`, of a page that EWB has not written to ``pinned``."""
        flat, index = self._flat, pinned.index
        flat.reserved -= 1
        sealed, flags, eid = page
        self._sealed.put(index, sealed)
        if (flags, eid) != flat.usual:
            self.keep_kind(index, flags, eid)
        self._buffers.append(pinned)

    def keep_kind(self, index: int, flags: int, eid: int) -> None:
        """Keep flags and identifier of a page that are not the usual ones."""
        flat, kind = self._flat, (flags, eid)
        if flat.usual is None and flags == _HEAP:
            flat.usual = kind
        else:
            flat.unusual[index] = flat.kinds.setdefault(kind, kind)

    def cancel(self, pinned: Pinned) -> None:
        """As :meth:`SwapFile.cancel`."""
        self._flat.reserved -= 1
        self._buffers.append(pinned)
        self._leave(pinned.index)

    def open(self, index: int) -> Pinned:
        """As :meth:`SwapFile.open`."""
        sealed, flags, eid = self.kept(index)
        pcmd = _PCMD.pack(flags, eid, bytes(sealed[PAGE_BYTES:]))
        return Pinned(index, sealed[:PAGE_BYTES], memoryview(pcmd))

    def kept(self, index: int) -> tuple[memoryview, int, int]:
        """Return what :meth:`keep` has kept of a page, or :meth:`written`, until it is forgotten.

        Raises:
            BackingError: no such page is evicted.
        """
        sealed, flat = self._sealed.get(index), self._flat
        if sealed is None:
            raise BackingError(f"no backing page {self._layout(index)[0]}")
        kind = flat.unusual.get(index) or flat.usual
        assert kind is not None, "a page was evicted, and its PCMD has no flags"
        return sealed, *kind

    def close(self, pinned: Pinned) -> None:
        """As :meth:`SwapFile.close`."""

    def loaded(self, pinned: Pinned) -> None:
        """As :meth:`SwapFile.loaded`."""
        self.forget(pinned.index)

    def forget(self, index: int) -> None:
        """The page was loaded, or its enclave does without it."""
        self._sealed.drop(index)
        if self._flat.unusual:
            self._flat.unusual.pop(index, None)
        self._counters.truncated += 1
        self._leave(index)

    def discard(self, index: int) -> None:
        """As :meth:`SwapFile.discard`."""
        if index in self._sealed:
            self.forget(index)

    def _leave(self, index: int) -> None:
        """A PCMD page has one sharer fewer: truncate it when that was the last."""
        sharers, group = self._sharers, index // PCMDS_PER_PAGE
        count = sharers.get(group) - 1
        sharers.put(group, count)
        if count:
            return
        self._flat.pcmd_pages -= 1
        self._counters.pcmd_truncated += 1
        if self._tracer is not None:
            self._tracer(Truncated(self._layout(index)[1]))


def open_swap_file(
    backing: Backing,
    layout: Layout,
    *,
    counters: Counters,
    tracer: Tracer | None,
    defects: frozenset[Defect],
) -> SwapFile | FlatFile:
    """Return the swap file on ``backing``; as :class:`SwapFile`."""
    if isinstance(backing, FlatBacking):
        return FlatFile(backing, layout, counters=counters, tracer=tracer)
    return SwapFile(backing, layout, counters=counters, tracer=tracer, defects=defects)
