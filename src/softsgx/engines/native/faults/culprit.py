"""The instruction that stopped a thread: what it did, and what is said of it.

Source:
    SDM vol. 3A, "Interrupt 14—Page-Fault Exception": error code; arch/x86/kernel/traps.c for the
    vectors behind signals.
"""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES, Pfec, Vector
from softsgx.engines.native.abi import SigInfo
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.x86.insn import decode, is_write
from softsgx.hw import EXECUTE, READ, WRITE

__all__ = ["LONGEST", "access_at", "code_at", "float_vector", "pfec", "repeat", "send"]

LONGEST = 15
"""Bytes of an instruction at most."""

_PAGE_MASK = -PAGE_BYTES
#: A fault that finds nothing wrong is repeated; so often only a mistake of ours repeats.
_SPURIOUS_LIMIT = 10_000


def access_at(thread: ProgramThread, address: int) -> int:
    """Return what kind of access faulted at ``address``: READ, WRITE or EXECUTE."""
    regs = thread.regs
    code = code_at(thread, regs.rip)
    # A fetch faults at RIP, or at the start of the page that the instruction runs into.
    ahead = address - regs.rip
    if ahead == 0 or (0 < ahead < LONGEST and address % PAGE_BYTES == 0):
        insn = decode(code)
        if ahead == 0 or insn is None or insn.length > ahead:
            return EXECUTE
    return WRITE if is_write(code, address, regs.rsp, regs.rdi) else READ


def code_at(thread: ProgramThread, rip: int) -> bytes:
    """Return the instruction's bytes; of an enclave's from the memory file."""
    device = thread.image.device_at(rip)
    if device is None:
        return thread.image.read(rip, LONGEST)
    return device.memory.code(rip, LONGEST)


def repeat(thread: ProgramThread, address: int) -> bool:
    """A fault found nothing wrong any more: make sure of it; whether to repeat the instruction."""
    image, page = thread.image, address & _PAGE_MASK
    spot = thread.regs.rip, address
    thread.spurious = thread.spurious[0] + 1 if thread.spurious[1] == spot else 1, spot
    if thread.spurious[0] > _SPURIOUS_LIMIT:
        return False
    if not image.pager.touched(page):
        image.space.reshow(page)
    return True


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


def send(thread: ProgramThread, number: int, code: int, address: int) -> None:
    """Make the signal that will be delivered carry this information."""
    thread.outgoing = SigInfo(signo=number, code=code, addr=address)
