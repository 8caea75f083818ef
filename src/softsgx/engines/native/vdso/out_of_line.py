"""Slots of our vDSO, where threads execute single instructions of enclave code out of line.

A slot holds a copy of one instruction, with its operand at RCX, and then code that restores RAX,
RCX and RDX and jumps to the next instruction of the enclave; neither changes flags.  When a thread
stops in its slot, the supervisor gives it the registers that it has before or after the enclave's
instruction, so the result is the same as execution in place.

Source:
    SDM vol. 2, MOV, JMP; Linux kernel/events/uprobes.c for the method.
"""

from __future__ import annotations

import os
import struct

from softsgx.engines.native import abi
from softsgx.engines.native.abi import UserRegs
from softsgx.ondemand import dataclass

__all__ = ["SLOT_BYTES", "OutOfLine", "OutOfLineSlots"]

SLOT_BYTES = 64
_SLOTS = abi.PAGE // SLOT_BYTES
_BITS_64 = (1 << 64) - 1
#: mov rax, imm64; mov rcx, imm64; mov rdx, imm64; jmp [rip+0]; where to.
_TAIL = struct.Struct("<2sQ2sQ2sQ6sQ")
_RAX, _RCX, _RDX, _JUMP = b"\x48\xb8", b"\x48\xb9", b"\x48\xba", b"\xff\x25\0\0\0\0"


@dataclass(slots=True, frozen=True)
class OutOfLine:
    """One out-of-line execution of an instruction.

    Attributes:
        start: address of the copy.
        behind: address of the code that follows it.
        rip: address of the instruction.
        then: address of the next one.
        given: RAX, RCX and RDX at the start of the copy.
        own: RAX, RCX and RDX of the thread, which the instruction does not change.
    """

    start: int
    behind: int
    rip: int
    then: int
    given: tuple[int, int, int]
    own: tuple[int, int, int]

    def enter(self, regs: UserRegs) -> None:
        """Give the thread the registers for the start of the copy."""
        regs.rip = self.start
        regs.rax, regs.rcx, regs.rdx = self.given

    def leave(self, regs: UserRegs) -> bool:
        """Restore the thread's own registers; ``False``: the thread has left the slot."""
        if not self.start <= regs.rip < self.start + SLOT_BYTES:
            return False
        regs.rip = self.rip if regs.rip < self.behind else self.then
        regs.rax, regs.rcx, regs.rdx = self.own
        return True


class OutOfLineSlots:
    """The slots of one address space, a page of them; each belongs to one thread at a time.

    Args:
        memory_fd: descriptor of ``/proc/PID/mem``.
        start: address of the page.
    """

    def __init__(self, memory_fd: int, start: int) -> None:
        self._memory_fd, self._start = memory_fd, start
        self._numbers: dict[int, int] = {}

    def fill(
        self, tid: int, regs: UserRegs, length: int, copy: bytes, given: tuple[int, int, int]
    ) -> OutOfLine | None:
        """Write an instruction to the slot of a stopped thread.

        Args:
            tid: the thread's id.
            regs: its registers, at the instruction.
            length: bytes of the instruction.
            copy: the instruction with its operand at RCX; it does not change RAX, RCX or RDX.
            given: RAX, RCX and RDX for the copy.

        Returns:
            The execution; ``None``: other threads use all slots.
        """
        number = self._numbers.get(tid)
        if number is None:
            taken = set(self._numbers.values())
            number = next((number for number in range(_SLOTS) if number not in taken), None)
            if number is None:
                return None
            self._numbers[tid] = number
        start, then = self._start + SLOT_BYTES * number, regs.rip + length & _BITS_64
        own = rax, rcx, rdx = regs.rax, regs.rcx, regs.rdx
        tail = _TAIL.pack(_RAX, rax, _RCX, rcx, _RDX, rdx, _JUMP, then)
        os.pwrite(self._memory_fd, copy + tail, start)
        return OutOfLine(start, start + len(copy), regs.rip, then, given, own)

    def release(self, tid: int) -> None:
        """Free the slot of a thread that has ended."""
        self._numbers.pop(tid, None)
