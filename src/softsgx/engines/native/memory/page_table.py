"""One address space of the program: page tables of enclaves, as driver and processor see them.

It is the driver's :class:`~softsgx.driver.Ptes` and the processor's
:class:`~softsgx.hw.AddressSpace`.  The entries exist in the supervisor only.  The kernel's page
tables follow lazily, through the content of the memory file.

Source:
    Linux mm/memory.c for what an access without an entry becomes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from softsgx import compiled
from softsgx.arch import PAGE_BYTES, Pfec
from softsgx.engines.native.memory.memory_file import EnclaveMemory, Guard
from softsgx.engines.native.memory.page_maps import PageMap, PageSet, page_map, page_set
from softsgx.engines.native.memory.store import NativeStore, StoredPage
from softsgx.hw import EXECUTE, READ, WRITE, EpcPage, MachineCheck, PageFault

__all__ = ["EnclavePageTable", "Pager"]

_PAGE_MASK = -PAGE_BYTES
_READ_WRITE = READ | WRITE
_ENCLU_BYTES = 3


class Pager(Guard, Protocol):
    """The mechanism that makes accesses to absent pages fault in one address space.

    Attributes:
        name: one of :data:`~softsgx.engines.native.memory.pagers.PAGERS`.
    """

    name: str

    def map_prot(self, prot: int) -> int:
        """Return the PROT_* that a mapping of an enclave really gets."""

    def mapped(self, start: int, end: int, prot: int, shown: dict[int, int]) -> None:
        """The program has mapped an enclave, or changed the rights of a mapping.

        Args:
            start: of the range.
            end: of the range.
            prot: PROT_* rights of it.
            shown: EPCM rights of each page in it that is shown, by linear address.
        """

    def reveal(self, start: int, end: int, prot: int) -> None:
        """Give a range the rights that ``prot`` and its pages allow; PROT_NONE takes them all.

        The program's threads in this space are stopped, or in system calls.
        """

    def test_and_clear_accessed(self, linaddr: int) -> bool:
        """Return whether the shown page was used since it was shown, or since the last ``True``.

        After ``True`` the pager watches the page for its next use, from the time when the program
        is resumed at the latest.
        """

    def touched(self, linaddr: int, access: int) -> bool:
        """A fault hit a shown page: return whether it only reports the use of a watched page.

        Args:
            linaddr: of the page.
            access: READ, WRITE or EXECUTE, which the page's EPCM entry allows.
        """

    def close(self) -> None:
        """The address space has ended."""


class EnclavePageTable:
    """See the module.

    Args:
        index: as the attribute.
        store: of the bytes of resident pages.
        pages: the machine's EPC pages, by address.
        pager: as the attribute.
        memory_at: as the attribute.
        mapped_in: returns (start, end, memory file) of each mapping of an enclave that overlaps a
            range, lowest first.
        is_readable: as the attribute.
        kick_all: as the attribute.
        installed: called with each page that the driver has mapped; ``None``: nothing is.

    Attributes:
        pager: makes absent pages fault.
        index: number of the address space; part of "physical" addresses of ordinary memory.
        memory_at: returns the memory file mapped at an address, ``None`` where none is.
        is_readable: returns whether ordinary memory can be read at an address.
        kick_all: interrupts every thread of this space that is inside an enclave.
    """

    __slots__ = (
        "_entries",
        "_installed",
        "_mapped_in",
        "_marked",
        "_pages",
        "_prots",
        "_store",
        "_used",
        "index",
        "is_readable",
        "kick_all",
        "memory_at",
        "pager",
    )

    def __init__(
        self,
        index: int,
        store: NativeStore,
        pages: Mapping[int, EpcPage],
        pager: Pager,
        *,
        memory_at: Callable[[int], EnclaveMemory | None],
        mapped_in: Callable[[int, int], list[tuple[int, int, EnclaveMemory]]],
        is_readable: Callable[[int], bool],
        kick_all: Callable[[], None],
        installed: Callable[[EpcPage], None] | None = None,
    ) -> None:
        self.index, self.pager = index, pager
        self.memory_at, self.is_readable, self.kick_all = memory_at, is_readable, kick_all
        self._store, self._pages, self._installed = store, pages, installed
        self._mapped_in = mapped_in
        self._entries: PageMap[StoredPage] = page_map()
        self._prots: PageMap[int] = page_map()  # of entries with other rights than R and W
        self._used: PageSet = page_set()  # that a leaf has used since their bit was cleared
        self._marked: PageMap[EnclaveMemory] = page_map()  # pages that have an entry

    # --- for the driver -------------------------------------------------------------------------

    def install(self, linaddr: int, epc_addr: int, prot: int) -> None:
        """Map the page at ``linaddr`` with PROT_* rights; an older entry is replaced."""
        page = self._pages.get(epc_addr)
        assert page is not None, f"{epc_addr:#x} is no EPC page"
        old, record = self._entries.get(linaddr), self._store.record(page)
        self._entries[linaddr] = record
        self._set_prot(linaddr, prot)
        if old is not None:
            if old is record:
                return
            self._marked.pop(linaddr, None)
            self._store.unmapped(old)
        memory = self.memory_at(linaddr)
        assert memory is not None, f"an entry for {linaddr:#x} of no enclave"
        self._store.mapped(page, memory, linaddr, self)
        if self._installed is not None:
            self._installed(page)

    def zap(self, linaddr: int) -> None:
        """Remove the page's entry, if there is one."""
        record = self._entries.pop(linaddr, None)
        if record is not None:
            if self._prots:
                self._prots.pop(linaddr, None)
            self._used.discard(linaddr)
            if self._marked:
                self._marked.pop(linaddr, None)
            self._store.unmapped(record)

    def protect(self, start: int, end: int, prot: int) -> None:
        """Give the entries in a range the PROT_* rights ``prot``."""
        for linaddr in self._inside(start, end):
            self._set_prot(linaddr, prot)

    def _set_prot(self, linaddr: int, prot: int) -> None:
        if prot != _READ_WRITE:
            self._prots[linaddr] = prot
        elif self._prots:
            self._prots.pop(linaddr, None)

    def test_and_clear_accessed(self, linaddr: int) -> bool:
        """Return whether the page was used since the last call, or since it was mapped."""
        record = self._entries.get(linaddr)
        if record is None:
            return False
        # Leaves use pages, too; TCS and SSA pages are mostly used by leaves alone.
        used = linaddr in self._used
        if used:
            self._used.discard(linaddr)
        if record.rights:
            return self.pager.test_and_clear_accessed(linaddr) or used
        return used

    def zap_pages(self, linaddrs: list[int]) -> None:
        """As :meth:`zap` of each."""
        for linaddr in linaddrs:
            self.zap(linaddr)

    def test_and_clear_pages(self, linaddrs: list[int]) -> list[bool]:
        """As :meth:`test_and_clear_accessed` of each."""
        return [self.test_and_clear_accessed(linaddr) for linaddr in linaddrs]

    def kick(self) -> None:
        """Interrupt every thread that is inside an enclave here, and wait until each has left."""
        hide_unmapped(self._store)  # pages without an entry fault from now on
        self.kick_all()

    # --- for the processor ----------------------------------------------------------------------

    def translate(self, linaddr: int, access: int, *, user: bool) -> int:
        """Return the EPC address of an enclave's page, or a stand-in for ordinary memory.

        Deviation: every access to readable ordinary memory is allowed here; a store to read-only
        memory is refused later.

        Raises:
            PageFault: no entry, or it does not allow the access; the SGX bit is clear.
            MachineCheck: the page is poisoned.
        """
        page = linaddr & _PAGE_MASK
        record = self._entries.get(page)
        if record is not None:
            prot = self._prots.get(page, _READ_WRITE)
            if access & ~prot:
                present = Pfec.P if prot else 0  # PROT_NONE makes entries that are not present
                raise PageFault(linaddr, _code(access, user=user) | present)
            self._used.add(page)
            if record.poisoned:
                raise MachineCheck
            return record.page.addr | linaddr & ~_PAGE_MASK
        if self.memory_at(linaddr) is not None or not self.is_readable(linaddr):
            raise PageFault(linaddr, _code(access, user=user))
        return ordinary(self.index, linaddr)

    def paging_address(self, linaddr: int) -> int:
        """Return ``linaddr``: only guests have a second address."""
        return linaddr

    # --- for memory files -----------------------------------------------------------------------

    def maps(self, memory: EnclaveMemory, linaddr: int) -> bool:
        """Return whether ``memory`` is mapped at ``linaddr``."""
        return self.memory_at(linaddr) is memory

    def parts(self, memory: EnclaveMemory, start: int, end: int) -> list[tuple[int, int]]:
        """Return the ranges of ``[start, end)`` where no other memory file is mapped.

        Ranges without any mapping are included: the kernel may still have a mapping that the
        driver has removed.
        """
        found = []
        for first, last, mapped in self._mapped_in(start, end):
            if mapped is not memory:
                if start < first:
                    found.append((start, first))
                start = last
        if start < end:
            found.append((start, end))
        return found

    # --- for the engine -------------------------------------------------------------------------

    def entry(self, linaddr: int) -> tuple[int, int] | None:
        """Return (EPC address, PROT_* rights) of the page that holds ``linaddr``."""
        linaddr &= _PAGE_MASK
        record = self._entries.get(linaddr)
        if record is None:
            return None
        return record.page.addr, self._prots.get(linaddr, _READ_WRITE)

    def page(self, linaddr: int) -> EpcPage | None:
        """Return the EPC page of the entry for the page that holds ``linaddr``."""
        record = self._entries.get(linaddr & _PAGE_MASK)
        return None if record is None else record.page

    def is_poisoned(self, linaddr: int) -> bool:
        """Return whether the memory of the page that holds ``linaddr`` has an uncorrected error."""
        record = self._entries.get(linaddr & _PAGE_MASK)
        return record is not None and record.poisoned

    def is_shown(self, linaddr: int) -> bool:
        """Return whether the page that holds ``linaddr`` can be used without a fault."""
        return self.rights(linaddr) != 0

    def rights(self, linaddr: int) -> int:
        """Return the EPCM rights of the page that holds ``linaddr``; 0: it is not shown here."""
        record = self._entries.get(linaddr & _PAGE_MASK)
        return 0 if record is None else record.rights

    def mark(self, address: int) -> None:
        """Let the ENCLU at ``address`` trap faster from now on, if it is in read-only code."""
        memory = self.read_only_code(address, _ENCLU_BYTES)
        if memory is not None:
            memory.mark(address)
            self._marked[address & _PAGE_MASK] = memory

    def read_only_code(self, address: int, size: int) -> EnclaveMemory | None:
        """Return the memory file of an instruction in one shown page that cannot be written."""
        page, memory = self.page(address), self.memory_at(address)
        if page is None or memory is None or address % PAGE_BYTES > PAGE_BYTES - size:
            return None
        return memory if not page.rwx & WRITE and self.is_shown(address) else None

    def touched(self, linaddr: int, access: int) -> bool:
        """As :meth:`Pager.touched`."""
        return self.pager.touched(linaddr, access)

    def is_marked(self, address: int) -> bool:
        """Return whether :meth:`mark` has changed the instruction at ``address``."""
        memory = self._marked.get(address & _PAGE_MASK) or self.memory_at(address)
        return memory is not None and memory.is_enclu(address)

    def traps_at(self, address: int) -> bool:
        """Return whether the code at ``address`` can be executed here and is a marked ENCLU."""
        entry = self.entry(address)
        if entry is None or not entry[1] & self.rights(address) & EXECUTE:
            return False
        memory = self.memory_at(address)
        return memory is not None and memory.is_enclu(address)

    def refresh(self, linaddr: int) -> None:
        """The EPCM entry of the page at ``linaddr`` may have changed."""
        page = self.page(linaddr)
        if page is not None:
            self._store.refresh(page)

    def refresh_range(self, start: int, end: int) -> None:
        """EPCM entries of the pages in a range, huge and sparse perhaps, may have changed."""
        for linaddr in self._inside(start, end):
            self.refresh(linaddr)

    def _inside(self, start: int, end: int) -> list[int]:
        """Return the pages of a range that have entries."""
        entries = self._entries
        if (end - start) // PAGE_BYTES < len(entries):
            return [at for at in range(start, end, PAGE_BYTES) if at in entries]
        return sorted(at for at in entries if start <= at < end)

    def reshow(self, linaddr: int) -> None:
        """Set the rights of a page again, after a fault that its rights do not explain."""
        page = self.page(linaddr)
        if page is not None:
            self._store.refresh(page)
            rights = self.rights(linaddr)
            if rights:
                self.pager.set_rights(linaddr & _PAGE_MASK, rights)

    def __len__(self) -> int:
        return len(self._entries)


_ORDINARY = 1 << 60
_SPACE_SHIFT = 48
_LINADDR_BITS = (1 << _SPACE_SHIFT) - 1


def ordinary(index: int, linaddr: int) -> int:
    """Return the stand-in physical address of ordinary memory of address space ``index``."""
    return _ORDINARY | index << _SPACE_SHIFT | linaddr & _LINADDR_BITS


def split_ordinary(physical: int) -> tuple[int, int]:
    """Return (address space, linear address) of a stand-in made by :func:`ordinary`."""
    return (physical & ~_ORDINARY) >> _SPACE_SHIFT, physical & _LINADDR_BITS


def _code(access: int, *, user: bool) -> int:
    code = Pfec.U if user else 0
    if access == WRITE:
        code |= Pfec.W
    if access == EXECUTE:
        code |= Pfec.I
    return int(code)


hide_unmapped = NativeStore.hide_unmapped
if compiled.speedups is not None and compiled.speedups.bind("EnclavePageTable", EnclavePageTable):
    compiled.speedups.give("EnclavePageTable", EnclavePageTable)
    hide_unmapped = compiled.speedups.hide_unmapped
