"""The fast EENTER and EEXIT against the readable ones, on the same histories.

Method: two machines with the same secrets, one with optimised leaves, hold the same enclave and
take the same entries, exits and interrupts, while pages, registers and modes change under them;
they must agree in result, registers, EPCM, counts and every byte.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.hw import RepeatingRuntime
from tests.support.inhabited import AEP, DATA, Inhabited

from softsgx.arch import Status
from softsgx.hw import Fault, LogicalProcessor, Machine, MachineConfig
from softsgx.hw.optimised import OPTIMISED
from softsgx.hw.optimised.entry import try_virtual_exit
from softsgx.hw.processor import Registers

THREADS = 2
PAGE = 4096


class Half:
    """One machine with an enclave that its processors enter."""

    def __init__(self, *, fast: bool) -> None:
        config = MachineConfig.with_epc(64 * PAGE, processors=THREADS)
        self.hw = Machine(config, RepeatingRuntime(seed=7), optimised=OPTIMISED if fast else None)
        self.enclave = Inhabited(THREADS, self.hw)
        for cpu in self.hw.cpus:
            cpu.regs.xcr0 = 7  # more than the enclave's XFRM

    def offsets(self, thread: int) -> list[int]:
        """TCS and SSA frames of a thread."""
        start = self.enclave.tcs(thread)
        return [start, start + PAGE, start + 2 * PAGE]

    def run(self, step: Step) -> str:
        enclave, cpu = self.enclave, self.enclave.cpu(step.cpu)
        regs = cpu.regs
        try:
            match step.what:
                case "enter":
                    regs.rip, regs.rsp, regs.rbp = AEP, 0x7000 + step.value, 0x8000 + step.value
                    linaddr = enclave.base + enclave.tcs(step.thread) + (step.value == 3)
                    cpu.enclu.eenter(linaddr, step.address or AEP)
                case "exit":
                    cpu.enclu.eexit(step.address or AEP)
                case "resume":
                    enclave.resume(step.cpu, step.thread)
                case "interrupt":
                    enclave.interrupt(step.cpu)
                case "registers":
                    regs.rflags ^= 0x100
                    regs.fs_base, regs.gs_base = step.value << 12, step.value << 13
                case "mode":
                    self.change_mode(cpu, step.value)
                case "page":
                    self.change_page(self.offsets(step.thread)[step.address % 3], step.value)
                case "tcs":
                    page = enclave.page(enclave.tcs(step.thread))
                    at, data = TCS_CHANGES[step.value]
                    self.hw.store.write(page, at, data)
                case "track":
                    enclave.track()
                case "enclave":
                    enclave.enclave.flags ^= FLAG_CHANGES[step.value]
                case _:
                    raise AssertionError(step)
        except Fault as fault:
            return str(fault)
        return "done"

    def change_mode(self, cpu: LogicalProcessor, value: int) -> None:
        match value:
            case 0:
                cpu.cr4_osfxsr = not cpu.cr4_osfxsr
            case 1 if cpu.inside is None:
                cpu.cr4_osxsave = not cpu.cr4_osxsave
            case 2 if cpu.inside is None:
                cpu.mode64 = not cpu.mode64
            case 3 if cpu.inside is None:
                cpu.regs.xcr0 ^= 2
            case _:
                pass

    def change_page(self, offset: int, value: int) -> None:
        page = self.enclave.page(offset)
        match value:
            case 0:
                page.blocked = not page.blocked
            case 1:
                page.pending = not page.pending
            case 2:
                page.modified = not page.modified
            case 3:
                page.rwx ^= 2
            case 4:
                page.linaddr ^= PAGE
            case 5:
                page.lock = -1 if page.lock == 0 else 0
            case _:
                raise AssertionError(value)

    def state(self) -> list[object]:
        """Everything that a leaf could have changed."""
        enclave = self.enclave.enclave
        seen: list[object] = [enclave.epoch, enclave.cur_count, enclave.prev_count]
        seen.append(repr(enclave.crossings))
        for cpu in self.hw.cpus:
            inside = cpu.inside
            seen += [getattr(cpu.regs, item.name) for item in fields(Registers)]
            seen += [cpu.fs, cpu.gs, cpu.ssp, cpu.u_cet, cpu.cr2, dict(cpu.tlb)]
            if inside is not None:
                seen += [inside.tcs.addr, inside.tcs_linaddr, inside.entry_epoch, inside.outside]
                seen += [inside.frame.gpr.addr, [page.addr for page in inside.frame.xsave]]
                seen.append(inside.cet_slot)
        for thread in range(THREADS):
            for offset in self.offsets(thread):
                page = self.enclave.page(offset)
                seen += [repr(page), page.lock, self.hw.store.read(page, 0, PAGE)]
        return seen


#: Offset and bytes: STATE, FLAGS, OSSA, CSSA, NSSA, OENTRY, OFSBASE.
TCS_CHANGES = [
    (8, b"\x01"),
    (8, b"\x00"),
    (24, b"\x02"),
    (24, b"\x00"),
    (16, b"\x01"),
    (28, b"\x00"),
]
#: INIT, MODE64BIT, AEX-Notify, CET, and two times nothing.
FLAG_CHANGES = [1, 4, 1 << 10, 1 << 6, 0, 0]


@dataclass(frozen=True)
class Step:
    what: str
    cpu: int
    thread: int
    value: int
    address: int


USUAL = ["enter", "enter", "enter", "exit", "exit", "exit", "interrupt", "resume", "registers"]
RARE = ["mode", "page", "tcs", "track", "enclave"]

steps = st.builds(
    Step,
    st.sampled_from(USUAL * 2 + RARE),
    st.integers(0, THREADS - 1),
    st.integers(0, THREADS - 1),
    st.integers(0, 5),
    st.sampled_from([0, 0, 0, 0, 1 << 46, 1 << 47, (1 << 64) - 4096]),
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.lists(steps, max_size=25))
def test_fast_and_readable_entries_do_the_same(history: list[Step]) -> None:
    fast, readable = Half(fast=True), Half(fast=False)
    for step in history:
        assert fast.run(step) == readable.run(step), step
        assert fast.state() == readable.state(), step


DISTURBANCES = [
    *(Step("mode", 0, 0, value, 0) for value in range(4)),
    *(Step("page", 0, 0, value, which) for value in range(6) for which in range(3)),
    *(Step("tcs", 0, 0, value, 0) for value in range(len(TCS_CHANGES))),
    *(Step("enclave", 0, 0, value, 0) for value in range(len(FLAG_CHANGES))),
    Step("registers", 0, 0, 1, 0),
    Step("enter", 1, 0, 0, 0),
    Step("enter", 1, 1, 0, 0),
]
ROUND_TRIP = [Step("enter", 0, 0, 1, 0), Step("exit", 0, 0, 0, 0)]


@pytest.mark.parametrize("disturbance", DISTURBANCES, ids=str)
def test_both_implementations_agree_after_any_disturbance(disturbance: Step) -> None:
    fast, readable = Half(fast=True), Half(fast=False)
    for step in (*ROUND_TRIP, disturbance, *ROUND_TRIP, disturbance, *ROUND_TRIP):
        assert fast.run(step) == readable.run(step), step
        assert fast.state() == readable.state(), step
    fast, readable = Half(fast=True), Half(fast=False)
    for step in (ROUND_TRIP[0], disturbance, ROUND_TRIP[1], *ROUND_TRIP):
        assert fast.run(step) == readable.run(step), step
        assert fast.state() == readable.state(), step


def test_the_fast_entries_are_those_that_run() -> None:
    fast, readable = Half(fast=True), Half(fast=False)
    for half, name in ((fast, "entry_leaves"), (readable, "_instruction")):
        leaf = half.hw.cpus[0].enclu.eenter
        assert leaf.__qualname__.startswith(name), leaf


def recounted(half: Half) -> list[object]:
    """State without crossings and SSA frames, which a passing interrupt leaves alone."""
    enclave, cpu = half.enclave.enclave, half.hw.cpus[0]
    inside = cpu.inside
    assert inside is not None
    regs = [getattr(cpu.regs, item.name) for item in fields(Registers)]
    seen = [enclave.epoch, enclave.cur_count, enclave.prev_count, inside.entry_epoch, *regs]
    seen += [inside.tcs.addr, inside.frame.gpr.addr, inside.outside, dict(cpu.tlb)]
    return [*seen, half.hw.store.read(inside.tcs, 0, PAGE)]


BETWEEN = [
    Step("track", 0, 0, 0, 0),
    *(step for step in DISTURBANCES if step.what not in ("mode", "registers")),
]


@pytest.mark.parametrize("between", BETWEEN, ids=str)
@pytest.mark.parametrize("tracked", [False, True])
def test_an_interrupt_passes_only_where_exit_and_resumption_would_leave_the_same(
    between: Step, tracked: bool
) -> None:
    passing, resuming = Half(fast=True), Half(fast=False)
    for half in (passing, resuming):
        for what in ("enter", "interrupt", "resume"):
            half.run(Step(what, 0, 0, 1, 0))
        half.run(between)
        if tracked:
            half.run(Step("track", 0, 0, 0, 0))
    before = passing.state()
    cpu = passing.hw.cpus[0]
    assert cpu.inside is not None
    cpu.tlb[0] = cpu.tlb.get(0)  # type: ignore[assignment]
    if try_virtual_exit(cpu):
        resuming.run(Step("interrupt", 0, 0, 0, 0))
        assert resuming.run(Step("resume", 0, 0, 0, 0)) == "done"
        assert recounted(passing) == recounted(resuming)
    else:
        cpu.tlb.clear()
        assert passing.state() == before


def test_a_thread_that_an_interrupt_passes_does_not_hold_up_eviction() -> None:
    half = Half(fast=True)
    half.run(ROUND_TRIP[0])
    enclave = half.enclave
    enclave.block(DATA[0])
    enclave.track()
    assert enclave.ewb(DATA[0]) is Status.NOT_TRACKED
    assert try_virtual_exit(half.hw.cpus[0])
    assert enclave.ewb(DATA[0]) is Status.SUCCESS
    assert half.run(ROUND_TRIP[1]) == "done"
