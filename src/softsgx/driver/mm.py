"""An address space as the driver sees it: its mappings of enclaves and their system calls.

It has no other mappings.  :class:`Ptes` is the interface to its page tables, those of a simulated
process or of a real one.

Lock order: ``mmap_lock``, then an enclave's lock, then the core's.  Faults and the reclaimer's
walks hold it for reading, so they must not allocate with reclaim; system calls that change mappings
hold it for writing.

Source:
    arch/x86/kernel/cpu/sgx/{driver,encl}.c; mm/mmap.c, mm/mremap.c for the rules of all mappings.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from errno import EEXIST, EFAULT, EINVAL, ENOMEM
from typing import TYPE_CHECKING, Protocol

from softsgx.arch import PAGE_BYTES, page_of
from softsgx.compiled import record
from softsgx.driver.sync import RwLock
from softsgx.driver.uapi import (
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    refuse,
)
from softsgx.ondemand import dataclass, replace
from softsgx.paging import FaultResult
from softsgx.runtime import Runtime

if TYPE_CHECKING:
    from softsgx.driver.enclave import Enclave, EnclaveMm
    from softsgx.driver.file import EnclaveFile
    from softsgx.driver.task import Task

__all__ = ["EnclaveVma", "Mm", "Ptes", "put_files"]

_PROT_ALL = PROT_READ | PROT_WRITE | PROT_EXEC
_MMAP_TOP = 0x7FFF_0000_0000
_TASK_SIZE = 1 << 47


class Ptes(Protocol):
    """The page-table entries of one address space, as far as they map enclaves."""

    def install(self, linaddr: int, epc_addr: int, prot: int) -> None:
        """Map the page at ``linaddr`` with PROT_* rights, not accessed; replaces an old entry.

        Raises:
            MemoryError: no memory for page tables; the fault ends with SIGBUS.
        """

    def zap(self, linaddr: int) -> None:
        """Remove the page's entry, if there is one."""

    def entry(self, linaddr: int) -> tuple[int, int] | None:
        """Return (EPC address, rights) of the page's entry, if there is one."""

    def protect(self, start: int, end: int, prot: int) -> None:
        """Change the rights of the existing entries in a range."""

    def test_and_clear_accessed(self, linaddr: int) -> bool:
        """Return whether the page was accessed since the last call, or since it was mapped."""

    def zap_pages(self, linaddrs: list[int]) -> None:
        """As :meth:`zap` of each."""

    def test_and_clear_pages(self, linaddrs: list[int]) -> list[bool]:
        """As :meth:`test_and_clear_accessed` of each."""

    def kick(self) -> None:
        """Interrupt every processor that may run this address space, and wait for each.

        A thread inside an enclave leaves it, which flushes its translations.
        """


@dataclass(eq=False, slots=True)
@record
class EnclaveVma:
    """One mapping of an enclave.

    Attributes:
        start, end: its range, page aligned.
        prot: PROT_* rights.
        file: the file that it maps and references.
        enclave: the enclave; ``None`` after a fork that could not register the child.
    """

    start: int
    end: int
    prot: int
    file: EnclaveFile
    enclave: Enclave | None


class Mm:
    """One address space.

    Args:
        runtime: of the driver.
        ptes: its page tables.
        owner: the task for faults without a task.
        pick: returns the address of a mapping, given a hint and a length; by default below the
            lowest enclave mapping.
        ended: called when it has ended and released its mappings.
        name: its name, in messages and schedules.
        pid: of its real process, for reports; 0: it has none.

    Attributes:
        mmap_lock: see the module.
        notifiers: one entry for each enclave that is registered with it.
        users: its process, and each walk that has it pinned; 0: it has ended.
        found: the last result of :meth:`find`, for any address.
    """

    __slots__ = (
        "_ended",
        "_latch",
        "_pick",
        "_starts",
        "_uninterleaved",
        "_vmas",
        "found",
        "mmap_lock",
        "name",
        "notifiers",
        "owner",
        "pid",
        "ptes",
        "runtime",
        "users",
    )

    def __init__(
        self,
        runtime: Runtime,
        ptes: Ptes,
        *,
        owner: Task | None = None,
        pick: Callable[[int, int], int] | None = None,
        ended: Callable[[], None] | None = None,
        name: str = "mm",
        pid: int = 0,
    ) -> None:
        self.runtime, self.ptes, self.owner, self.name = runtime, ptes, owner, name
        self.pid = pid
        self.mmap_lock = RwLock(runtime, f"{name}.mmap_lock")
        self.notifiers: list[EnclaveMm] = []
        self._pick, self._ended = pick, ended
        self._latch = runtime.latch()
        self._uninterleaved = not runtime.interleaves  # no other task runs between two statements
        self.users = 1
        self._starts: list[int] = []
        self._vmas: list[EnclaveVma] = []
        self.found: EnclaveVma | None = None

    def __repr__(self) -> str:
        return f"<{self.name}>"

    # --- lifetime -------------------------------------------------------------------------------

    def pin(self) -> bool:
        """Keep it alive while its mappings are walked; ``False``: it has ended."""
        if self._uninterleaved and self.users:
            self.users += 1
            return True
        with self._latch:
            if not self.users:
                return False
            self.users += 1
            return True

    def unpin(self) -> None:
        """Undo :meth:`pin`; with the last user the address space ends, in a separate task.

        The end takes locks that a walker holds, and waits for the walk itself: as mmput_async().
        """
        if self._uninterleaved and self.users > 1:
            self.users -= 1
        elif self._drop():
            self.runtime.spawn(self._end, f"{self.name}.mmput")

    def exit(self) -> None:
        """The process has ended, or executes another program: release the mappings.

        That is deferred while a walker has it pinned.
        """
        assert self.users, f"{self.name} has ended already"
        if self._drop():
            self._end()

    def _drop(self) -> bool:
        with self._latch:
            self.users -= 1
            return not self.users

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return bool(self.users)

    def forget(self, entry: EnclaveMm) -> None:
        """Unregister an enclave."""
        with self._latch:
            if entry in self.notifiers:
                self.notifiers.remove(entry)

    def _end(self) -> None:
        # As exit_mmap(): first the notifiers, while nothing is unmapped yet.
        for entry in list(self.notifiers):
            entry.release()
        with self.mmap_lock.writing():
            gone = self._cut(0, _TASK_SIZE)
        put_files(gone)
        if self._ended is not None:
            self._ended()

    # --- system calls ---------------------------------------------------------------------------

    def place(self, addr: int, length: int, flags: int) -> int:
        """Return the address for a mapping; ``mmap_lock`` is held.

        Raises:
            OSError: EINVAL, ENOMEM, EEXIST as documented by mmap(2).
        """
        if flags & (MAP_FIXED | MAP_FIXED_NOREPLACE):
            if addr % PAGE_BYTES:
                refuse(EINVAL, f"MAP_FIXED at {addr:#x}")
            if addr + length > _TASK_SIZE:
                refuse(ENOMEM, f"mapping ends at {addr + length:#x}")
            if flags & MAP_FIXED_NOREPLACE and self.vmas(addr, addr + length):
                refuse(EEXIST, f"{addr:#x} is mapped")
            return addr
        hint = page_of(addr)
        if self._pick is not None:
            return self._pick(hint, length)
        if hint and hint + length <= _TASK_SIZE and not self.vmas(hint, hint + length):
            return hint
        start = min(self._starts, default=_MMAP_TOP) - length
        if start < PAGE_BYTES:
            refuse(ENOMEM, f"no room for {length:#x} bytes")
        return start

    def insert(self, vma: EnclaveVma) -> list[EnclaveVma]:
        """Add a mapping, replacing older ones; ``mmap_lock`` is held for writing.

        Returns:
            The mappings that were removed; pass them to :func:`put_files` without the lock.
        """
        gone = self._cut(vma.start, vma.end)
        at = bisect_right(self._starts, vma.start)
        self._starts.insert(at, vma.start)
        self._vmas.insert(at, vma)
        return gone

    def munmap(self, addr: int, length: int) -> None:
        """Remove mappings of enclaves in a range.

        Raises:
            OSError: EINVAL: not page aligned, or length 0.
        """
        end = addr + _round_up(length)
        if addr % PAGE_BYTES or length <= 0 or end > _TASK_SIZE:
            refuse(EINVAL, f"munmap of {length:#x} bytes at {addr:#x}")
        with self.mmap_lock.writing():
            gone = self._cut(addr, end)
        put_files(gone)

    def mprotect(self, addr: int, length: int, prot: int, *, task: Task | None = None) -> None:
        """Change the rights of mappings of enclaves in a range.

        Raises:
            OSError: EINVAL: not page aligned, or an unknown right; EACCES: a page of the enclave
                does not allow the right, the range leaves the enclave, or the personality has
                READ_IMPLIES_EXEC.  Mappings below the refused one keep their new rights, as in
                Linux.
        """
        end = addr + _round_up(length)
        if addr % PAGE_BYTES or prot & ~_PROT_ALL:
            refuse(EINVAL, f"mprotect of {addr:#x} to {prot:#x}")
        with self.mmap_lock.writing():
            for vma in self.vmas(addr, end):
                start, stop = max(addr, vma.start), min(end, vma.end)
                if vma.enclave is not None:
                    vma.enclave.may_map(start, stop, prot, task or self.owner)
                lost = vma.prot & ~prot
                self._split(start)
                self._split(stop)
                for piece in self.vmas(start, stop):
                    piece.prot = prot
                self.ptes.protect(start, stop, prot)
                if lost:
                    self.ptes.kick()

    def mremap(self, old: int, old_length: int, new_length: int, new: int | None = None) -> int:
        """Shrink or move a mapping of an enclave; growing is refused.

        Args:
            old: its address.
            old_length: its length in bytes.
            new_length: its new length in bytes.
            new: its new address; ``None``: it is not moved.

        Returns:
            Its address now.

        Raises:
            OSError: EFAULT: no such mapping, it is shorter, or it would grow (these mappings are
                VM_DONTEXPAND and VM_PFNMAP); EINVAL: not aligned, length 0, overlapping, or beyond
                the address space.
        """
        old_length, new_length = _round_up(old_length), _round_up(new_length)
        if old % PAGE_BYTES or new_length <= 0:
            refuse(EINVAL, f"mremap of {old:#x} to {new_length:#x} bytes")
        moves = new is not None and new != old
        gone: list[EnclaveVma] = []
        with self.mmap_lock.writing():
            vma = self.find(old)
            if vma is None:
                refuse(EFAULT, f"mremap of {old:#x}, where no enclave is mapped")
            if moves:
                assert new is not None
                overlaps = new < old + old_length and old < new + new_length
                if new % PAGE_BYTES or overlaps or new + new_length > _TASK_SIZE:
                    refuse(EINVAL, f"mremap from {old:#x} to {new:#x}")
            if old + old_length > vma.end or new_length > old_length:
                refuse(EFAULT, f"mremap of {old_length:#x} bytes at {old:#x} to {new_length:#x}")
            if new_length < old_length:
                gone += self._cut(old + new_length, old + old_length)
            if moves:
                assert new is not None
                vma.file.hold()
                moved = replace(vma, start=new, end=new + new_length)
                # Deviation: Linux moves the PTEs too. At the new address they only cause EPCM
                # faults; without them, accesses cause faults that find no page.
                gone += self._cut(old, old + new_length)
                gone += self.insert(moved)
        put_files(gone)
        return new if moves and new is not None else old

    def fork(
        self,
        ptes: Ptes,
        *,
        owner: Task | None = None,
        ended: Callable[[], None] | None = None,
        name: str = "",
        pid: int = 0,
        copy_entries: bool = False,
        fail: bool = False,
    ) -> Mm:
        """Return the address space of a child process.

        Args:
            ptes: the child's page tables, empty.
            owner: the child's :attr:`owner`.
            ended: called when the child has ended and released its mappings.
            name: the child's name.
            pid: of the child.
            copy_entries: whether the child gets the parent's PTEs, as on Linux for PFN mappings;
                otherwise it faults for each.
            fail: whether the child cannot be registered with its enclaves, as without memory: each
                of its accesses raises SIGBUS.
        """
        name = name or f"{self.name}'"
        child = type(self)(
            self.runtime, ptes, owner=owner, pick=self._pick, ended=ended, name=name, pid=pid
        )
        with self.mmap_lock.writing():
            for vma in self._vmas:
                vma.file.hold()
                copy = replace(vma)
                child.insert(copy)
                if vma.enclave is None or fail:
                    copy.enclave = None
                    continue
                if copy_entries:
                    self._copy_entries(vma, ptes)
                # A walk that began earlier sees that the list has changed, and starts again.
                vma.enclave.add_mm(child)
        return child

    def _copy_entries(self, vma: EnclaveVma, ptes: Ptes) -> None:
        assert vma.enclave is not None, "entries of a mapping without an enclave"
        for linaddr in vma.enclave.addresses(vma.start, vma.end):
            entry = self.ptes.entry(linaddr)
            if entry is not None:
                ptes.install(linaddr, *entry)

    # --- faults ---------------------------------------------------------------------------------

    def fault(self, addr: int, access: int, task: Task | None = None) -> FaultResult:
        """Handle a page fault of the page tables: its error code has no SGX bit.

        Args:
            addr: the address.
            access: PROT_READ, PROT_WRITE or PROT_EXEC.
            task: the faulting task; by default the owner.

        Returns:
            How it ended; no lock is held then.
        """
        busy = enclave = None
        now_ns = self.runtime.now_ns
        began = now_ns()
        self.mmap_lock.acquire_read()
        try:
            vma = self.found
            if vma is None or not vma.start <= addr < vma.end:
                vma = self.find(addr)
            if vma is None or access & ~vma.prot:
                return FaultResult.SEGV
            enclave = vma.enclave
            if enclave is None:
                return FaultResult.SIGBUS
            handle = enclave.driver.handle_fault
            result, busy = handle(enclave, self, vma, addr & -PAGE_BYTES, task or self.owner)
        finally:
            self.mmap_lock.release_read()
        if busy is not None:
            busy()
            result = FaultResult.RETRY
        enclave.counts.fault_ns += now_ns() - began
        return result

    def zap(self, enclave: Enclave, linaddr: int) -> None:
        """Remove the entry of a page if it is mapped here as part of ``enclave``."""
        self.mmap_lock.acquire_read()
        try:
            vma = self.find(linaddr)
            if vma is not None and vma.enclave is enclave:
                self.ptes.zap(linaddr)
        finally:
            self.mmap_lock.release_read()

    def test_and_clear_accessed(self, enclave: Enclave, linaddr: int) -> bool:
        """As :meth:`Ptes.test_and_clear_accessed`, if it is mapped here as part of ``enclave``."""
        self.mmap_lock.acquire_read()
        try:
            vma = self.find(linaddr)
            if vma is None or vma.enclave is not enclave:
                return False
            return self.ptes.test_and_clear_accessed(linaddr)
        finally:
            self.mmap_lock.release_read()

    # --- mappings -------------------------------------------------------------------------------

    def find(self, addr: int) -> EnclaveVma | None:
        """Return the mapping that holds ``addr``; ``mmap_lock`` is held."""
        vma = self.found
        if vma is not None and vma.start <= addr < vma.end:
            return vma
        after = bisect_right(self._starts, addr)
        if after:
            vma = self._vmas[after - 1]
            if addr < vma.end:
                self.found = vma
                return vma
        return None

    def vmas(self, start: int = 0, end: int = _TASK_SIZE) -> list[EnclaveVma]:
        """Return the mappings that overlap a range, lowest first; ``mmap_lock`` is held."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        found = []
        for vma in self._vmas[first:]:
            if vma.start >= end:
                break
            if vma.end > start:
                found.append(vma)
        return found

    def _split(self, addr: int) -> None:
        """Split the mapping at ``addr``, if it is inside one."""
        vma = self.find(addr)
        if vma is None or vma.start == addr:
            return
        vma.file.hold()
        above = replace(vma, start=addr)
        vma.end = addr
        at = bisect_right(self._starts, addr)
        self._starts.insert(at, addr)
        self._vmas.insert(at, above)

    def _cut(self, start: int, end: int) -> list[EnclaveVma]:
        """Remove the mappings of a range and their PTEs; they still reference their files."""
        self._split(start)
        self._split(end)
        gone = self.vmas(start, end)
        self.found = None
        for vma in gone:
            at = self._vmas.index(vma)
            del self._vmas[at], self._starts[at]
            if vma.enclave is not None:
                for linaddr in vma.enclave.addresses(vma.start, vma.end):
                    self.ptes.zap(linaddr)
        if gone:
            self.ptes.kick()
        return gone


def put_files(gone: list[EnclaveVma]) -> None:
    """Drop the file references of removed mappings; the caller holds no lock."""
    for vma in gone:
        vma.file.put()


def _round_up(length: int) -> int:
    return -(-length // PAGE_BYTES) * PAGE_BYTES
