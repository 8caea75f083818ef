"""Hardware breakpoints in place of changed bytes, so that enclaves read their own code.

In shown code an ENCLU that was executed starts with HLT, and instructions that the enclave may not
execute are UD2.  A handler inside the enclave reads the instruction that raised an exception, so
the supervisor restores its bytes before the exit.  An ENCLU is marked again when it is executed.
From then on a forbidden instruction raises #UD by a breakpoint in each thread that is inside.
Processors have four; if there are more such instructions, those executed last have one, the others
are UD2.

Deviation: enclave code that reads its own code finds UD2 for a forbidden instruction that it has
not executed yet, and for one that has lost its breakpoint to others.

Source:
    SDM vol. 3B, "Debug Registers"; vol. 1, "RF (Resume) flag"; ptrace(2), PTRACE_POKEUSER.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

from softsgx.arch import PAGE_BYTES
from softsgx.engines.native.faults.faulting_instruction import LONGEST
from softsgx.engines.native.memory.memory_file import EnclaveMemory
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.tracing.tracee import Gone

__all__ = ["Breakpoints"]

_MOST = 4
_ESCAPE = 0x0F
_PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3") | frozenset(
    range(0x40, 0x50)
)
_RF = 1 << 16


class _Place(NamedTuple):
    """A forbidden instruction: where it begins, and where the byte is that UD2 replaces."""

    memory: EnclaveMemory
    start: int
    changed: int


class Breakpoints:
    """See the module.

    Args:
        inside: stops the other threads that are inside an enclave of a memory file, and returns
            them.
    """

    def __init__(
        self, inside: Callable[[ProgramThread, EnclaveMemory], Iterable[ProgramThread]]
    ) -> None:
        self._inside = inside
        self._places: list[_Place] = []
        self._version = 0
        self._usable = True

    def exception(self, thread: ProgramThread) -> None:
        """Enclave code raises an exception, registers loaded: give the instruction its bytes."""
        rip, page_table = thread.regs.rip, thread.image.page_table
        memory = page_table.memory_at(rip)
        if memory is None or not memory.marked or not page_table.is_shown(rip):
            return
        changed = _changed_at(memory, rip)
        if changed is None:
            return
        if changed == rip or self._give(thread, _Place(memory, rip, changed)):
            memory.unmark_at(changed)

    def _give(self, thread: ProgramThread, place: _Place) -> bool:
        """Let ``place`` have a breakpoint in every thread that may execute it; whether it has."""
        if not self._usable:
            return False
        if len(self._places) == _MOST:
            last = self._places.pop()
            last.memory.forbid_again(last.changed)
        self._places.insert(0, place)
        place.memory.trapped.add(place.changed)
        self._version += 1
        try:
            self.arm(thread)
            for other in self._inside(thread, place.memory):
                with suppress(Gone):  # then it executes nothing any more
                    self.arm(other)
        except OSError:  # this machine has none, or others use them
            self._usable = False
            for each in self._places:
                each.memory.forbid_again(each.changed)
            self._places.clear()
        return self._usable

    def arm(self, thread: ProgramThread) -> None:
        """A stopped thread is about to execute enclave code: set its debug registers.

        Raises:
            OSError: they cannot be set.
        """
        if thread.breakpoints != self._version:
            thread.set_breakpoints([place.start for place in self._places])
            thread.breakpoints = self._version

    def has(self, address: int) -> bool:
        """Return whether there is one at ``address``."""
        return any(place.start == address for place in self._places)

    def stopped(self, thread: ProgramThread) -> None:
        """Enclave code was stopped: let no breakpoint be ignored when it is resumed.

        After a fault the processor would ignore that of the instruction that is executed again.
        """
        if thread.breakpoints and thread.load().rflags & _RF:
            thread.regs.rflags &= ~_RF
            thread.store()


def _changed_at(memory: EnclaveMemory, rip: int) -> int | None:
    """Return where a byte of the instruction at ``rip``, in a shown page, is not its own."""
    marks = memory.marked.get(rip & -PAGE_BYTES, {})
    offset = rip % PAGE_BYTES
    if offset in marks:
        return rip
    for at, byte in enumerate(memory.read(rip, min(LONGEST, PAGE_BYTES - offset))):
        if byte == _ESCAPE:
            return rip + at + 1 if offset + at + 1 in marks else None
        if byte not in _PREFIXES:
            return None
    return None
