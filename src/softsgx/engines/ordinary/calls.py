"""System calls that change mappings or make tasks: what the recorder does before and after them.

The kernel executes each call with the program's arguments.  Afterwards the recorder registers new
private memory, replaces private mappings of files by anonymous memory, and drops, or moves, the
contents of hidden pages.

Deviation: /proc/PID/maps shows anonymous memory where files are mapped privately, and mincore(2)
reports hidden pages as absent.  A file that changes after it was mapped shows its new bytes in
pages that the program has not accessed before.  MADV_FREE frees at once.  process_madvise(2)
accepts only the advice that Linux accepted before 6.13.

Source:
    mmap(2), brk(2), mremap(2), madvise(2), clone(2), set_tid_address(2).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from errno import EINVAL, ENOMEM
from weakref import WeakValueDictionary

from softsgx.engines.native import abi, libc
from softsgx.engines.ordinary.files import File, FileRange
from softsgx.engines.ordinary.mappings import private_memory
from softsgx.engines.ordinary.program import ProgramThread
from softsgx.engines.ordinary.space import AddressSpace, Hold

__all__ = ["CALLS", "Calls"]

_NO_FILE = (1 << 64) - 1
_MREMAP_FIXED, _MCL_FUTURE = 2, 2
_DISCARDS = frozenset(
    {abi.MADV_DONTNEED, abi.MADV_DONTNEED_LOCKED, abi.MADV_FREE, abi.MADV_GUARD_INSTALL}
)
_REMOTE_ADVICE = frozenset({3, abi.MADV_COLD, abi.MADV_PAGEOUT, abi.MADV_COLLAPSE})
_Handler = Callable[[ProgramThread, AddressSpace], None]
_SHIFT = 12


class Calls:
    """See the module."""

    def __init__(self) -> None:
        self._handlers: dict[int, _Handler] = {
            abi.SYS_MMAP: self._mmap,
            abi.SYS_MUNMAP: self._munmap,
            abi.SYS_MREMAP: self._mremap,
            abi.SYS_BRK: self._brk,
            abi.SYS_MADVISE: self._madvise,
            abi.SYS_PROCESS_MADVISE: self._process_madvise,
            abi.SYS_MLOCKALL: self._mlockall,
            abi.SYS_CLONE: self._clone,
            abi.SYS_CLONE3: self._clone3,
            abi.SYS_FORK: self._fork,
            abi.SYS_VFORK: self._fork,
            abi.SYS_FUTEX: self._futex,
            abi.SYS_SET_TID_ADDRESS: self._set_tid_address,
        }
        self._files: WeakValueDictionary[tuple[int, int], File] = WeakValueDictionary()

    def entered(self, thread: ProgramThread) -> None:
        """A thread is at the seccomp stop of one of :data:`CALLS`: prepare for the call."""
        handler = self._handlers.get(thread.load().orig_rax)
        if handler is not None and thread.space is not None:
            handler(thread, thread.space)

    # --- mappings -------------------------------------------------------------------------------

    def _mmap(self, thread: ProgramThread, space: AddressSpace) -> None:
        regs = thread.regs
        address, length, prot, flags = regs.rdi, _rounded(regs.rsi), regs.rdx, regs.r10
        descriptor, offset = _int32(regs.r8), regs.r9
        fixed = bool(flags & abi.MAP_FIXED)

        def done(result: int) -> None:
            if -4096 < result < 0:
                return
            start, end = result, result + length
            space.unmapped(start, end)
            if flags & abi.MAP_TYPE != abi.MAP_PRIVATE or flags & abi.MAP_HUGETLB:
                return
            if not flags & abi.MAP_ANONYMOUS:
                file = self._file(thread.tid, descriptor)
                if file is None:
                    return
                space.files.add(FileRange(start, end, file, offset))
                kind = abi.MAP_PRIVATE | abi.MAP_ANONYMOUS | abi.MAP_FIXED
                space.resident.syscall(abi.SYS_MMAP, start, length, prot, kind, _NO_FILE, 0)
            space.register(start, end)
            if flags & (abi.MAP_POPULATE | abi.MAP_LOCKED) or space.locks_memory:
                space.adopt(start, end)

        self._watch(thread, space, done, *([(address, address + length)] if fixed else []))

    def _munmap(self, thread: ProgramThread, space: AddressSpace) -> None:
        start, end = thread.regs.rdi, thread.regs.rdi + _rounded(thread.regs.rsi)

        def done(result: int) -> None:
            if not result:
                space.unmapped(start, end)

        self._watch(thread, space, done, (start, end))

    def _brk(self, thread: ProgramThread, space: AddressSpace) -> None:
        asked, before = thread.regs.rdi, _rounded(space.break_at)

        def done(result: int) -> None:
            space.break_at = result
            after = _rounded(result)
            if before and after > before:
                space.register(before, after)
                if space.locks_memory:
                    space.adopt(before, after)
            elif after < before:
                space.unmapped(after, before)

        self._watch(thread, space, done, *([(asked, before)] if asked < before else []))

    def _mremap(self, thread: ProgramThread, space: AddressSpace) -> None:
        regs = thread.regs
        old, old_length, new_length = regs.rdi, _rounded(regs.rsi), _rounded(regs.rdx)
        flags, new = regs.r10, regs.r8

        def done(result: int) -> None:
            if -4096 < result < 0 or not old_length:
                return
            if result == old:
                space.unmapped(old + new_length, old + max(old_length, new_length))
            else:
                space.unmapped(old + new_length, old + max(old_length, new_length))
                space.unmapped(result, result + new_length)
                space.move(old, old + min(old_length, new_length), result)
            # The kernel reports no faults in moved memory until it is registered again.
            for start, end in private_memory(thread.tid):
                if start <= result < end:
                    space.register_anew(result, result + new_length)

        target = [(new, new + new_length)] if flags & _MREMAP_FIXED else []
        space.before_move(old, old + old_length)
        self._watch(thread, space, done, (old, old + old_length), *target)

    def _madvise(self, thread: ProgramThread, space: AddressSpace) -> None:
        regs = thread.regs
        start, end, advice = regs.rdi, regs.rdi + _rounded(regs.rsi), regs.rdx & 0xFFFF_FFFF
        if advice in (abi.MADV_WIPEONFORK, abi.MADV_KEEPONFORK):
            pages = range(start >> _SHIFT, end >> _SHIFT)

            def done(result: int) -> None:
                if not result and advice == abi.MADV_WIPEONFORK:
                    space.wiped.update(pages)
                elif not result:
                    space.wiped.difference_update(pages)

            self._watch(thread, space, done)
            return
        if advice not in _DISCARDS:
            return
        if advice == abi.MADV_FREE:  # the kernel would drop pages when it needs memory
            regs.rdx = abi.MADV_DONTNEED
            thread.store()

        def discarded(result: int) -> None:
            if result in (0, -ENOMEM):  # ENOMEM: not all of the range is mapped
                space.forget(start, end)
            if advice == abi.MADV_FREE:
                thread.load().rdx = advice
                thread.store()

        self._watch(thread, space, discarded, (start, end))

    def _process_madvise(self, thread: ProgramThread, _space: AddressSpace) -> None:
        if thread.regs.r10 & 0xFFFF_FFFF not in _REMOTE_ADVICE:
            thread.skip_syscall(-EINVAL)

    def _mlockall(self, thread: ProgramThread, space: AddressSpace) -> None:
        future = bool(thread.regs.rdi & _MCL_FUTURE)

        def done(result: int) -> None:
            space.locks_memory |= future and not result

        self._watch(thread, space, done)

    # --- tasks ----------------------------------------------------------------------------------

    def _clone(self, thread: ProgramThread, space: AddressSpace) -> None:
        self._makes(thread, space, thread.regs.rdi, thread.regs.r10)

    def _clone3(self, thread: ProgramThread, space: AddressSpace) -> None:
        words = space.read(thread.regs.rdi, 24).ljust(24, b"\0")
        self._makes(
            thread,
            space,
            int.from_bytes(words[:8], "little"),
            int.from_bytes(words[16:], "little"),
        )

    def _fork(self, thread: ProgramThread, space: AddressSpace) -> None:
        self._makes(thread, space, 0, 0)

    def _makes(self, thread: ProgramThread, space: AddressSpace, flags: int, tid_at: int) -> None:
        """Prepare for a call that makes a task.

        Before the new task stops for the first time, the kernel accesses memory for it: it may
        write the task's id, and it accesses the area for rseq(2).
        """
        tid_written_at = tid_at if flags & abi.CLONE_CHILD_SETTID else 0
        pages = {at >> _SHIFT for at in (tid_written_at, thread.rseq_at()) if at}
        thread.holds = Hold(space, pins=pages)
        for page in pages:
            space.make_writable(page)
        thread.cleared_by_child = tid_at if flags & abi.CLONE_CHILD_CLEARTID else 0

        def done(result: int) -> None:
            if result < 0:
                thread.release()

        thread.at_end = done
        thread.in_call = True

    def _futex(self, thread: ProgramThread, space: AddressSpace) -> None:
        """Make the futex's pages present: the kernel stores to them without waiting for pages."""
        regs = thread.regs
        pages = {regs.rdi >> _SHIFT, regs.r8 >> _SHIFT} - {0}
        thread.holds = Hold(space, pins=pages, whole=False)
        for page in pages:
            space.make_writable(page)

        def done(_result: int) -> None:
            thread.release()

        thread.at_end = done
        thread.in_call = True

    def _set_tid_address(self, thread: ProgramThread, _space: AddressSpace) -> None:
        thread.cleared_at = thread.regs.rdi

    # --- details --------------------------------------------------------------------------------

    def _watch(
        self,
        thread: ProgramThread,
        space: AddressSpace,
        done: Callable[[int], None],
        *changing: tuple[int, int],
    ) -> None:
        """Call ``done`` with the call's result; faults in ``changing`` wait until then."""

        def ended(result: int) -> None:
            done(result)
            thread.release()

        thread.holds = Hold(space, *changing)
        thread.at_end = ended
        thread.in_call = True

    def _file(self, tid: int, descriptor: int) -> File | None:
        """Return the regular file behind a descriptor, ``None`` for a device."""
        ours = libc.take_descriptor(tid, descriptor)
        status = os.fstat(ours)
        if not stat.S_ISREG(status.st_mode):
            os.close(ours)
            return None
        key = status.st_dev, status.st_ino
        known = self._files.get(key)
        if known is not None:
            os.close(ours)
            return known
        file = self._files[key] = File(ours)
        return file


def _rounded(length: int) -> int:
    return -(-length // abi.PAGE) * abi.PAGE


def _int32(value: int) -> int:
    value &= 0xFFFF_FFFF
    return value - (1 << 32) if value >> 31 else value


CALLS = (
    *(abi.SYS_MMAP, abi.SYS_MUNMAP, abi.SYS_MREMAP, abi.SYS_BRK, abi.SYS_MADVISE),
    *(abi.SYS_PROCESS_MADVISE, abi.SYS_CLONE, abi.SYS_CLONE3, abi.SYS_FORK, abi.SYS_VFORK),
    *(abi.SYS_SET_TID_ADDRESS, abi.SYS_MLOCKALL),
)
"""Numbers of the calls for which a thread stops."""
