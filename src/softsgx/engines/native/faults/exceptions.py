"""Exceptions as Linux delivers them to programs: the signal, its information, its frame.

The kernel writes the frame with the values of the fault that has stopped the thread.  So the
supervisor stops the thread again at the first instruction of its handler, and corrects the frame.

Deviation: ``cr2`` in the frame of an exception that is no page fault, and ``trapno``, ``err`` and
``cr2`` in those of signals that are no exceptions, are the last that the kernel has seen; later
faults that only the supervisor has handled are missing.

Deviation: ``trapno`` in the frame of a #MC is 18, where Linux leaves the previous value.

Source:
    arch/x86/kernel/traps.c and arch/x86/mm/fault.c for signals and codes; arch_memory_failure(),
    arch/x86/kernel/cpu/sgx/main.c, for #MC; struct sigcontext, asm/sigcontext.h.
"""

from __future__ import annotations

from softsgx.arch import Vector
from softsgx.engines.native import abi
from softsgx.engines.native.abi import SigInfo
from softsgx.engines.native.tracing.program import ProgramThread, Trap

__all__ = ["send", "send_page_fault"]

#: Signal and code of each exception; those that are missing keep what the kernel has said.
_SIGNALS = {
    int(Vector.DE): (abi.SIGFPE, abi.FPE_INTDIV),
    int(Vector.UD): (abi.SIGILL, abi.ILL_ILLOPN),
    int(Vector.GP): (abi.SIGSEGV, abi.SI_KERNEL),
    int(Vector.AC): (abi.SIGBUS, abi.BUS_ADRALN),
    int(Vector.MC): (abi.SIGBUS, abi.SI_KERNEL),
    int(Vector.BP): (abi.SIGTRAP, abi.SI_KERNEL),
}
#: Vectors whose signal information has the address of the instruction.
_AT_RIP = frozenset({Vector.DE, Vector.UD, Vector.DB, Vector.MF, Vector.XM})


def send(thread: ProgramThread, vector: int, error: int = 0) -> int:
    """Let the thread find an exception, but no page fault, where its registers say it is.

    Args:
        thread: stopped, registers loaded; at the signal of a #DB, #MF or #XM.
        vector: the exception.
        error: its error code.

    Returns:
        The signal to deliver when the thread is resumed.
    """
    place = thread.regs.rip if vector in _AT_RIP else 0
    if vector in _SIGNALS:
        number, code = _SIGNALS[vector]
    else:
        told = thread.siginfo()
        number, code = told.signo, told.code
    info = SigInfo(signo=number, code=code, addr=place)
    thread.outgoing = Trap(info, int(vector), error, None)
    return number


def send_page_fault(
    thread: ProgramThread, error: int, address: int, *, number: int = abi.SIGSEGV, code: int
) -> int:
    """As :func:`send`, for #PF at ``address`` that ends with signal ``number`` and its ``code``."""
    info = SigInfo(signo=number, code=code, addr=address)
    thread.outgoing = Trap(info, int(Vector.PF), error, address)
    return number
