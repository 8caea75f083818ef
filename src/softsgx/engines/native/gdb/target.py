"""A thread as gdb sees it, and the interface that a session uses of the tracer's loop.

Source:
    "Debugging with GDB", "gdb Remote Serial Protocol": vCont, "Stop Reply Packets".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from softsgx.engines.native.gdb.libraries import Library
from softsgx.engines.native.gdb.memory import DebuggedMemory
from softsgx.engines.native.gdb.registers import RegisterFile, has_avx
from softsgx.engines.native.gdb.ssa import SsaFrame
from softsgx.engines.native.tracing.program import ProgramThread

__all__ = ["Action", "Debugged", "StopReason", "registers_of", "set_registers_of"]

_FIELDS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
    *("cs", "ss", "ds", "es", "fs", "gs", "fs_base", "gs_base", "orig_rax"),
)


@dataclass(slots=True)
class Action:
    """How gdb resumes a thread.

    Attributes:
        number: the Linux signal to deliver first, 0 for none.
        step: whether it executes one instruction, or runs.
        start: a step continues while RIP is in ``[start, end)``.
        end: see ``start``.
        before: address of the instruction that the current stop is a part of; ``None``: of none.
        returning: the thread has to return into its enclave before its step begins.
    """

    number: int = 0
    step: bool = False
    start: int = 0
    end: int = 0
    before: int | None = None
    returning: bool = False


@dataclass(frozen=True, slots=True)
class StopReason:
    """Why the program has stopped.

    Attributes:
        tid: the thread that has caused it.
        number: Linux signal.
        detail: further fields of the stop reply, as ``swbreak:;``.
    """

    tid: int
    number: int
    detail: bytes = b""


class Debugged(Protocol):
    """The program that gdb debugs; all threads are stopped when a session calls it."""

    @property
    def pid(self) -> int:
        """The id of the process."""

    @property
    def memory(self) -> DebuggedMemory:
        """Its memory."""

    @property
    def reason(self) -> StopReason:
        """Why it stopped last."""

    def program_threads(self) -> dict[int, ProgramThread]:
        """Return its threads by id."""

    def libraries(self) -> tuple[int, list[Library]]:
        """Return the address of the program's own link map, 0 for none, and its libraries."""

    def pass_signals(self, numbers: frozenset[int]) -> None:
        """Deliver these Linux signals without a stop for gdb."""

    def resume_threads(self, actions: Mapping[int, Action], default: Action | None) -> None:
        """Resume the threads that ``actions`` names, and the others if there is a default."""

    def attach(self) -> None:
        """A gdb has connected: stop the program if it runs."""

    def break_in(self) -> None:
        """Stop the program if it runs."""

    def detach(self) -> None:
        """Remove breakpoints, and let the program run without gdb."""

    def end_process(self) -> None:
        """End the process."""


def registers_of(thread: ProgramThread) -> RegisterFile:
    """Return the registers of a stopped thread.

    For a thread that was taken out of a debug enclave they are those of the SSA frame.

    Raises:
        OSError: they cannot be read.
    """
    frame = SsaFrame.of(thread)
    if frame is not None:
        return frame.registers()
    regs = thread.load()
    area = thread.xstate()
    return RegisterFile({name: getattr(regs, name) for name in _FIELDS}, area, avx=has_avx(area))


def set_registers_of(thread: ProgramThread, file: RegisterFile) -> None:
    """Replace the registers that :func:`registers_of` returns.

    Raises:
        OSError: they cannot be written.
    """
    frame = SsaFrame.of(thread)
    if frame is not None:
        frame.set_registers(file)
        return
    regs = thread.load()
    for name in _FIELDS:
        setattr(regs, name, file.general[name] & (1 << 64) - 1)
    thread.store()
    if file.xsave != thread.xstate():
        thread.set_xstate(file.xsave)
    thread.flush()
