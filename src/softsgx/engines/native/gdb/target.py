"""What gdb is shown of a thread and may do with it; what a session asks of the tracer's loop.

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
    """What gdb lets a thread do.

    Attributes:
        number: the Linux signal to deliver first, 0 for none.
        step: whether it executes one instruction, or runs.
        start: a step goes on while RIP is from here …
        end: … to here.
        before: RIP before the stop at hand was handled; ``None``: that stop is not a signal's.
        returning: it is to go back into an enclave before its step begins.
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
        detail: what the stop reply says beside that, as ``swbreak:;``.
    """

    tid: int
    number: int
    detail: bytes = b""


class Debugged(Protocol):
    """The program that gdb debugs; all threads are stopped when a session asks for something."""

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
        """Return the address of its own link map, 0 for none, and what is loaded."""

    def pass_signals(self, numbers: frozenset[int]) -> None:
        """Deliver these Linux signals without telling gdb of them."""

    def go_on(self, actions: Mapping[int, Action], default: Action | None) -> None:
        """Let threads run: those named as they are told, others by the default if there is one."""

    def attach(self) -> None:
        """A gdb has come: stop it, if it runs."""

    def break_in(self) -> None:
        """Stop it, if it runs."""

    def detach(self) -> None:
        """Take breakpoints away, and let it run without gdb."""

    def end_process(self) -> None:
        """End it."""


def registers_of(thread: ProgramThread) -> RegisterFile:
    """Return the registers of a stopped thread.

    If it was taken out of a debug enclave, they are those of the inside.

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
    """Replace the registers that :func:`registers_of` gives.

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
