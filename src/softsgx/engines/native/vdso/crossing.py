"""Moves a thread that is stopped in the middle of a crossing to its start or its end.

The machine already has the thread inside or outside.  To move it forward, this module loads what
the next instructions of the crossing would load; to move it back, it restores what the earlier ones
have changed.  The result is the same as if the crossing were one instruction.

Source:
    ``vdso/permit_code.py``, whose labels these are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.engines.native.vdso.crossing_sites import ExitSite
from softsgx.engines.native.vdso.entry_code import TAIL
from softsgx.engines.native.vdso.host_jumps import EntrySite
from softsgx.engines.native.vdso.permit_code import TAIL_BYTES
from softsgx.engines.native.vdso.permit_table import PermitTable, Slot
from softsgx.engines.native.vdso.stubs import Stub

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.program import ProgramThread

__all__ = ["straighten"]

_EENTER, _EEXIT = 2, 4
_ARITHMETIC = 0x8D5  # OF, SF, ZF, AF, PF, CF
_LOW_FLAGS, _OF_SHIFT = 0xD5, 11


def straighten(thread: ProgramThread) -> None:
    """Move a stopped thread out of the middle of a crossing, if it is in one.

    Raises:
        Gone: the thread has died.
    """
    image, rip = thread.image, thread.load().rip
    vdso, place = image.vdso, rip - image.vdso_base
    if vdso.pushed <= place < vdso.permit_end:
        _entry(thread, place)
    elif vdso.tails <= place < vdso.answers:
        _tail(thread, (place - vdso.tails) % TAIL_BYTES)
    else:
        left, entered = image.exit_stubs.find(rip), image.entry_stubs.find(rip)
        if left is not None:
            _exit(thread, *left)
        elif entered is not None:
            _own_entry(thread, *entered)


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
        _end_entry(thread, _slot_inside(thread))
        regs.rcx = base + vdso.eenter_after
    thread.store()


def _own_entry(thread: ProgramThread, stub: Stub[EntrySite], at: int) -> None:
    """The thread is in a stub that stands for an ENCLU of its host."""
    regs, label = thread.regs, stub.labels
    if label["added"] <= at < label["refuse"] and thread.cpu.inside is not None:
        slot = _slot_inside(thread)
        _take_back(thread, slot)
        regs.rcx = stub.site.behind
        _end_entry(thread, slot)
        slot.set("lock", 0)
    else:
        _undo_own_entry(thread, at, label)
        regs.rip, regs.rax = stub.site.at - max(0, label["begun"] - at), _EENTER
    thread.store()


def _undo_own_entry(thread: ProgramThread, at: int, label: dict[str, int]) -> None:
    """Restore all that the entry has changed but RAX and RIP, and release the lock."""
    regs, table = thread.regs, thread.image.permits
    if at < label["swapped"] or label["free"] <= at < label["owned"] or at >= label["undone"]:
        return
    if at == label["released"]:
        regs.rdx = regs.rax
        return
    if at < label["owned"]:
        owned = at == label["locked"] and not regs.rcx
        regs.rcx = regs.rax
        if not owned:
            return
    assert table is not None, "a lock is held in no table"
    slot = table.slot_of_tcs(regs.rbx)
    if label["owned"] <= at < label["saved"]:
        regs.rcx = regs.rax
    elif at >= label["saved"]:
        regs.rcx = slot.word("rcx")
    if at >= label["spilled"]:
        _take_back(thread, slot)
        regs.rdi, regs.rsi, regs.r10 = slot.word("rdi"), slot.word("rsi"), slot.word("r10")
    slot.set("lock", 0)


def _tail(thread: ProgramThread, at: int) -> None:
    """The thread is in the tail of a slot, inside."""
    slot = _slot_inside(thread)
    if at < TAIL["loaded"]:
        thread.regs.rdx = slot.word("rdx")
    if at < TAIL["released"]:
        slot.set("lock", 0)
    _end_entry(thread, slot)
    thread.store()


def _slot_inside(thread: ProgramThread) -> Slot:
    inside, table = thread.cpu.inside, thread.image.permits
    slot = None if table is None or inside is None else table.slot(inside.tcs_linaddr)
    assert slot is not None, "a thread has entered by a permit of no slot"
    return slot


def _end_entry(thread: ProgramThread, slot: Slot) -> None:
    """Load what EENTER loads, but for RCX."""
    regs = thread.regs
    regs.rip, regs.rax = slot.word("entry"), slot.word("cssa")
    regs.fs_base, regs.gs_base = slot.word("fs"), slot.word("gs")


def _exit(thread: ProgramThread, stub: Stub[ExitSite], at: int) -> None:
    image, regs, label = thread.image, thread.regs, stub.labels
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
        regs.rip = stub.site.at - max(0, label["begun"] - at)
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
