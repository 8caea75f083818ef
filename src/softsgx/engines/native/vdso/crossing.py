"""Moves a thread that is stopped in the middle of a crossing to its start or its end.

The machine already has the thread inside or outside.  To move it forward, this module loads what
the next instructions of the crossing would load; to move it back, it restores what the earlier ones
have changed.  The result is the same as if the crossing were one instruction.

Source:
    ``vdso/permit_code.py``, whose labels these are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.engines.native.vdso.permit_code import STUB_BYTES
from softsgx.engines.native.vdso.permit_table import PermitTable, Slot

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.program import ProgramThread

__all__ = ["straighten"]

_EEXIT = 4
_ARITHMETIC = 0x8D5  # OF, SF, ZF, AF, PF, CF
_LOW_FLAGS, _OF_SHIFT = 0xD5, 11


def straighten(thread: ProgramThread) -> None:
    """Move a stopped thread out of the middle of a crossing, if it is in one.

    Raises:
        Gone: the thread has died.
    """
    vdso, place = thread.image.vdso, thread.load().rip - thread.image.vdso_base
    if vdso.pushed <= place < vdso.permit_end:
        _entry(thread, place)
    elif vdso.stubs <= place < vdso.answers:
        _exit(thread, *divmod(place - vdso.stubs, STUB_BYTES))


def _entry(thread: ProgramThread, place: int) -> None:
    image, regs, inside = thread.image, thread.regs, thread.cpu.inside
    vdso, base = image.vdso, image.vdso_base
    if place < vdso.popping:
        regs.rip = base + vdso.undo
    elif place < vdso.popped:
        regs.rip += vdso.undo - vdso.popping
    elif place < vdso.added or inside is None:
        regs.rip = base + vdso.ask
    else:
        slot = None if image.permits is None else image.permits.slot(inside.tcs_linaddr)
        assert slot is not None, "a thread has entered by a permit of no slot"
        regs.rip, regs.rax, regs.rcx = slot.word("entry"), slot.word("cssa"), base
        regs.rcx += vdso.eenter_after
        regs.fs_base, regs.gs_base = slot.word("fs"), slot.word("gs")
    thread.store()


def _exit(thread: ProgramThread, number: int, at: int) -> None:
    image, regs = thread.image, thread.regs
    assert number < len(image.exit_stubs), "a thread is at an exit of no enclave"
    stub = image.exit_stubs[number]
    label = stub.labels
    if label["released"] <= at < label["refuse"]:
        if at == label["released"]:
            regs.rdx = regs.rax
        regs.rip = regs.rbx
    elif label["tried"] <= at < label["refuse"] and thread.cpu.inside is None:
        slot = _slot_at(image.permits, regs.rdx)
        regs.rcx = slot.word("rcx_then")
        _take_back(thread, slot)
        slot.set("lock", 0)
        regs.rip = regs.rbx
    else:
        _undo_exit(thread, at, label)
        regs.rip = stub.enclu - max(0, label["begun"] - at)
    regs.rax = _EEXIT
    thread.store()


def _undo_exit(thread: ProgramThread, at: int, label: dict[str, int]) -> None:
    """Restore all that the exit has changed but RAX and RIP, and release the lock."""
    regs, table = thread.regs, thread.image.permits
    if at < label["locked"] or label["free"] <= at < label["owned"]:
        return
    if at == label["locked"]:
        owned = not regs.rax
    elif at < label["saved"]:
        owned = at >= label["owned"] or (at == label["swapped"] and not regs.rcx)
        regs.rcx = regs.rax
    else:
        slot = _slot_at(table, regs.rcx if at <= label["spilled"] else regs.rdx)
        regs.rcx = slot.word("rcx")
        if at >= label["spilled"]:
            _take_back(thread, slot)
            regs.fs_base, regs.gs_base = slot.word("inside_fs"), slot.word("inside_gs")
        slot.set("lock", 0)
        return
    if owned:
        assert table is not None, "a lock is held in no table"
        table.slot_of_gs(regs.gs_base).set("lock", 0)


def _take_back(thread: ProgramThread, slot: Slot) -> None:
    """Restore RDX, R11 and flags from the slot."""
    regs, kept = thread.regs, slot.word("flags")
    regs.rdx, regs.r11 = slot.word("rdx"), slot.word("r11")
    flags = kept >> 8 & _LOW_FLAGS | (kept & 1) << _OF_SHIFT
    regs.rflags = regs.rflags & ~_ARITHMETIC | flags


def _slot_at(table: PermitTable | None, pointer: int) -> Slot:
    assert table is not None, "a thread has a slot in no table"
    return table.slot_at(pointer)
