"""A slot has room for every copy; a thread in it is at its instruction, or behind it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from softsgx.engines.native.abi import UserRegs
from softsgx.engines.native.faults.extended import COPIES
from softsgx.engines.native.vdso.out_of_line import SLOT_BYTES, OutOfLine, OutOfLineSlots

START, SITE, LENGTH = 0x1000, 0x7000_0000_0123, 5
OWN, GIVEN = (1 << 64) - 1, 7
SLOTS = 64


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("memory")
    yield fd
    os.close(fd)


def fill(slots: OutOfLineSlots, tid: int) -> OutOfLine | None:
    regs = UserRegs(rip=SITE, rax=OWN, rcx=OWN - 1, rdx=OWN - 2)
    return slots.fill(tid, regs, LENGTH, b"\x90" * 4, (GIVEN, GIVEN, GIVEN))


def test_every_copy_fits_into_a_slot() -> None:
    assert max(len(copy) for pair in COPIES.values() for copy in pair) == 4
    assert SLOT_BYTES >= 4 + 3 * 10 + 14


def test_registers_of_a_thread_in_its_slot_are_those_at_the_instruction_or_behind(
    memory: int,
) -> None:
    how = fill(OutOfLineSlots(memory, START), 1)
    assert how is not None
    for ahead in range(SLOT_BYTES):
        regs = UserRegs(rip=how.start + ahead, rax=GIVEN, rcx=GIVEN, rdx=OWN - 2)
        assert how.leave(regs)
        assert regs.rip == (SITE if ahead < 4 else SITE + LENGTH)
        assert (regs.rax, regs.rcx, regs.rdx) == (OWN, OWN - 1, OWN - 2)
    for elsewhere in (SITE, SITE + LENGTH, how.start - 1, how.start + SLOT_BYTES):
        regs = UserRegs(rip=elsewhere, rax=GIVEN)
        assert not how.leave(regs)
        assert (regs.rip, regs.rax) == (elsewhere, GIVEN)


def test_a_thread_begins_with_what_the_copy_needs_and_all_else_is_its_own(memory: int) -> None:
    how = fill(OutOfLineSlots(memory, START), 1)
    assert how is not None
    regs = UserRegs(rip=SITE, rax=OWN, rcx=OWN, rdx=OWN, rbx=5, rflags=0x246)
    how.enter(regs)
    assert (regs.rip, regs.rax, regs.rcx, regs.rdx) == (how.start, GIVEN, GIVEN, GIVEN)
    assert (regs.rbx, regs.rflags) == (5, 0x246)


def test_no_two_threads_have_one_slot_until_one_of_them_has_ended(memory: int) -> None:
    slots = OutOfLineSlots(memory, START)
    found = [fill(slots, tid) for tid in range(SLOTS + 1)]
    assert found[-1] is None
    starts = [how.start for how in found if how is not None]
    assert len(set(starts)) == SLOTS == len(starts)
    assert all(START <= start <= START + 4096 - SLOT_BYTES for start in starts)
    slots.release(5)
    again = fill(slots, SLOTS)
    assert again is not None and again.start == starts[5]
