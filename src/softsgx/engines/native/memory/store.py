"""The store of resident pages: which of them are in the memory files that the program maps.

A page of an enclave is either *shown* or *hidden*.  Shown: its bytes are in the memory file, at
the offset that equals its linear address, so every mapping of the file has them and the program
uses them at native speed.  Hidden: its bytes are in the supervisor, the file has a hole there, and
each access of the program faults.  A page is shown while a page table maps it and its EPCM entry
lets enclave code use it.  TCS, pending, modified and trimmed pages are always hidden, and so are
pages without any right and poisoned pages.  In each address space a shown page has the rights that
both its mapping and its EPCM entry have.

Invariant: while a page is shown, the file has the only copy of its bytes; else its
:class:`StoredPage` does, unless they are zeros: a heap that is added and not used yet costs no more
than its EPCM entries.

A page that no page table maps any more may stay shown until its bytes are needed, or until the
supervisor resumes the program: pages are evicted in batches, and hiding sixteen neighbours costs
little more than hiding one.  Threads that run meanwhile use the page as if their TLB still had the
translation, which hardware allows until ETRACK and an exit.

Deviation: a page with the EPCM right X can also be read: page table entries cannot allow fetches
without reads.

Deviation: code outside the enclave reads a shown page's bytes, where hardware gives ones, unless
the run is strict.
"""

from __future__ import annotations

from operator import attrgetter

from softsgx import compiled
from softsgx.arch import PAGE_BYTES, PageType
from softsgx.engines.native.memory.memory_file import (
    ALL_RIGHTS,
    EXECUTE,
    READ,
    WRITE,
    EnclaveMemory,
    User,
)
from softsgx.hw import EpcPage

__all__ = ["ZEROS", "NativeStore", "StoredPage"]

_ONES, ZEROS = b"\xff" * PAGE_BYTES, bytes(PAGE_BYTES)
_REG = PageType.REG  # the lookup of an enumeration's member is slow


@compiled.record
class StoredPage:
    """What the store knows of one EPC page; it is made at the first use of the EPC page, and kept.

    Attributes:
        page: the EPC page; its ``stored`` is this.
        memory: the memory file where page tables map the page, or where it is shown; stale if
            neither is so.
        linaddr: its address there.
        maps: number of page tables that map it.
        rights: those of its EPCM entry while it is shown; 0: it is hidden.
        data: its bytes while it is hidden; ``None``: zeros, or it is shown.
        poisoned: whether its memory has an uncorrected error.
    """

    __slots__ = ("data", "linaddr", "maps", "memory", "page", "poisoned", "rights")

    def __init__(self, page: EpcPage) -> None:
        self.page = page
        self.memory: EnclaveMemory | None = None
        self.linaddr = self.maps = self.rights = 0
        self.data: bytes | bytearray | None = None
        self.poisoned = False


class NativeStore:
    """The machine's page store: it holds the bytes of resident pages; see the module."""

    __slots__ = ("_leaving", "_pages")

    def __init__(self) -> None:
        self._pages: list[StoredPage] = []  # all that were made
        # Those that are shown, and that no page table maps: in the order in which they were
        # unmapped.
        self._leaving: list[StoredPage] = []

    def record(self, page: EpcPage) -> StoredPage:
        """Return what the store knows of a page."""
        record: StoredPage | None = page.stored
        if record is None:
            record = page.stored = StoredPage(page)
            self._pages.append(record)
        return record

    # --- the machine's side ---------------------------------------------------------------------

    def fill(self, page: EpcPage, data: bytes) -> None:
        """Keep the bytes, hidden until a page table maps the page."""
        record: StoredPage = page.stored or self.record(page)
        record.data = None if data == ZEROS else data

    def freeze(self, page: EpcPage) -> bytes | bytearray:
        """Hide the page, so that no thread can store to it, and return its bytes."""
        record: StoredPage = page.stored or self.record(page)
        if record.rights:
            if record.maps:
                self._hide(record)
            else:
                self.hide_unmapped()
        return ZEROS if record.data is None else record.data

    def thaw(self, page: EpcPage) -> None:
        """The page was not evicted: show it again, if its entries allow that."""
        self.refresh(page)

    def drop(self, page: EpcPage) -> None:
        """Forget the bytes."""
        record: StoredPage = page.stored or self.record(page)
        if record.rights:
            self._hide(record)
        record.data = None
        if not record.maps:
            record.memory = None  # it is another enclave's perhaps when the page is used again

    def read(self, page: EpcPage, offset: int, size: int) -> bytes:
        """Return bytes of a page, shown or hidden."""
        record: StoredPage = page.stored or self.record(page)
        if record.rights:
            return _memory(record).read(record.linaddr + offset, size)
        data = ZEROS if record.data is None else record.data
        return bytes(data[offset : offset + size])

    def write(self, page: EpcPage, offset: int, data: bytes) -> None:
        """Replace bytes of a page, shown or hidden."""
        record: StoredPage = page.stored or self.record(page)
        if record.rights:
            _memory(record).write(record.linaddr + offset, data)
            return
        kept = record.data
        if not isinstance(kept, bytearray):
            kept = record.data = bytearray(ZEROS if kept is None else kept)
        kept[offset : offset + len(data)] = data

    def poison(self, page: EpcPage) -> None:
        """Give the memory of ``page`` an uncorrected error: every use traps from now on."""
        self.record(page).poisoned = True
        self.refresh(page)

    def clear(self) -> None:
        """Drop the bytes of all pages, after a loss of power."""
        for record in self._pages:
            self._hide(record)
            record.data = None

    # --- the page tables' side ------------------------------------------------------------------

    def mapped(
        self, page: EpcPage, memory: EnclaveMemory, linaddr: int, user: User | None = None
    ) -> None:
        """One more page table maps ``page``, at ``linaddr``.

        Args:
            page: the page.
            memory: what is mapped there.
            linaddr: its address.
            user: the page table; ``None``: no matter which.
        """
        record: StoredPage = page.stored or self.record(page)
        shown = record.rights
        if shown:
            assert (record.memory, record.linaddr) == (memory, linaddr), (
                f"{page!r} is shown at {record.linaddr:#x} and mapped at {linaddr:#x}"
            )
            if not record.maps:
                self._leaving.remove(record)
        record.memory, record.linaddr = memory, linaddr
        record.maps += 1
        rights = page.rwx
        if (
            rights & WRITE
            and page.valid
            and page.pt is _REG
            and not (page.pending or page.modified)
            and not shown
            and not record.poisoned
        ):
            # As refresh() does it: a hidden page that becomes usable, has R, and has no marks.
            data, record.data = record.data, None
            record.rights = rights
            memory.show(linaddr, ZEROS if data is None else data, rights, user)
            return
        self.refresh(page)

    def unmapped(self, record: StoredPage) -> None:
        """One page table fewer maps the page."""
        assert record.maps, f"no page table maps {record.page!r}"
        record.maps -= 1
        if record.rights and not record.maps:
            self._leaving.append(record)

    def hide_unmapped(self) -> None:
        """Hide the pages that no page table maps any more.

        Call it before the program is resumed, and before a step that relies on their faulting.
        """
        leaving = self._leaving
        if not leaving:
            return
        by_file: dict[EnclaveMemory, list[StoredPage]] = {}
        for record in leaving:
            by_file.setdefault(_memory(record), []).append(record)
        for memory, records in by_file.items():
            records.sort(key=_LINADDR)
            contents = memory.hide([record.linaddr for record in records])
            for record, data in zip(records, contents, strict=True):
                if data != ZEROS:
                    record.data = data
                record.rights = 0
        # A guard that waits for a thread may have unmapped more.
        leaving[:] = [record for record in leaving if record.rights]

    def lend(self, page: EpcPage, memory: EnclaveMemory, linaddr: int) -> None:
        """Show a page of ones at ``linaddr`` in place of the page, whose bytes stay hidden."""
        self.hide_unmapped()
        self._hide(self.record(page))
        memory.show(linaddr, _ONES, ALL_RIGHTS)

    def take_back(self, memory: EnclaveMemory, linaddr: int) -> None:
        """Remove the page of ones and drop what was stored in it; call :meth:`refresh` next."""
        memory.hide([linaddr])

    def is_mapped(self, page: EpcPage) -> bool:
        """Return whether some page table maps the page."""
        return self.record(page).maps > 0

    def is_shown(self, page: EpcPage) -> bool:
        """Return whether page tables map the page and its bytes are in a memory file."""
        return self.rights(page) != 0

    def rights(self, page: EpcPage) -> int:
        """Return the EPCM rights of the page; 0: it is not shown, or is about to be hidden."""
        record = self.record(page)
        return record.rights if record.maps else 0

    def refresh(self, page: EpcPage) -> None:
        """Make the program's rights on ``page`` agree with its EPCM entry.

        Call it after each change of the entry.
        """
        record: StoredPage = page.stored or self.record(page)
        rights = page.rwx
        if rights & EXECUTE:
            rights |= READ
        usable = page.valid and page.pt is _REG and not (page.pending or page.modified)
        usable = usable and not record.poisoned
        if not record.maps or not usable or not rights:
            self._hide(record)
            return
        memory, linaddr = _memory(record), record.linaddr
        if not record.rights:
            data = ZEROS if record.data is None else record.data
            record.data, record.rights = None, rights
            if rights & ~READ == EXECUTE:
                data = memory.forbid(linaddr, bytes(data))
            memory.show(linaddr, data, rights)
        elif record.rights != rights:
            memory.unmark(linaddr)  # writable code has no marks
            record.rights = rights
            memory.set_rights(linaddr, rights)
            if rights & ~READ == EXECUTE:
                memory.forbid_shown(linaddr)

    def _hide(self, record: StoredPage) -> None:
        if record.rights:
            (data,) = _memory(record).hide([record.linaddr])
            if data != ZEROS:
                record.data = data
            record.rights = 0
            if not record.maps:
                self._leaving.remove(record)


_LINADDR = attrgetter("linaddr")


def _memory(record: StoredPage) -> EnclaveMemory:
    """Return where a page is mapped or shown."""
    memory = record.memory
    assert memory is not None, f"{record.page!r} is in no memory file"
    return memory


if compiled.speedups is not None:
    compiled.speedups.bind("StoredPage", StoredPage)
    if compiled.speedups.bind("NativeStore", NativeStore):
        compiled.speedups.give("NativeStore", NativeStore)
    compiled.speedups.give("REG", _REG)
    compiled.speedups.give("ZEROS", ZEROS)
