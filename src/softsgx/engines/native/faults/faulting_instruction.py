"""The instruction that has stopped a thread, and its kind of access.

Source:
    SDM vol. 3A, "Interrupt 14—Page-Fault Exception": error code; arch/x86/kernel/traps.c for the
    vectors behind signals.
"""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES, Pfec, Vector
from softsgx.engines.native import abi
from softsgx.engines.native.abi import SigInfo
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.x86.insn import decode, is_write
from softsgx.hw import EXECUTE, READ, WRITE

__all__ = [
    "LONGEST",
    "access_at",
    "again",
    "code_at",
    "float_vector",
    "pfec",
    "repeat",
    "resolved",
    "trap_vector",
]

LONGEST = 15
"""Bytes of an instruction at most."""

_PAGE_MASK = -PAGE_BYTES
#: The most repetitions in a row of a fault without a reason: more are a bug of softsgx.
_SPURIOUS_LIMIT = 10_000
_NONE = 0, (0, 0)


def access_at(thread: ProgramThread, address: int) -> int | None:
    """Return what kind of access faulted at ``address``: READ, WRITE or EXECUTE.

    ``None``: the instruction has left the EPC since; see :func:`again`.
    """
    regs = thread.regs
    ahead = address - regs.rip
    if ahead == 0:
        return EXECUTE
    # A fetch faults at RIP, or at the start of the page that the instruction runs into.  That page
    # is seldom there, so the bytes before it decide.
    if 0 < ahead < LONGEST and address % PAGE_BYTES == 0:
        before = _bytes_at(thread, regs.rip)[:ahead]
        if len(before) == ahead and decode(before) is None:
            return EXECUTE
    code = code_at(thread, regs.rip)
    if code is None:
        return None
    return WRITE if is_write(code, address, regs.rsp, regs.rdi) else READ


def code_at(thread: ProgramThread, rip: int) -> bytes | None:
    """Return the bytes of the instruction at ``rip``, or more; an enclave's from its memory file.

    ``None``: another thread's fault has taken some of them out of the EPC since they were executed.
    """
    code = _bytes_at(thread, rip)
    hidden = len(code) < LONGEST and thread.image.device_at(rip) is not None
    return None if hidden and decode(code) is None else code


def _bytes_at(thread: ProgramThread, rip: int) -> bytes:
    """Return up to ``LONGEST`` bytes, fewer where a page is not there."""
    image = thread.image
    device = image.device_at(rip)
    return image.read(rip, LONGEST) if device is None else device.memory.own_code(rip, LONGEST)


def again(thread: ProgramThread) -> bool:
    """The access of a fault is no longer known: return whether to execute the instruction again.

    That brings its bytes back, by a fault of its own, and then the event itself.  If they leave
    again, the thread has a claim to them in the end (:mod:`softsgx.paging.claims`).

    ``False``: it was executed again so often, and no fault resolved, that its bytes will never be
    there.
    """
    return repeat(thread, thread.regs.rip, EXECUTE)


def repeat(thread: ProgramThread, address: int, access: int) -> bool:
    """A fault found nothing wrong any more: make sure of it; whether to repeat the instruction.

    Args:
        thread: it has faulted.
        address: where.
        access: READ, WRITE or EXECUTE.
    """
    page_table, page = thread.image.page_table, address & _PAGE_MASK
    spot = thread.regs.rip, address
    if access == READ and thread.spurious[1] == spot:
        access = WRITE  # a load that faults where loads are allowed is part of a store
    if page_table.touched(page, access):
        resolved(thread)
        return True
    thread.spurious = thread.spurious[0] + 1 if thread.spurious[1] == spot else 1, spot
    if thread.spurious[0] > _SPURIOUS_LIMIT:
        return False
    page_table.reshow(page)
    if page_table.touched(page, access):  # it was shown before this address space had it
        resolved(thread)
    return True


def resolved(thread: ProgramThread) -> None:
    """A fault of the thread had a reason, which was removed: start counting repetitions again."""
    thread.spurious = _NONE


def pfec(access: int) -> int:
    """Return the page fault error code of an access by user code, without P."""
    code = int(Pfec.U)
    if access == WRITE:
        code |= Pfec.W
    if access == EXECUTE:
        code |= Pfec.I
    return code


def float_vector(code: bytes) -> int:
    """Return #MF for an x87 instruction (or WAIT), #XM for a vector one."""
    first = code[1] if code[:1] and code[0] & 0xF0 == 0x40 else code[0] if code else 0
    return Vector.MF if 0xD8 <= first <= 0xDF or first == 0x9B else Vector.XM


def trap_vector(info: SigInfo) -> int:
    """Return the exception behind a SIGTRAP that the kernel has sent."""
    return Vector.BP if info.code == abi.SI_KERNEL else Vector.DB
