"""One address space of the program: which of its pages are present, and the contents of the others.

A page of private memory is *present* or *hidden*.  A present page is in the program's page tables;
it is clean (write-protected, and the recorder knows its content) or written.  A hidden page is not
in the program's page tables: the recorder has its content, or a file has, or it is zero.  The
kernel reports the first access to a hidden page, and the first store to a clean one, by
userfaultfd, also when a system call makes it.

:meth:`AddressSpace.hide` hides present pages while the threads run: it write-protects the written
pages and copies them, and the :class:`~.resident.Resident` drops all of them.  A thread that stores
to such a page meanwhile waits, and then gets the page with the copied content.

Deviation: bytes that a device writes by direct I/O to a page while it is being hidden are lost.

Source:
    userfaultfd(2), process_vm_readv(2), Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from errno import EEXIST
from typing import Protocol

from softsgx.engines.native import abi, libc
from softsgx.engines.native.memory.memory_file import runs
from softsgx.engines.ordinary.contents import Contents
from softsgx.engines.ordinary.files import FileRanges
from softsgx.engines.ordinary.numbers import PageNumbers
from softsgx.engines.ordinary.pager import Pager
from softsgx.engines.ordinary.resident import Resident
from softsgx.engines.ordinary.userfaults import Userfaults

__all__ = ["Accesses", "AddressSpace", "Hold", "Snapshot"]

_SHIFT = 12
_MOST_READ = 512
_PRESENT_OR_SWAPPED = 0xC0
"""Bits 63 and 62 of an entry of pagemap, seen in its last byte."""


class Accesses(Protocol):
    """Receives accesses."""

    def accessed(self, space: AddressSpace, page: int, write: bool) -> None:
        """A hidden page was accessed; ``page`` is its address divided by 4096."""

    def written(self, space: AddressSpace, page: int) -> None:
        """A page that was read has been written."""

    def unmapped(self, space: AddressSpace, start: int, end: int) -> None:
        """Pages of a range of addresses are not mapped any more, or are new ones."""


@dataclass
class Snapshot:
    """The state of a copy of an address space at fork; see :class:`AddressSpace` for the fields."""

    present: dict[int, bool] = field(default_factory=dict)
    hidden: dict[int, int] = field(default_factory=dict)
    files: FileRanges = field(default_factory=FileRanges)
    break_at: int = 0


class Hold:
    """Until it is released, keeps pages from being hidden and faults in some ranges waiting.

    Args:
        space: the address space.
        changing: ranges in which faults wait.
        pins: pages that must stay present.
        whole: whether all pages must stay present; otherwise those of ``pins`` must.
    """

    def __init__(
        self,
        space: AddressSpace,
        *changing: tuple[int, int],
        pins: Iterable[int] = (),
        whole: bool = True,
    ) -> None:
        self._space: AddressSpace | None = space
        self._changing, self._pins, self._whole = changing, tuple(pins), whole
        space.holds += whole
        space.changing += changing
        space.pinned += self._pins

    def release(self) -> None:
        """End the hold; further calls do nothing."""
        space, self._space = self._space, None
        if space is None:
            return
        space.holds -= self._whole
        for each in self._changing:
            space.changing.remove(each)
        for page in self._pins:
            space.pinned.remove(page)
        if self._changing:
            space.serve_postponed()


class AddressSpace:
    """See the module.

    Args:
        resident: the recorder's task in it.
        faults: its userfaultfd.
        contents: of hidden pages.
        pager: has the contents that are not in ``hidden``.
        accesses: receives accesses.
        copy: its state after fork; ``None``: it is empty.

    Attributes:
        present: whether each present page is written, by page number.
        hidden: contents that the recorder has, by page; also those of clean present pages.
        files: files with the contents of other pages; a page in neither is zero.
        numbers: of its pages in the trace.
        pinned: pages that have to stay present.
        changing: ranges that unfinished system calls change: faults there wait.
        holds: number of unfinished operations during which no page may be hidden.
        break_at: the program break; 0: not known yet.
        wiped: pages that are zero in a child after fork.
        locks_memory: whether the kernel fills new mappings at once, after mlockall(2).
    """

    def __init__(
        self,
        resident: Resident,
        faults: Userfaults,
        contents: Contents,
        pager: Pager,
        accesses: Accesses,
        copy: Snapshot | None = None,
    ) -> None:
        self.resident, self.faults = resident, faults
        self._contents, self._pager, self._accesses = contents, pager, accesses
        self.numbers = PageNumbers()
        copy = copy or Snapshot()
        self.present, self.hidden, self.files = copy.present, copy.hidden, copy.files
        self.changing: list[tuple[int, int]] = []
        self.pinned: list[int] = []
        self.holds = 0
        self.break_at = copy.break_at
        self.wiped: set[int] = set()
        self.locks_memory = False
        self._postponed: list[tuple[int, int]] = []

    # --- faults ---------------------------------------------------------------------------------

    def serve(self) -> int:
        """Answer every fault that the kernel has to report; return how many."""
        served = 0
        for flags, address in self.faults.read():
            served += 1
            self._take(flags, address)
        return served

    def serve_postponed(self) -> None:
        """Answer the faults that have waited until a system call ended."""
        postponed, self._postponed = self._postponed, []
        for flags, address in postponed:
            self._take(flags, address)

    def _take(self, flags: int, address: int) -> None:
        if self._is_changing(address):
            self._postponed.append((flags, address))
        else:
            self._fault(flags, address)

    def _is_changing(self, address: int) -> bool:
        changing = self.changing
        return bool(changing) and any(low <= address < high for low, high in changing)

    def is_fixed(self, page: int) -> bool:
        """Return whether a page must not be hidden now."""
        return page in self.pinned or self._is_changing(page << _SHIFT)

    def _fault(self, flags: int, address: int) -> None:
        page = address >> _SHIFT
        written = self.present.get(page)
        write = bool(flags & (abi.UFFD_PAGEFAULT_FLAG_WRITE | abi.UFFD_PAGEFAULT_FLAG_WP))
        if written is None:
            self.show(page, write)
        elif write and not written:
            self.present[page] = True
            self._accesses.written(self, page)
            self.faults.protect(page << _SHIFT, page + 1 << _SHIFT, on=False)
        else:  # another thread's fault was first
            self.faults.wake(page << _SHIFT)

    def show(self, page: int, write: bool) -> None:
        """Make a hidden page present, if it is mapped, and record the access."""
        self._pager.need(self, page)
        content = self.hidden.get(page)
        if content is None:
            content = self._initial(page)
        if content is None:
            self.faults.poison(page << _SHIFT)
            return
        code = self.faults.copy(page << _SHIFT, content, protect=not write)
        if not code or code == EEXIST:
            self.present[page] = write or code == EEXIST
            self._accesses.accessed(self, page, write)

    def first_bytes(self, page: int) -> bytes | None:
        """Return the initial bytes of a page, empty for zeros; ``None``: behind the file's end."""
        part = self.files.find(page << _SHIFT)
        if part is None:
            return b""
        return part.file.page(part.offset + (page << _SHIFT) - part.start)

    def _initial(self, page: int) -> int | None:
        """Return the initial content of a page; ``None``: it is behind the file's end."""
        data = self.first_bytes(page)
        if not data:
            return None if data is None else self._contents.zero
        content = self.hidden[page] = self._contents.store(data)
        return content

    def make_writable(self, page: int) -> None:
        """Make one page present and writable, and record a store to it."""
        written = self.present.get(page)
        if written is None:
            self.show(page, True)
        elif not written:
            self.present[page] = True
            self._accesses.written(self, page)
            self.faults.protect(page << _SHIFT, page + 1 << _SHIFT, on=False)

    def read(self, address: int, size: int) -> bytes:
        """Return ``size`` bytes of memory, fewer where it ends; the pages count as accessed."""
        found = b""
        while len(found) < size and address < abi.TASK_SIZE:
            length = min(size - len(found), abi.PAGE - address % abi.PAGE)
            if address >> _SHIFT not in self.present:
                self.show(address >> _SHIFT, False)  # else pread would wait for the recorder itself
            try:
                part = os.pread(self.resident.memory, length, address)
            except OSError:
                break
            found, address = found + part, address + len(part)
        return found

    # --- hiding ---------------------------------------------------------------------------------

    def hide_all(self) -> None:
        """Hide every present page that is not pinned."""
        assert not self.holds, "pages are hidden while a system call changes them"
        self.hide(self.present.keys() - self.pinned)

    def hide(self, some: Iterable[int]) -> None:
        """Hide those of some pages that are present; see :meth:`is_fixed`."""
        pages = sorted(page for page in some if page in self.present)
        if not pages:
            return
        written = [page << _SHIFT for page in pages if self.present[page]]
        for start, end in runs(written):
            self._save(start, end)
        self.resident.drop(runs([page << _SHIFT for page in pages]))
        for page in pages:
            self.present.pop(page, None)

    def _save(self, start: int, end: int) -> None:
        """Copy a run of written pages, which are write-protected from now on."""
        self.faults.protect(start, end, on=True)
        # A read of an absent page would be a fault that waits for the recorder itself.
        there = self._pages_present(start, end)
        if len(there) << _SHIFT != end - start:
            for page in {*range(start >> _SHIFT, end >> _SHIFT)} - {*there}:
                self._forget(page)
        for low, high in runs([page << _SHIFT for page in there]):
            for first in range(low, high, _MOST_READ << _SHIFT):
                self._copy_out(first, min(high, first + (_MOST_READ << _SHIFT)))

    def _copy_out(self, start: int, end: int) -> None:
        vector = array("Q")
        for page in range(start >> _SHIFT, end >> _SHIFT):
            vector.extend((self._own_content(page), abi.PAGE))
        done = libc.read_scattered(self.resident.tid, vector, start, end - start)
        for page in range(start + done >> _SHIFT, end >> _SHIFT):  # not readable by the program
            self._copy_unreadable(page)

    def _copy_unreadable(self, page: int) -> None:
        try:
            data = os.pread(self.resident.memory, abi.PAGE, page << _SHIFT)
        except OSError:  # not mapped any more
            self._forget(page)
            return
        self._contents.fill(self.hidden[page], data)

    def _own_content(self, page: int) -> int:
        """Return a content for a written page that it shares with no other page."""
        content = self.hidden.get(page)
        if content is not None and self._contents.is_shared(content):
            self._contents.release(content)
            content = None
        if content is None:
            content = self.hidden[page] = self._contents.allocate()
        return content

    # --- changes of mappings --------------------------------------------------------------------

    def register(self, start: int, end: int) -> None:
        """Record accesses to a range of anonymous private memory from now on.

        Raises:
            OSError: see :meth:`.userfaults.Userfaults.register`.
        """
        self.faults.register(start, end)

    def register_anew(self, start: int, end: int) -> None:
        """Register memory that the kernel has moved; stores to clean pages are reported again."""
        self.register(start, end)
        low, high = start >> _SHIFT, end >> _SHIFT
        self.protect_clean(page for page in self.present if low <= page < high)

    def adopt(self, start: int, end: int) -> None:
        """Record pages that the kernel has made present without a fault as accessed and written."""
        for page in self._pages_present(start, end):
            if page not in self.present:
                self.present[page] = True
                self._accesses.accessed(self, page, True)

    def _pages_present(self, start: int, end: int) -> list[int]:
        found = []
        for first in range(start >> _SHIFT, end >> _SHIFT, 1 << 16):
            count = min((end >> _SHIFT) - first, 1 << 16)
            words = os.pread(self.resident.pagemap, 8 * count, 8 * first)
            found += [
                first + at for at, high in enumerate(words[7::8]) if high & _PRESENT_OR_SWAPPED
            ]
        return found

    def forget(self, start: int, end: int) -> None:
        """Drop the contents of a range: its pages have their initial content at the next access."""
        for page in self._known(start, end):
            self._forget(page)

    def unmapped(self, start: int, end: int) -> None:
        """The range was unmapped, or newly mapped: drop its contents and its files."""
        self.forget(start, end)
        self._accesses.unmapped(self, start, end)
        self.files.remove(start, end)
        if self.wiped:
            self.wiped = {page for page in self.wiped if not start <= page << _SHIFT < end}

    def before_move(self, start: int, end: int) -> None:
        """Prepare for mremap(2): pages of a finite EPC are hidden before they move."""
        if self._pager.is_finite:
            self.hide([page for page in self._known(start, end) if page not in self.pinned])

    def move(self, start: int, end: int, to: int) -> None:
        """The kernel has moved the pages of a range to the address ``to``: move their state."""
        distance = (to - start) >> _SHIFT
        present, hidden = {}, {}
        for page in self._known(start, end):
            content = self._pager.take(self, page)
            if content is not None:
                hidden[page + distance] = content
            if page in self.present:
                present[page + distance] = self.present[page]
            self._forget(page)
        self._accesses.unmapped(self, start, end)
        parts = self.files.within(start, end)
        self.files.remove(start, end)
        self.unmapped(to, to + end - start)
        self.present |= present
        for page, written in present.items():  # each is a new page of the enclave
            self._accesses.accessed(self, page, written)
        for page, content in hidden.items():
            self._pager.give(self, page, content)
        for part in parts:
            self.files.add(part.moved(to - start))

    def protect_clean(self, pages: Iterable[int]) -> None:
        """Write-protect the clean pages among ``pages`` again: registering has cleared that."""
        clean = [page << _SHIFT for page in sorted(pages) if not self.present[page]]
        for start, end in runs(clean):
            self.faults.protect(start, end, on=True)

    def _known(self, start: int, end: int) -> list[int]:
        """Return the pages of a range that are present or have a content, in order."""
        low, high = start >> _SHIFT, end + abi.PAGE - 1 >> _SHIFT
        present, hidden, evicted = self.present, self.hidden, self._pager.evicted(self)
        found = {page for page in evicted if low <= page < high}
        if high - low <= len(present) + len(hidden):
            found.update(page for page in range(low, high) if page in present or page in hidden)
        else:
            found.update(page for page in (*present, *hidden) if low <= page < high)
        return sorted(found)

    def _forget(self, page: int) -> None:
        self.present.pop(page, None)
        if self._pager.forgotten(self, page):
            return
        content = self.hidden.pop(page, None)
        if content is not None:
            self._contents.release(content)

    # --- fork and end ---------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return the state for a child that fork makes now."""
        present = {page: each for page, each in self.present.items() if page not in self.wiped}
        hidden = {}
        for page in {*self.hidden, *self._pager.evicted(self)} - self.wiped:
            content = self._pager.take(self, page)
            if content is not None:
                hidden[page] = content
        return Snapshot(present, hidden, self.files.copy(), self.break_at)

    def settle_fork(self, ranges: list[tuple[int, int]]) -> None:
        """Record the private memory of a copy from now on; its thread is stopped.

        Pages that the parent was shown after the fork are hidden here.  A page that is present here
        and was hidden at the fork was made present by an access of the kernel: it is dropped.
        """
        there = [page for start, end in ranges for page in self._pages_present(start, end)]
        made = sorted(page << _SHIFT for page in there if page not in self.present)
        if made:
            self.resident.drop(runs(made))
        self.present = {page: self.present[page] for page in there if page in self.present}
        for start, end in ranges:
            self.register(start, end)
        self.protect_clean(self.present)
        self._pager.forked(self)

    def collect(self) -> None:
        """Hide every present page of a copy, also clean ones: their contents are copied."""
        for page in self.present:
            self.present[page] = True
        self.hide(self.present)

    def close(self) -> None:
        """Release its contents, its task and its userfaultfd; its last thread has ended."""
        for content in self.hidden.values():
            self._contents.release(content)
        self.hidden.clear()
        self.resident.end()
        self.faults.close()
