"""The address spaces of the program: execve and fork make them; each ends with its last thread."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from errno import EPERM

from softsgx.engines.native import abi, libc
from softsgx.engines.native.mappings import Mapping, mappings
from softsgx.engines.native.tracing.waits import Waits
from softsgx.engines.ordinary.contents import Contents
from softsgx.engines.ordinary.mappings import counts, private_memory
from softsgx.engines.ordinary.pager import Pager
from softsgx.engines.ordinary.program import ProgramThread
from softsgx.engines.ordinary.resident import RESIDENT_BYTES, Resident, install_code
from softsgx.engines.ordinary.space import Accesses, AddressSpace, Snapshot
from softsgx.engines.ordinary.userfaults import Userfaults
from softsgx.errors import NotRun, SoftSgxError
from softsgx.ondemand import logger

__all__ = ["Spaces"]

_LOG = logger(__name__)
_SHIFT = 12
_NO_FILE = (1 << 64) - 1


class Spaces:
    """See the module.

    Args:
        waits: receives stops.
        contents: of hidden pages.
        pager: has the contents that are not with the recorder.
        accesses: receives accesses.
        begun: called with each new address space and its first thread.
        ended: called with each address space that has ended.
    """

    def __init__(
        self,
        waits: Waits,
        contents: Contents,
        pager: Pager,
        accesses: Accesses,
        begun: Callable[[AddressSpace, ProgramThread], None],
        ended: Callable[[AddressSpace], None],
    ) -> None:
        self._waits, self._contents, self._accesses = waits, contents, accesses
        self._pager = pager
        self._begun, self._ended = begun, ended
        self._by_descriptor: dict[int, AddressSpace] = {}
        self._users: dict[AddressSpace, int] = {}

    def serve(self, descriptor: int) -> int:
        """Answer the faults that the userfaultfd ``descriptor`` reports; return how many."""
        space = self._by_descriptor.get(descriptor)
        return 0 if space is None else space.serve()

    def is_ours(self, tid: int) -> bool:
        """Return whether a task is one of the recorder's."""
        return any(space.resident.tid == tid for space in self._users)

    def users(self, space: AddressSpace) -> int:
        """Return the number of the program's threads in an address space."""
        return self._users.get(space, 0)

    def enter(self, space: AddressSpace) -> bool:
        """Count one more thread in an address space; return whether it is the first."""
        self._users[space] = self._users.get(space, 0) + 1
        self._by_descriptor[space.faults.descriptor] = space
        return self._users[space] == 1

    def leave(self, space: AddressSpace) -> None:
        """Count one thread fewer in an address space; end it with the last."""
        self._users[space] -= 1
        if not self._users[space]:
            self._end(space)

    def end_all(self) -> None:
        """End all address spaces."""
        for space in list(self._users):
            self._end(space)

    def _end(self, space: AddressSpace) -> None:
        del self._users[space], self._by_descriptor[space.faults.descriptor]
        self._ended(space)
        self._pager.closed(space)
        space.close()

    # --- new ones -------------------------------------------------------------------------------

    def refuse_32_bit(self, tid: int) -> None:
        """Warn that a 32-bit program was executed: it runs without being recorded."""
        name = os.readlink(f"/proc/{tid}/exe")
        _LOG.warning("process %d: %s is a 32-bit program: it is not recorded", tid, name)

    def of_program(self, thread: ProgramThread) -> AddressSpace:
        """Return the address space of a program that was executed; its pages are all hidden.

        Args:
            thread: its only thread, stopped at the end of execve.

        Raises:
            NotRun: the kernel refuses a userfaultfd.
            SoftSgxError: the address space has no room for the recorder's mapping.
            Gone: the thread has ended.
        """
        memory = os.open(f"/proc/{thread.tid}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            base = install_code(thread, memory)
            thread.space_base = base
            if thread.reaps:
                thread.syscall(abi.SYS_WAIT4, thread.reaps, 0, abi.WALL, 0)
            faults = self._userfaults(thread)
            hole = base, base + RESIDENT_BYTES
            copy = Snapshot()
            for each in mappings(thread.tid):
                if counts(each) and not hole[0] <= each.start < hole[1]:
                    self._take_content(memory, copy, each)
                    _empty(thread, each)
        finally:
            os.close(memory)
        space = self._make(thread, faults, hole, copy)
        for start, end in private_memory(thread.tid, hole):
            space.register(start, end)
        return space

    def _take_content(self, memory: int, copy: Snapshot, mapping: Mapping) -> None:
        """Copy the pages of a mapping that are not zero."""
        for page in range(mapping.start >> _SHIFT, mapping.end >> _SHIFT):
            try:
                data = os.pread(memory, abi.PAGE, page << _SHIFT)
            except OSError:  # behind the end of the file
                continue
            if data.count(0) != abi.PAGE:
                copy.hidden[page] = self._contents.store(data)

    def of_fork(self, thread: ProgramThread, parent: ProgramThread, copy: Snapshot) -> AddressSpace:
        """Return the address space of a process that fork has made.

        Args:
            thread: its only thread, stopped before its first instruction.
            parent: the thread that made it.
            copy: the parent's state at the fork.

        Raises:
            As :meth:`of_program`.
        """
        base = thread.space_base = parent.space_base
        hole = base, base + RESIDENT_BYTES
        space = self._make(thread, self._userfaults(thread), hole, copy)
        space.settle_fork(private_memory(thread.tid, hole))
        return space

    def _make(
        self,
        thread: ProgramThread,
        faults: Userfaults,
        hole: tuple[int, int],
        copy: Snapshot,
    ) -> AddressSpace:
        resident = Resident(thread, self._waits, hole[0])
        space = AddressSpace(resident, faults, self._contents, self._pager, self._accesses, copy)
        self._pager.opened(space)
        self._begun(space, thread)
        return space

    def _userfaults(self, thread: ProgramThread) -> Userfaults:
        theirs = thread.syscall(abi.SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
        if theirs == -EPERM:
            raise NotRun(
                "userfaultfd: not allowed for accesses of system calls; run as root, or "
                "sysctl vm.unprivileged_userfaultfd=1"
            )
        if theirs < 0:
            raise SoftSgxError(f"process {thread.tid}: no userfaultfd ({os.strerror(-theirs)})")
        ours = libc.take_descriptor(thread.tid, theirs)
        thread.syscall(abi.SYS_CLOSE, theirs)
        fcntl.fcntl(ours, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        return Userfaults(ours)


def _empty(thread: ProgramThread, mapping: Mapping) -> None:
    """Replace a mapping by anonymous memory, and drop its pages."""
    start, length = mapping.start, mapping.end - mapping.start
    if mapping.inode:
        kind = abi.MAP_PRIVATE | abi.MAP_ANONYMOUS | abi.MAP_FIXED
        thread.syscall(abi.SYS_MMAP, start, length, mapping.prot, kind, _NO_FILE, 0)
    else:
        thread.syscall(abi.SYS_MADVISE, start, length, abi.MADV_DONTNEED_LOCKED)
