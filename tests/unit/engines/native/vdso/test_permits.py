"""An entry by permit is an entry.

Method: a real machine with an enclave whose processor has the registers of a fake thread; what the
vDSO does with a permit is done to the page by hand, so that stops can come between any two of its
steps.
"""

from __future__ import annotations

import gc
import os
import struct
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.support.inhabited import Inhabited

from softsgx.engines.native.tracing.registers import NativeRegisters
from softsgx.engines.native.vdso.code import PERMIT
from softsgx.engines.native.vdso.elf import build_vdso
from softsgx.engines.native.vdso.permits import Permits
from softsgx.engines.native.vdso.shared_page import SharedPage
from softsgx.hw import Machine, MachineConfig, aex
from softsgx.hw.optimised import OPTIMISED
from softsgx.runtime import InlineRuntime

BASE = 0x7F00_0000_0000
EENTER_STACK, EENTER_FRAME, OUT_FS, OUT_GS = 0x7000, 0x8000, 0x1000, 0x2000
VDSO = build_vdso({})
EENTER = BASE + VDSO.eenter_after - 3


@dataclass
class Thread:
    """As much of a program's thread as permits use."""

    image: Any
    cpu: Any
    regs: NativeRegisters = field(default_factory=NativeRegisters)
    stored: int = 0

    def load(self) -> NativeRegisters:
        return self.regs

    def store(self) -> None:
        self.stored += 1


class Scene:
    """One thread, one enclave, and the page that both sides see."""

    def __init__(self) -> None:
        config = MachineConfig.with_epc(64 * 4096, processors=1)
        self.inhabited = Inhabited(1, Machine(config, InlineRuntime(seed=3), optimised=OPTIMISED))
        self.page = SharedPage(os.memfd_create("permits"))
        self.alone = True
        self.permits = Permits(lambda: self.alone)
        cpu = self.inhabited.cpu(0)
        aep = BASE + VDSO.aep
        self.gone: set[int] = set()
        space = SimpleNamespace(entry=lambda linaddr: None if linaddr in self.gone else (0, 3))
        image = SimpleNamespace(
            page=self.page, vdso=VDSO, vdso_base=BASE, aep=aep, eenter=EENTER, page_table=space
        )
        self.fake = Thread(image, cpu)
        self.fake.regs.xcr0 = cpu.regs.xcr0
        cpu.regs = cast(Any, self.fake.regs)
        self.cpu, self.regs = cpu, self.fake.regs
        self.thread = cast(Any, self.fake)
        self.tcs = self.inhabited.base + self.inhabited.tcs(0)

    def word(self, name: str) -> int:
        return self.page.words[PERMIT[name] // 8]

    def write(self, name: str, value: int) -> None:
        self.page.words[PERMIT[name] // 8] = value

    def outside(self) -> None:
        """Registers of a thread in our vDSO, at the EENTER."""
        regs = self.regs
        regs.rsp, regs.rbp, regs.rflags = EENTER_STACK, EENTER_FRAME, 0x246
        regs.fs_base, regs.gs_base = OUT_FS, OUT_GS
        regs.rip = EENTER

    def enter_with_a_stop(self) -> None:
        self.permits.stopped(self.thread)
        self.outside()
        self.cpu.enclu.eenter(self.tcs, BASE + VDSO.aep)
        self.permits.entered(self.thread, self.tcs)

    def use(self) -> None:
        """What the vDSO does, to the instruction that commits."""
        assert self.word("tcs") == self.tcs
        self.outside()
        self.note_stack(EENTER_STACK, EENTER_FRAME)
        self.write("outside_fs", OUT_FS)
        self.write("outside_gs", OUT_GS)
        self.write("used", 1)
        self.regs.rip = BASE + VDSO.permitted

    def note_stack(self, rsp: int, rbp: int) -> None:
        """Store URSP and URBP where the permit says."""
        offset = self.word("ursp") - self.inhabited.base
        page = self.inhabited.page(offset & -4096)
        self.inhabited.hw.store.write(page, offset % 4096, struct.pack("<QQ", rsp, rbp))

    def inside(self) -> None:
        """What the vDSO does then, and some steps of the enclave."""
        self.regs.fs_base, self.regs.gs_base = self.word("fs"), self.word("gs")
        self.regs.rip, self.regs.rsp = self.word("entry") + 5, 0xE000

    def exit(self) -> None:
        self.permits.stopped(self.thread)
        self.cpu.enclu.eexit(BASE + VDSO.eenter_after)
        self.permits.left(self.thread)

    def state(self) -> list[object]:
        """Everything that an entry changes in the machine."""
        inside, enclave = self.cpu.inside, self.inhabited.enclave
        seen: list[object] = [enclave.cur_count, repr(enclave.crossings), self.regs.xcr0]
        if inside is not None:
            seen += [inside.tcs.addr, inside.tcs_linaddr, inside.entry_epoch, inside.outside]
        at = self.inhabited.tcs(0)
        for offset in (at, at + 4096):
            seen.append(self.inhabited.hw.store.read(self.inhabited.page(offset), 0, 4096))
        return seen


def called_once() -> Scene:
    """A thread that has entered and left, and has a permit."""
    scene = Scene()
    scene.enter_with_a_stop()
    scene.exit()
    assert scene.word("tcs") == scene.tcs
    return scene


def test_the_machine_is_as_after_an_entry_that_stops() -> None:
    one, other = called_once(), called_once()
    one.enter_with_a_stop()
    other.use()
    other.inside()
    other.permits.stopped(other.thread)
    assert other.state() == one.state()
    assert other.word("tcs") == 0
    assert (other.regs.rsp, other.fake.stored) == (0xE000, 0), "the enclave's registers are its own"


def test_what_the_enclave_stores_as_urbp_and_ursp_stays() -> None:
    scene = called_once()
    scene.use()
    scene.inside()
    scene.note_stack(0x5000, 0x6000)
    scene.permits.stopped(scene.thread)
    aex(scene.cpu, 32)
    assert (scene.regs.rsp, scene.regs.rbp) == (0x5000, 0x6000)


def test_a_permit_ends_when_a_page_that_eenter_needs_leaves() -> None:
    for needed in ("tcs", "ursp"):
        scene = called_once()
        scene.permits.going()
        assert scene.word("tcs") == scene.tcs
        scene.gone.add(scene.word(needed) & -4096)
        scene.permits.going()
        assert scene.word("tcs") == 0
        scene.permits.stopped(scene.thread)
        assert scene.cpu.inside is None


def test_calls_by_permit_go_on_as_long_as_nothing_else_stops_the_thread() -> None:
    scene = called_once()
    for _ in range(5):
        scene.use()
        scene.inside()
        scene.exit()
    crossings = scene.inhabited.enclave.crossings
    assert (crossings.eenter, crossings.eexit) == (6, 6)
    assert scene.word("tcs") == scene.tcs


def test_whoever_is_stopped_between_use_and_entry_is_at_the_entry() -> None:
    scene = called_once()
    scene.use()
    scene.permits.stopped(scene.thread)
    regs, inside = scene.regs, scene.cpu.inside
    assert inside is not None
    assert regs.rip == scene.word("entry")
    assert (regs.rax, regs.rcx) == (0, BASE + VDSO.eenter_after)
    assert (regs.fs_base, regs.gs_base) == (scene.word("fs"), scene.word("gs"))
    assert (regs.rsp, scene.fake.stored) == (EENTER_STACK, 1)
    assert (inside.outside.fs_base, inside.outside.gs_base) == (OUT_FS, OUT_GS)


@pytest.mark.parametrize("steps", [0, 1, VDSO.permitted - VDSO.permit - 1])
def test_whoever_may_have_seen_a_permit_looks_again(steps: int) -> None:
    scene = called_once()
    scene.outside()
    scene.regs.rip = BASE + VDSO.permit + steps
    scene.permits.stopped(scene.thread)
    assert scene.regs.rip == BASE + VDSO.permit
    assert scene.word("tcs") == 0
    assert scene.cpu.inside is None


def test_a_stop_outside_ends_the_permit_and_moves_nobody() -> None:
    scene = called_once()
    scene.outside()
    scene.regs.rip = 0x40_0000
    scene.permits.stopped(scene.thread)
    assert (scene.word("tcs"), scene.regs.rip, scene.fake.stored) == (0, 0x40_0000, 0)
    scene.permits.left(scene.thread)
    assert scene.word("tcs") == 0, "nobody has entered since"


def test_a_call_that_stopped_in_between_earns_no_permit() -> None:
    scene = Scene()
    scene.enter_with_a_stop()
    scene.permits.stopped(scene.thread)  # a fault, say
    scene.exit()
    assert scene.word("tcs") == 0


def test_an_instruction_that_is_executed_in_another_way_costs_no_permit() -> None:
    scene = called_once()
    for _ in range(3):
        scene.use()
        scene.inside()
        for _instruction in range(2):
            scene.permits.stopped(scene.thread)
            scene.permits.outlast(scene.thread)
            scene.permits.going()
        scene.exit()
        assert scene.word("tcs") == scene.tcs
    assert scene.inhabited.enclave.crossings.eenter == 4


def test_a_page_that_leaves_at_such_a_stop_ends_the_permit_all_the_same() -> None:
    scene = called_once()
    needed = scene.tcs
    scene.use()
    scene.inside()
    scene.permits.stopped(scene.thread)
    scene.permits.outlast(scene.thread)
    scene.gone.add(needed)
    scene.permits.going()
    scene.gone.clear()
    scene.exit()
    assert scene.word("tcs") == 0


def test_such_a_stop_does_not_make_up_for_another_one() -> None:
    scene = Scene()
    scene.enter_with_a_stop()
    scene.permits.stopped(scene.thread)  # a fault, say
    scene.permits.stopped(scene.thread)
    scene.permits.outlast(scene.thread)
    scene.exit()
    assert scene.word("tcs") == 0


@pytest.mark.parametrize("why", ["not alone", "a listener", "no page"])
def test_some_entries_always_stop(why: str) -> None:
    scene = Scene()
    scene.alone = why != "not alone"
    if why == "a listener":
        scene.inhabited.hw.tracer = lambda event: None
    if why == "no page":
        scene.fake.image.page = None
    scene.enter_with_a_stop()
    scene.exit()
    assert scene.word("tcs") == 0


def test_a_thread_that_dies_inside_had_entered() -> None:
    scene = called_once()
    scene.use()
    scene.inside()
    scene.permits.ended(scene.thread)
    assert scene.cpu.inside is not None
    assert scene.inhabited.enclave.crossings.eenter == 2


def test_a_closed_page_leaves_no_descriptor() -> None:
    gc.collect()  # what earlier tests dropped closes its descriptors now, not in between
    before = os.listdir("/proc/self/fd")
    SharedPage(os.memfd_create("permits")).close()
    assert len(os.listdir("/proc/self/fd")) == len(before)
