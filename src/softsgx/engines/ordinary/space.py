"""One address space of the program: which of its pages are present, and the contents of the others.

A page of private memory is *present*: the program has it, clean (write-protected, its content is
known) or written; or it is *hidden*: not in the program's page tables, and the recorder has its
content, or a file has, or it is zero.  The first access to a hidden page, and the first store to a
clean one, are faults that the kernel reports by userfaultfd, also those of system calls.

:meth:`AddressSpace.hide` hides every present page while the threads run: it write-protects the
written pages, copies them, and has all dropped by the :class:`~.resident.Resident`.  A store
meanwhile waits, and finds its page again, with what was copied.

Deviation: memory that a device writes by direct I/O while it is hidden loses what is written.

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
from softsgx.engines.ordinary.resident import Resident
from softsgx.engines.ordinary.userfaults import Userfaults

__all__ = ["Accesses", "AddressSpace", "Hold", "Snapshot"]

_SHIFT = 12
_MOST_READ = 512
_PRESENT_OR_SWAPPED = 0xC0
"""Bits 63 and 62 of an entry of pagemap, seen in its last byte."""


class Accesses(Protocol):
    """What is told of accesses."""

    def accessed(self, space: AddressSpace, page: int, write: bool) -> None:
        """A hidden page was accessed; ``page`` is its address divided by 4096."""

    def written(self, space: AddressSpace, page: int) -> None:
        """A page that was read has been written."""


@dataclass
class Snapshot:
    """What a copy of an address space begins with; the fields are those of the address space."""

    present: dict[int, bool] = field(default_factory=dict)
    hidden: dict[int, int] = field(default_factory=dict)
    files: FileRanges = field(default_factory=FileRanges)
    break_at: int = 0


class Hold:
    """Keeps an address space from being hidden, and faults in some ranges waiting, for a time."""

    def __init__(self, space: AddressSpace, *changing: tuple[int, int]) -> None:
        self._space: AddressSpace | None = space
        self._changing = changing
        space.holds += 1
        space.changing += changing

    def release(self) -> None:
        """The time is over; more than once does nothing."""
        space, self._space = self._space, None
        if space is None:
            return
        space.holds -= 1
        for each in self._changing:
            space.changing.remove(each)
        if self._changing:
            space.settle()


class AddressSpace:
    """See the module.

    Args:
        resident: our task in it.
        faults: its userfaultfd.
        contents: of hidden pages.
        accesses: is told of them.
        copy: what fork has copied.

    Attributes:
        present: whether each present page is written, by page number.
        hidden: the content of pages that the recorder has, also of clean present ones.
        files: the content of the others, where it is not zero.
        changing: ranges that system calls under way are changing: faults there wait.
        holds: how many things are under way that hiding pages could disturb.
        break_at: the program break, 0 while it is not known.
        wiped: pages that a child made by fork finds zero.
    """

    def __init__(
        self,
        resident: Resident,
        faults: Userfaults,
        contents: Contents,
        accesses: Accesses,
        copy: Snapshot | None = None,
    ) -> None:
        self.resident, self.faults = resident, faults
        self._contents, self._accesses = contents, accesses
        copy = copy or Snapshot()
        self.present, self.hidden, self.files = copy.present, copy.hidden, copy.files
        self.changing: list[tuple[int, int]] = []
        self.holds = 0
        self.break_at = copy.break_at
        self.wiped: set[int] = set()
        self._postponed: list[tuple[int, int]] = []

    # --- faults ---------------------------------------------------------------------------------

    def serve(self) -> int:
        """Answer every fault that the kernel has to report; return how many."""
        served = 0
        for flags, address in self.faults.read():
            served += 1
            self._take(flags, address)
        return served

    def settle(self) -> None:
        """Answer the faults that have waited for a system call that has ended."""
        postponed, self._postponed = self._postponed, []
        for flags, address in postponed:
            self._take(flags, address)

    def _take(self, flags: int, address: int) -> None:
        if self.changing and any(low <= address < high for low, high in self.changing):
            self._postponed.append((flags, address))
        else:
            self._fault(flags, address)

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
        """Let a hidden page be present, where it is mapped: it is accessed."""
        content = self.hidden.get(page)
        if content is None:
            content = self._load(page)
        if content is None:
            self.faults.poison(page << _SHIFT)
            return
        code = self.faults.copy(page << _SHIFT, content, protect=not write)
        if not code or code == EEXIST:
            self.present[page] = write or code == EEXIST
            self._accesses.accessed(self, page, write)

    def _load(self, page: int) -> int | None:
        """Return the content of a page that was not written; ``None``: its file has none."""
        part = self.files.find(page << _SHIFT)
        if part is None:
            return self._contents.zero
        data = part.file.page(part.offset + (page << _SHIFT) - part.start)
        if data is None:
            return None
        content = self.hidden[page] = self._contents.store(data)
        return content

    def make_writable(self, page: int) -> None:
        """Let one page be present, and the next store to it pass."""
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
                self.show(address >> _SHIFT, False)  # or our own reading waits for us
            try:
                part = os.pread(self.resident.memory, length, address)
            except OSError:
                break
            found, address = found + part, address + len(part)
        return found

    # --- hiding ---------------------------------------------------------------------------------

    def hide(self) -> None:
        """Hide every present page.

        Raises:
            Gone: the address space has ended.
        """
        assert not self.holds, "pages are hidden while a system call changes them"
        pages = sorted(self.present)
        if not pages:
            return
        written = [page << _SHIFT for page in pages if self.present[page]]
        for start, end in runs(written):
            self._save(start, end)
        self.resident.drop(runs([page << _SHIFT for page in pages]))
        self.present.clear()

    def _save(self, start: int, end: int) -> None:
        """Copy a run of written pages, which are write-protected from now on."""
        self.faults.protect(start, end, on=True)
        # Reading a page that is not there would be a fault that waits for the recorder itself.
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
        """Return where the content of a written page goes: no other page has it."""
        content = self.hidden.get(page)
        if content is not None and self._contents.is_shared(content):
            self._contents.release(content)
            content = None
        if content is None:
            content = self.hidden[page] = self._contents.allocate()
        return content

    # --- changes of mappings --------------------------------------------------------------------

    def register(self, start: int, end: int) -> None:
        """Pages of anonymous private memory count from now on.

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
        """Pages that are present in a range, by no fault of ours, are accessed and written."""
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
        """Pages of a range are zero, or as in their file, at their next access."""
        for page in self._known(start, end):
            self._forget(page)

    def unmapped(self, start: int, end: int) -> None:
        """A range has new pages, or none."""
        self.forget(start, end)
        self.files.remove(start, end)
        if self.wiped:
            self.wiped = {page for page in self.wiped if not start <= page << _SHIFT < end}

    def move(self, start: int, end: int, to: int) -> None:
        """The kernel has moved pages to an address."""
        distance = (to - start) >> _SHIFT
        pages = self._known(start, end)
        present = {at + distance: self.present.pop(at) for at in pages if at in self.present}
        hidden = {at + distance: self.hidden.pop(at) for at in pages if at in self.hidden}
        parts = self.files.within(start, end)
        self.files.remove(start, end)
        self.unmapped(to, to + end - start)
        self.present |= present
        self.hidden |= hidden
        for part in parts:
            self.files.add(part.moved(to - start))

    def protect_clean(self, pages: Iterable[int]) -> None:
        """Write-protect clean ones of present pages again, in memory that is registered anew."""
        clean = [page << _SHIFT for page in sorted(pages) if not self.present[page]]
        for start, end in runs(clean):
            self.faults.protect(start, end, on=True)

    def _known(self, start: int, end: int) -> list[int]:
        """Return the pages of a range that are present or have a content."""
        low, high = start >> _SHIFT, end + abi.PAGE - 1 >> _SHIFT
        present, hidden = self.present, self.hidden
        if high - low <= len(present) + len(hidden):
            return [page for page in range(low, high) if page in present or page in hidden]
        return [page for page in {*present, *hidden} if low <= page < high]

    def _forget(self, page: int) -> None:
        self.present.pop(page, None)
        content = self.hidden.pop(page, None)
        if content is not None:
            self._contents.release(content)

    # --- birth and death ------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return what a child begins with that fork makes now."""
        hidden = {page: each for page, each in self.hidden.items() if page not in self.wiped}
        present = {page: each for page, each in self.present.items() if page not in self.wiped}
        for content in hidden.values():
            self._contents.share(content)
        return Snapshot(present, hidden, self.files.copy(), self.break_at)

    def settle_fork(self, ranges: list[tuple[int, int]]) -> None:
        """This is a copy, stopped: begin to count the pages of its private memory.

        The parent may have gone on: pages that it has been shown since are hidden here.  A page
        that is present here and was hidden when fork copied it was made by an access of the kernel.
        """
        there = [page for start, end in ranges for page in self._pages_present(start, end)]
        made = sorted(page << _SHIFT for page in there if page not in self.present)
        if made:
            self.resident.drop(runs(made))
        self.present = {page: self.present[page] for page in there if page in self.present}
        for start, end in ranges:
            self.register(start, end)
        self.protect_clean(self.present)

    def close(self) -> None:
        """No thread of the program has it any more."""
        for content in self.hidden.values():
            self._contents.release(content)
        self.hidden.clear()
        self.resident.end()
        self.faults.close()
