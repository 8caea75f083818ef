"""The resident task: a task of the recorder in an address space of the program.

Only a call made in an address space, madvise(2), can drop its pages.  The recorder cannot make
threads of the program execute it at any time: an interrupted system call can fail with EINTR.  So
clone(CLONE_VM) adds one task to each address space.  It is stopped except while it makes calls for
the recorder.  It has no descriptors, blocks signals, and is killed with the address space.

Deviation: the program can find that task in /proc, as a child that wait(2) reports only with
``__WALL`` or ``__WCLONE``, and a mapping with its code.  The task counts for RLIMIT_NPROC.

Source:
    clone(2), madvise(2), ptrace(2).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from softsgx.engines.native import abi, libc
from softsgx.engines.native.tracing.failures import kill
from softsgx.engines.native.tracing.tracee import Gone, Thread
from softsgx.engines.native.tracing.waits import Waits
from softsgx.engines.native.vdso.code import CALL_WORDS, emit_injection
from softsgx.engines.native.x86.asm import Assembler
from softsgx.engines.ordinary.program import ProgramThread
from softsgx.errors import SoftSgxError

__all__ = ["RESIDENT_BYTES", "Resident", "install_code"]

_CODE_PAGES, _TABLE_PAGES = 1, 16
RESIDENT_BYTES = (_CODE_PAGES + _TABLE_PAGES) * abi.PAGE
"""Length of the mapping that has the task's code and its table of calls."""
_CALL = struct.Struct(f"<{CALL_WORDS}Q")
_MOST_CALLS = _TABLE_PAGES * abi.PAGE // _CALL.size
_NO_FILE = (1 << 64) - 1
_OPTIONS = abi.PTRACE_O_TRACESYSGOOD | abi.PTRACE_O_TRACESECCOMP | abi.PTRACE_O_EXITKILL


def _assemble() -> tuple[bytes, dict[str, int]]:
    asm = Assembler()
    emit_injection(asm)
    return asm.finish(), asm.labels


_CODE, _LABELS = _assemble()


def install_code(thread: Thread, memory: int) -> int:
    """Map the code for calls into a new image, and return its address.

    Args:
        thread: stopped at the end of its execve; its calls are made there from now on.
        memory: a descriptor of its ``/proc/PID/mem``.

    Raises:
        SoftSgxError: the image has no room for it.
        Gone: the thread has ended.
    """
    # Until that mapping exists, calls are made from the program's entry point.
    entry = thread.load().rip
    kept = os.pread(memory, 3, entry)
    os.pwrite(memory, b"\x0f\x05\xcc", entry)
    thread.inject_at = entry
    rights, kind = abi.PROT_READ | abi.PROT_WRITE, abi.MAP_PRIVATE | abi.MAP_ANONYMOUS
    base = thread.syscall(abi.SYS_MMAP, 0, RESIDENT_BYTES, rights, kind, _NO_FILE, 0)
    if base > 0:
        os.pwrite(memory, _CODE, base)
        rights = abi.PROT_READ | abi.PROT_EXEC
        thread.syscall(abi.SYS_MPROTECT, base, _CODE_PAGES * abi.PAGE, rights)
    os.pwrite(memory, kept, entry)
    if base < 0:
        raise SoftSgxError(f"process {thread.tid}: no room for a mapping ({os.strerror(-base)})")
    thread.inject_at = base + _LABELS["inject"]
    return base


class Resident:
    """See the module.

    Args:
        thread: a stopped thread of the address space.
        waits: receives stops.
        base: result of :func:`install_code`.

    Attributes:
        tid: its id.
        memory: a descriptor of the memory of the address space, for reading and writing.
        pagemap: a descriptor of its page tables, as ``/proc/PID/pagemap`` shows them.

    Raises:
        SoftSgxError: the kernel refuses it.
        Gone: a thread has ended meanwhile.
    """

    def __init__(self, thread: ProgramThread, waits: Waits, base: int) -> None:
        made = thread.syscall(abi.SYS_CLONE, abi.CLONE_VM)
        if made < 0:
            raise SoftSgxError(
                f"process {thread.tid}: no task can be made in it ({os.strerror(-made)}); "
                "raise the limit on processes (ulimit -u)"
            )
        self.tid = thread.made or made
        self._pid = thread.pid
        self._base, self._table = base, base + _CODE_PAGES * abi.PAGE
        self._thread = Thread(self.tid, waits)
        self._thread.inject_at = base + _LABELS["inject"]
        self._thread.wait()
        # No stop at its end: the recorder has no work then, and the program may wait for it.
        libc.ptrace(abi.PTRACE_SETOPTIONS, self.tid, 0, _OPTIONS)
        self._thread.syscall(abi.SYS_CLOSE_RANGE, 0, 0xFFFF_FFFF, 0)
        self.memory = os.open(f"/proc/{self.tid}/mem", os.O_RDWR | os.O_CLOEXEC)
        self.pagemap = os.open(f"/proc/{self.tid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def syscall(self, number: int, *arguments: int) -> int:
        """Make a system call in the address space; return its result, ``-errno`` for a failure.

        A thread of the program cannot make it: the kernel accesses the thread's memory when a call
        returns, for rseq(2), and would wait for the recorder.

        Raises:
            Gone: the task has been killed; the process is killed as well.
        """
        with self._ends_process():
            return self._thread.syscall(number, *arguments)

    @contextmanager
    def _ends_process(self) -> Iterator[None]:
        """Kill the process if the task has been killed: its pages cannot be hidden any more."""
        try:
            yield
        except Gone:
            kill(self._pid)
            raise

    def drop(self, ranges: list[tuple[int, int]]) -> None:
        """Drop the pages of (start, end) ranges from the address space.

        If the task has been killed, the process is killed as well, and its pages do not matter.
        """
        with suppress(Gone), self._ends_process():
            self._drop(ranges)

    def _drop(self, ranges: list[tuple[int, int]]) -> None:
        for first in range(0, len(ranges), _MOST_CALLS):
            some = ranges[first : first + _MOST_CALLS]
            calls = b"".join(
                _CALL.pack(
                    abi.SYS_MADVISE,
                    *(start, end - start, abi.MADV_DONTNEED_LOCKED),
                    *(0, 0, abi.OUR_CALL),
                )
                for start, end in some
            )
            os.pwrite(self.memory, calls, self._table)
            self._thread.borrow(
                self._base + _LABELS["calls"],
                self._base + _LABELS["called"],
                rbx=self._table,
                rbp=len(some),
            )

    def end(self) -> None:
        """Kill the task."""
        os.close(self.memory)
        os.close(self.pagemap)
        kill(self.tid)
