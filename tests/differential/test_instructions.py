"""Typed calls against instructions: the same history through both interfaces ends the same.

Two machines of one seed run one random history each: one by ``machine.leaves`` and ``cpu.enclu``
with operands as objects, its twin by ENCLS and ENCLU with operands in memory.  After every step
the outcomes agree, and at the end every EPCM entry, every byte in the EPC and everything that was
written out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.scenes import state_of
from tests.support.threads import AEP, DATA, ENCLU_AT, SSA, TCS, Border

from softsgx.arch import (
    PAGE_BYTES,
    Encls,
    Enclu,
    PageInfo,
    PageType,
    Pcmd,
    SecInfo,
    Status,
    reports_code,
)
from softsgx.hw import Fault, PageInfoArgs, aex, encls, enclu
from softsgx.hw.access import store

NEW = 0x2_0000  # offset where EAUG adds a page
INFO, META, BUFFER = 0x10_0000, 0x10_0080, 0x11_0000  # operands of the instructions, in memory
ZF_OR_CF = 1 << 6 | 1

Blob = tuple[int, bytes, bytes, int]  # LINADDR, SRCPGE, PCMD, slot


class Way:
    """One machine and what an operating system and a thread have of it."""

    def __init__(self) -> None:
        self.border = Border()
        self.hw, self.built = self.border.hw, self.border.built
        section = self.hw.config.sections[0]
        self.va, self.spare = section.page(50), section.page(51)
        self.hw.leaves.epa(int(PageType.VA), self.va)
        self.border.tables.map(self.border.base + NEW, self.spare, 7)
        self.blobs: list[Blob] = []
        self.pages = [
            *(self.built.epc(at) for at in (DATA, TCS, SSA, SSA + PAGE_BYTES)),
            *(self.built.secs, self.va, self.spare, 0x1000),
        ]

    # The two ways in; each returns a code, ``None``, or the fault as text.

    def kernel(self, leaf: Encls, rbx: Any, rcx: int, rdx: int = 0) -> object:
        """Execute an ENCLS leaf."""
        raise NotImplementedError

    def user(self, leaf: Enclu, *operands: int) -> object:
        """Execute an ENCLU leaf."""
        raise NotImplementedError

    # Steps of a history.

    def block(self, which: int) -> object:
        """EBLOCK."""
        return self.kernel(Encls.EBLOCK, None, self.pages[which])

    def track(self, which: int) -> object:
        """ETRACK, or ETRACKC."""
        leaf = Encls.ETRACKC if which % 2 else Encls.ETRACK
        return self.kernel(leaf, None, self.pages[4])

    def remove(self, which: int) -> object:
        """EREMOVE."""
        return self.kernel(Encls.EREMOVE, None, self.pages[which])

    def restrict(self, which: int) -> object:
        """EMODPR to read-only."""
        return self.kernel(Encls.EMODPR, SecInfo.of(PageType.REG, 1), self.pages[which])

    def retype(self, which: int) -> object:
        """EMODT to TRIM."""
        return self.kernel(Encls.EMODT, SecInfo.of(PageType.TRIM), self.pages[which])

    def augment(self, which: int) -> object:
        """EAUG."""
        info = PageInfoArgs(self.border.base + NEW, 0, 0, self.built.secs)
        return self.kernel(Encls.EAUG, info, self.pages[which])

    def evict(self, which: int) -> object:
        """EWB into a slot of its own; what is written out is kept."""
        info = PageInfoArgs(0, bytearray(PAGE_BYTES), bytearray(Pcmd.SIZE))
        slot = self.va + 8 * (which % 4)
        code = self.kernel(Encls.EWB, info, self.pages[which], slot)
        if code in (Status.SUCCESS, Status.VA_SLOT_OCCUPIED):
            self.blobs.append((info.linaddr, bytes(info.srcpge), bytes(info.secinfo), slot))  # type: ignore[arg-type]
        return code

    def load(self, which: int) -> object:
        """ELDU or ELDB of the last blob, or of one before."""
        if not self.blobs:
            return None
        linaddr, srcpge, pcmd, slot = self.blobs[-1 - which % len(self.blobs)]
        secs = 0 if pcmd[1] in (PageType.SECS, PageType.VA) else self.built.secs
        info = PageInfoArgs(linaddr, srcpge, pcmd, secs)
        leaf = Encls.ELDB if which % 3 == 0 else Encls.ELDU
        return self.kernel(leaf, info, self.pages[which], slot)

    def enter(self, which: int) -> object:
        """EENTER, or ERESUME."""
        regs = self.border.cpu.regs
        regs.rsp, regs.rflags = 0x7000 + which, 0x202
        leaf = Enclu.ERESUME if which % 2 else Enclu.EENTER
        return self.user(leaf, self.border.rbx, AEP)

    def leave(self, which: int) -> object:
        """EEXIT."""
        return self.user(Enclu.EEXIT, ENCLU_AT)

    def interrupt(self, which: int) -> object:
        """AEX with registers that do not depend on the way in."""
        cpu = self.border.cpu
        if cpu.inside is None:
            return None
        regs = cpu.regs
        regs.rax = regs.rbx = regs.rcx = regs.rdx = regs.rip = which
        regs.rflags = 0x202
        aex(cpu, 0xFD)
        return regs.rip

    def accept(self, which: int) -> object:
        """EACCEPT, EACCEPTCOPY or EMODPE of the new page."""
        border = self.border
        flags = [0x203 | 8, 0x201 | 32, 0x400 | 16, 0x205][which % 4]
        where, new = border.base + DATA, border.base + NEW
        try:
            store(border.cpu, where, SecInfo(flags=flags).pack())
        except Fault as fault:
            return str(fault)
        if which % 4 == 3:
            return self.user(Enclu.EACCEPTCOPY, where, new, border.base + SSA + PAGE_BYTES)
        if which == 4:
            return self.user(Enclu.EMODPE, where, new)
        return self.user(Enclu.EACCEPT, where, new)

    STEPS = (
        *(block, track, remove, restrict, retype, augment),
        *(evict, load, enter, leave, interrupt, accept),
    )


class Typed(Way):
    """Calls of functions, with objects."""

    def kernel(self, leaf: Encls, rbx: Any, rcx: int, rdx: int = 0) -> object:
        """As :meth:`Way.kernel`."""
        function: Callable[..., object] = getattr(self.hw.leaves, leaf.name.lower())
        operands = [rcx] if rbx is None else [rbx, rcx]
        if leaf in (Encls.EWB, Encls.ELDU, Encls.ELDB):
            operands.append(rdx)
        return _ended(lambda: function(*operands))

    def user(self, leaf: Enclu, *operands: int) -> object:
        """As :meth:`Way.user`."""
        cpu = self.border.cpu
        if (cpu.inside is None) != (leaf in (Enclu.EENTER, Enclu.ERESUME)):
            return "#GP(0)"  # the last check before any leaf
        cpu.regs.rip = ENCLU_AT
        return _ended(lambda: getattr(cpu.enclu, leaf.name.lower())(*operands))


class ByRegisters(Way):
    """Instructions, with operands in memory."""

    def kernel(self, leaf: Encls, rbx: Any, rcx: int, rdx: int = 0) -> object:
        """As :meth:`Way.kernel`."""
        cpu, address = self.hw.cpus[0], 0
        if isinstance(rbx, PageInfoArgs):
            address = self._store_info(rbx)
        elif isinstance(rbx, SecInfo):
            address = META
            self.hw.ram_write(META, rbx.pack())
        cpu.regs.rax, cpu.regs.rbx, cpu.regs.rcx, cpu.regs.rdx = int(leaf), address, rcx, rdx
        code = self._executed(cpu, leaf, encls)
        if leaf is Encls.EWB:
            rbx.linaddr = PageInfo.unpack(self.hw.ram_read(INFO, 32)).linaddr
            rbx.srcpge[:] = self.hw.ram_read(BUFFER, PAGE_BYTES)
            rbx.secinfo[:] = self.hw.ram_read(META, Pcmd.SIZE)
        return code

    def _store_info(self, info: PageInfoArgs) -> int:
        srcpge = secinfo = 0
        if info.srcpge:
            srcpge = BUFFER
            self.hw.ram_write(BUFFER, bytes(info.srcpge))
        if info.secinfo:
            secinfo = META
            self.hw.ram_write(META, bytes(info.secinfo))  # type: ignore[arg-type]
        packed = PageInfo(linaddr=info.linaddr, srcpge=srcpge, secinfo=secinfo, secs=info.secs)
        self.hw.ram_write(INFO, packed.pack())
        return INFO

    def user(self, leaf: Enclu, *operands: int) -> object:
        """As :meth:`Way.user`."""
        cpu = self.border.cpu
        regs = cpu.regs
        regs.rip = ENCLU_AT
        kept = regs.rax, regs.rbx, regs.rcx, regs.rdx
        regs.rax = int(leaf)
        for name, value in zip(("rbx", "rcx", "rdx"), operands, strict=False):
            setattr(regs, name, value)
        code = self._executed(cpu, leaf, enclu)
        if leaf not in (Enclu.EENTER, Enclu.ERESUME, Enclu.EEXIT) or code is not None:
            regs.rax, regs.rbx, regs.rcx, regs.rdx = kept
        return code

    def _executed(self, cpu: Any, leaf: Any, instruction: Callable[[Any], None]) -> object:
        before = cpu.regs.rip
        fault = _ended(lambda: instruction(cpu))
        if fault is not None:
            assert cpu.regs.rip == before, "a fault has moved RIP"
            return fault
        if not reports_code(leaf):
            return None
        assert cpu.regs.rip == before + 3, "RIP is not behind the instruction"
        assert bool(cpu.regs.rflags & ZF_OR_CF) == bool(cpu.regs.rax), "flags without a code"
        return Status(cpu.regs.rax)


def _ended(run: Callable[[], object]) -> object:
    try:
        return run()
    except Fault as fault:
        return str(fault)


steps = st.lists(
    st.tuples(st.sampled_from(range(len(Way.STEPS))), st.integers(0, 7)), min_size=8, max_size=40
)


def play(history: list[tuple[int, int]]) -> list[tuple[str, object]]:
    """Run a history both ways; return its outcomes."""
    ways: list[Way] = [Typed(), ByRegisters()]
    outcomes: list[tuple[str, object]] = []
    for number, which in history:
        name = Way.STEPS[number].__name__
        typed, by_registers = (getattr(way, name)(which) for way in ways)
        assert typed == by_registers, f"{name}({which})"
        outcomes.append((name, typed))
    typed_way, register_way = ways
    assert typed_way.blobs == register_way.blobs
    assert state_of(typed_way.hw) == state_of(register_way.hw)
    for way in ways:
        way.hw.check_invariants()
    return outcomes


@settings(max_examples=60, deadline=None)
@given(steps)
def test_both_ways_in_give_the_same_history(history: list[tuple[int, int]]) -> None:
    play(history)


def test_a_history_with_every_step_succeeds_both_ways() -> None:
    """Random histories mostly fail early; here every kind of step succeeds once."""
    number = {step.__name__: index for index, step in enumerate(Way.STEPS)}
    history = [
        *(("augment", 6), ("enter", 0), ("accept", 0), ("restrict", 6), ("track", 0)),
        *(("interrupt", 1), ("enter", 1), ("accept", 1), ("accept", 4), ("leave", 0)),
        *(("block", 0), ("track", 1), ("evict", 0), ("load", 0), ("block", 3), ("track", 0)),
        *(("evict", 3), ("load", 4), ("retype", 6), ("remove", 6)),
    ]
    outcomes = play([(number[name], which) for name, which in history])
    succeeded = {name for name, code in outcomes if code in (None, Status.SUCCESS, AEP)}
    assert succeeded == number.keys(), outcomes


@pytest.mark.parametrize("leaf", ["EBLOCK", "EREMOVE"])
def test_the_comparison_notices_a_difference(leaf: str) -> None:
    typed, by_registers = Typed(), ByRegisters()
    typed.kernel(Encls[leaf], None, typed.pages[0])
    assert state_of(typed.hw) != state_of(by_registers.hw)
