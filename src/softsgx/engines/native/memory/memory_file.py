"""The memory file behind one open ``/dev/sgx_enclave``: bytes that the program's mappings share.

Every mapping of the device in the program is a mapping of this file, at the offset that equals the
linear address.  The store (:mod:`.store`) decides which pages are in it.  Where a page is not, the
file has a hole, and each access of the program faults.

In shown read-only code, single bytes can be *marked*: they differ from the enclave's own bytes, so
that an instruction traps.  Reads through this class return the enclave's own bytes.

Deviation: in shown read-only code, an ENCLU that was executed before starts with HLT, which traps
faster; MOV EAX, 4 in front of an ENCLU is a jump to code that does EEXIT (``vdso/permits.py``); and
CPUID is UD2 where the processor cannot make it fault.  Where XFRM is not this machine's XCR0,
instructions on extended state are UD2, and loads of EDX:EAX in front of them are jumps
(``vdso/state_jumps.py``).  Pages that are evicted, or are read through the machine, have their own
bytes, and so has an instruction that raised an exception
(:mod:`softsgx.engines.native.faults.breakpoints`).  Only the enclave itself can see the difference,
when it reads code that has raised none.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable
from typing import Protocol

from softsgx import compiled
from softsgx.arch import PAGE_BYTES
from softsgx.engines.native import abi, kernel
from softsgx.engines.native.memory.page_maps import page_rights

__all__ = [
    "ALL_RIGHTS",
    "EXECUTE",
    "MEMORY_FILE_BYTES",
    "READ",
    "WRITE",
    "EnclaveMemory",
    "Guard",
    "User",
    "runs",
]

MEMORY_FILE_BYTES = 1 << 47
#: Rights of an EPCM entry, as bits.
READ, WRITE, EXECUTE = 1, 2, 4
ALL_RIGHTS = READ | WRITE | EXECUTE

_SEALS = abi.F_SEAL_SEAL | abi.F_SEAL_SHRINK | abi.F_SEAL_GROW
_WINDOW_SHIFT = 21
_WINDOW_MASK = (1 << _WINDOW_SHIFT) - 1
_HLT, _ENCLU_BYTE = b"\xf4", b"\x0f"
_UD2_END = b"\x0b"


class Guard(Protocol):
    """What an address space must do when a memory file that it maps changes.

    Rights are those of EPCM entries: the sum of READ (1), WRITE (2) and EXECUTE (4).
    """

    def before_hide(self, start: int, end: int) -> None:
        """Make stores to the pages of a range impossible; loads may continue."""

    def after_hide(self, start: int, end: int) -> None:
        """The pages are holes in the file now: every access must fault."""

    def show(self, linaddr: int, data: bytes | bytearray, rights: int) -> bool:
        """Fill the hole and make the page usable here, in one step.

        Returns:
            ``False``: this pager cannot fill it, and nothing has changed.
        """

    def shown(self, linaddr: int, rights: int) -> None:
        """The hole was filled through another page table: make the page usable here too."""

    def set_rights(self, linaddr: int, rights: int) -> None:
        """The EPCM entry of a shown page has these rights now."""

    def flush(self) -> None:
        """Make the deferred calls; the supervisor resumes the program next."""


class User(Protocol):
    """One address space that maps a memory file, or has mapped it."""

    @property
    def pager(self) -> Guard:
        """The guard of this address space."""

    def maps(self, memory: EnclaveMemory, linaddr: int) -> bool:
        """Return whether ``memory`` is mapped at ``linaddr``."""

    def parts(self, memory: EnclaveMemory, start: int, end: int) -> list[tuple[int, int]]:
        """Return the ranges of ``[start, end)`` where no other memory file is mapped."""

    def refresh_range(self, start: int, end: int) -> None:
        """EPCM entries of the pages in a range may have changed."""


class EnclaveMemory:
    """The memory file behind one open ``/dev/sgx_enclave``.

    The program's descriptor is another open file description of the same file.  The supervisor puts
    a lock on that description.  The kernel drops the lock when the last process has closed and
    unmapped the file, which is when Linux would release a device file.

    Attributes:
        fd: the supervisor's descriptor.
        key: (device, inode) of the file.
        users: the address spaces that map it, or have mapped it and may again.
        pages: rights of the pages whose bytes are in the file, by linear address.
        marked: by page, the offsets of bytes that are not the enclave's own, and what those are:
            ENCLU instructions that start with HLT, forbidden ones that are UD2, and jumps.
        forbidden: returns the offsets of the second opcode byte of each instruction in a page of
            code that must trap instead of being executed by this machine; ``None``: there are none.
        trapped: addresses of such bytes that keep their value: a breakpoint is at the instruction.
        jumps: addresses where a jump to our vDSO replaces an instruction, with the number of bytes
            replaced.
        former_jumps: addresses of such jumps that were removed while threads may have been
            executing them.
    """

    __slots__ = (
        "_windows",
        "fd",
        "forbidden",
        "former_jumps",
        "jumps",
        "key",
        "marked",
        "pages",
        "trapped",
        "users",
    )

    def __init__(self, theirs: int) -> None:
        """Open the file of ``theirs``, the supervisor's duplicate of the program's descriptor.

        ``theirs`` is closed.  Its file must allow sealing: the seals keep all processes from
        changing its size.
        """
        self.users: list[User] = []
        self.pages = page_rights()
        self.marked: dict[int, dict[int, bytes]] = {}
        self.forbidden: Callable[[bytes], list[int]] | None = None
        self.trapped: set[int] = set()
        self.jumps: dict[int, int] = {}
        self.former_jumps: set[int] = set()
        self._windows: dict[int, mmap.mmap] = {}
        try:
            self.fd = os.open(f"/proc/self/fd/{theirs}", os.O_RDWR | os.O_CLOEXEC)
            try:
                self._prepare(theirs)
            except OSError:
                os.close(self.fd)
                raise
        finally:
            os.close(theirs)

    def _prepare(self, theirs: int) -> None:
        fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(self.fd, MEMORY_FILE_BYTES)
        fcntl.fcntl(self.fd, abi.F_ADD_SEALS, _SEALS)
        info = os.fstat(self.fd)
        self.key = info.st_dev, info.st_ino

    def released(self) -> bool:
        """Return whether the program has neither a descriptor nor a mapping of it."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self.fd, fcntl.LOCK_UN)
        return True

    def close(self) -> None:
        """Release the memory."""
        for window in self._windows.values():
            window.close()
        self._windows.clear()
        os.close(self.fd)

    def hide(self, pages: list[int]) -> list[bytes]:
        """Take pages out of the file and return their bytes; no store is lost in between.

        Args:
            pages: their linear addresses, ascending.
        """
        parts = runs(pages)
        guarded = [
            (user.pager, *part)
            for start, end in parts
            for user in self.users
            for part in user.parts(self, start, end)
        ]
        # A guard may find a thread that has ended inside, and its exit still stores into an SSA
        # frame: so all pages stay in place until every guard has returned.
        for guard, low, high in guarded:
            guard.before_hide(low, high)
        for linaddr in pages:
            self.pages.discard(linaddr)
        contents = kernel.take_pages(self.fd, parts)
        for guard, low, high in guarded:
            guard.after_hide(low, high)
        if self.marked:
            for index, linaddr in enumerate(pages):
                offsets = self.marked.pop(linaddr, None)
                if offsets is not None:
                    contents[index] = _own_bytes(contents[index], 0, offsets)
                    self._forget_jumps(linaddr)
        return contents

    def mark(self, address: int) -> None:
        """Make the ENCLU at ``address``, in a shown page, trap faster.

        One byte is written, so a thread that executes it meanwhile sees the old or the new byte.
        """
        os.pwrite(self.fd, _HLT, address)
        marks = self.marked.setdefault(address & -PAGE_BYTES, {})
        marks[address % PAGE_BYTES] = _ENCLU_BYTE

    def forbid(self, linaddr: int, data: bytes) -> bytes:
        """Return a page of code with forbidden instructions (0F xx) replaced by UD2."""
        sites = [] if self.forbidden is None else self.forbidden(data)
        if self.trapped:
            sites = [site for site in sites if linaddr + site not in self.trapped]
        if not sites:
            return data
        marks = self.marked.setdefault(linaddr, {})
        shown = bytearray(data)
        for site in sites:
            shown[site : site + 1] = _UD2_END
            marks[site] = data[site : site + 1]
        return bytes(shown)

    def forbid_shown(self, linaddr: int) -> None:
        """Make forbidden instructions of a shown page UD2, a byte at a time."""
        before = set(self.marked.get(linaddr, ()))
        data = self.read(linaddr, PAGE_BYTES)
        shown = self.forbid(linaddr, data)
        for site in self.marked.get(linaddr, ()):
            if site not in before:
                os.pwrite(self.fd, shown[site : site + 1], linaddr + site)

    def forbid_again(self, address: int) -> None:
        """The instruction with its second opcode byte at ``address`` has lost its breakpoint."""
        self.trapped.discard(address)
        page = address & -PAGE_BYTES
        if not self.pages.get(page, WRITE) & WRITE:
            self.forbid_shown(page)

    def jump_at(self, address: int, jump: bytes) -> None:
        """Replace the bytes at ``address``, in a shown page of code, by a jump.

        No thread executes code of the enclave meanwhile.
        """
        page, offset = address & -PAGE_BYTES, address % PAGE_BYTES
        own = self.read(address, len(jump))
        os.pwrite(self.fd, jump, address)
        marks = self.marked.setdefault(page, {})
        for index in range(len(jump)):
            marks[offset + index] = own[index : index + 1]
        self.jumps[address] = len(jump)

    def unmark_at(self, address: int) -> None:
        """Give the instruction at ``address`` of a shown page, which is marked, its own bytes."""
        marks = self.marked[address & -PAGE_BYTES]
        if address in self.jumps:
            self._end_jump(address, marks)
        else:
            os.pwrite(self.fd, marks.pop(address % PAGE_BYTES), address)

    def _end_jump(self, address: int, marks: dict[int, bytes]) -> None:
        """Restore the bytes that a jump replaced; the first one traps until the rest is there."""
        offset, size = address % PAGE_BYTES, self.jumps.pop(address)
        own = b"".join(marks.pop(offset + index) for index in range(size))
        self.former_jumps.add(address)
        os.pwrite(self.fd, _HLT, address)
        os.pwrite(self.fd, own[1:], address + 1)
        os.pwrite(self.fd, own[:1], address)

    def end_jumps(self) -> None:
        """Restore the bytes that all jumps have replaced."""
        for address in list(self.jumps):
            self._end_jump(address, self.marked[address & -PAGE_BYTES])

    def _forget_jumps(self, page: int) -> None:
        for address in [at for at in self.jumps if at & -PAGE_BYTES == page]:
            del self.jumps[address]

    def is_enclu(self, address: int) -> bool:
        """Return whether the instruction at ``address`` is a marked ENCLU."""
        marks = self.marked.get(address & -PAGE_BYTES)
        return marks is not None and marks.get(address % PAGE_BYTES) == _ENCLU_BYTE

    def unmark(self, linaddr: int) -> None:
        """Give the marked instructions of a page their own bytes back."""
        marks = self.marked.pop(linaddr, {})
        for address in [at for at in self.jumps if at & -PAGE_BYTES == linaddr]:
            self._end_jump(address, marks)
        for offset, byte in marks.items():
            os.pwrite(self.fd, byte, linaddr + offset)

    def read(self, address: int, size: int) -> bytes:
        """Return the enclave's own bytes at ``address``; the range is in one shown page."""
        start = address & _WINDOW_MASK
        data = self._window(address)[start : start + size]
        offsets = self.marked.get(address & -PAGE_BYTES)
        return data if offsets is None else _own_bytes(data, address % PAGE_BYTES, offsets)

    def write(self, address: int, data: bytes) -> None:
        """Replace bytes of a shown page."""
        if self.marked:
            self.unmark(address & -PAGE_BYTES)
        start = address & _WINDOW_MASK
        self._window(address)[start : start + len(data)] = data

    def code(self, address: int, size: int) -> bytes:
        """Return bytes at ``address`` as the program sees them, fewer where a page is a hole.

        Args:
            address: where they begin.
            size: a page at most.
        """
        rest = -address % PAGE_BYTES or PAGE_BYTES
        if address & -PAGE_BYTES not in self.pages:
            return b""
        if rest < size and address + rest not in self.pages:
            size = rest
        return os.pread(self.fd, size, address)

    def own_code(self, address: int, size: int) -> bytes:
        """As :meth:`code`, the enclave's own bytes."""
        data = self.code(address, size)
        if self.marked:
            for page in (address & -PAGE_BYTES, address + len(data) - 1 & -PAGE_BYTES):
                marks = self.marked.get(page)
                if marks is not None:
                    data = _own_bytes(data, address - page, marks)
        return data

    def _window(self, address: int) -> mmap.mmap:
        """Return the supervisor's mapping around ``address``, for bytes of shown pages.

        No access through it may touch a hole: that would fill the hole with zeros.
        """
        number = address >> _WINDOW_SHIFT
        window = self._windows.get(number)
        if window is None:
            start = number << _WINDOW_SHIFT
            window = self._windows[number] = mmap.mmap(self.fd, 1 << _WINDOW_SHIFT, offset=start)
        return window

    def show(
        self, linaddr: int, data: bytes | bytearray, rights: int, user: User | None = None
    ) -> None:
        """Put the page into the file at once: no thread sees it half filled.

        Args:
            linaddr: its address.
            data: its bytes.
            rights: those of its EPCM entry.
            user: one that maps the file there; ``None``: each user is asked.
        """
        self.pages[linaddr] = rights
        if user is not None and self.users == [user]:
            guard = user.pager
            if not guard.show(linaddr, data, rights):
                os.pwrite(self.fd, data, linaddr)
                guard.shown(linaddr, rights)
            return
        filled = False
        others: list[Guard] = []
        for user in self.users:
            if user.maps(self, linaddr):
                guard = user.pager
                if not filled and guard.show(linaddr, data, rights):
                    filled = True
                else:
                    others.append(guard)
        if not filled:
            # A whole page written through the descriptor appears at once: the kernel holds it
            # locked, and faults wait, until it is full.
            os.pwrite(self.fd, data, linaddr)
        for guard in others:
            guard.shown(linaddr, rights)

    def set_rights(self, linaddr: int, rights: int) -> None:
        """Give a shown page the rights of its EPCM entry."""
        self.pages[linaddr] = rights
        for guard in self._guards_at(linaddr):
            guard.set_rights(linaddr, rights)

    def within(self, start: int, end: int) -> dict[int, int]:
        """Return :attr:`pages` of a range."""
        return self.pages.within(start, end)

    def _guards_at(self, linaddr: int) -> list[Guard]:
        """Return the guards of the address spaces that map this file at ``linaddr``."""
        return [user.pager for user in self.users if user.maps(self, linaddr)]


def python_runs(pages: list[int]) -> list[tuple[int, int]]:
    """Return (start, end) of each run of adjacent pages; ``pages`` are ascending."""
    found: list[tuple[int, int]] = []
    start = end = -1
    for page in pages:
        if page != end:
            if end >= 0:
                found.append((start, end))
            start = page
        end = page + PAGE_BYTES
    if end >= 0:
        found.append((start, end))
    return found


def _own_bytes(data: bytes, start: int, marks: dict[int, bytes]) -> bytes:
    """Return ``data``, the bytes of a page from ``start`` on, without marks."""
    own = bytearray(data)
    for offset, byte in marks.items():
        if start <= offset < start + len(own):
            own[offset - start : offset - start + 1] = byte
    return bytes(own)


runs = python_runs
if compiled.speedups is not None:
    runs = compiled.speedups.runs
    if compiled.speedups.bind("EnclaveMemory", EnclaveMemory):
        compiled.speedups.give("EnclaveMemory", EnclaveMemory)
