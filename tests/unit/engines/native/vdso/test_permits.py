"""A crossing by permit is a crossing.

Method: a real machine with an enclave whose processors have the registers of fake threads; what the
code of the program does with a permit is done to the table by hand, so that stops can come between
any two of its steps.
"""

from __future__ import annotations

import gc
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.support.inhabited import Inhabited

from softsgx.engines.native.tracing.registers import NativeRegisters
from softsgx.engines.native.vdso.crossing_sites import ExitSite, find_exit
from softsgx.engines.native.vdso.elf import build_vdso
from softsgx.engines.native.vdso.permit_code import (
    BUSY,
    CLOSED,
    CROSSING,
    IN,
    OUT,
    STUB_BYTES,
    exit_stub,
)
from softsgx.engines.native.vdso.permit_table import PermitTable, Slot
from softsgx.engines.native.vdso.permits import Permits
from softsgx.engines.native.vdso.stubs import Stub, Stubs
from softsgx.hw import Machine, MachineConfig, aex
from softsgx.hw.optimised import OPTIMISED
from softsgx.runtime import InlineRuntime

BASE, TABLE = 0x7F00_0000_0000, 0x4000_0000
EENTER_STACK, EENTER_FRAME, OUT_FS, OUT_GS = 0x7000, 0x8000, 0x1000, 0x2000
VDSO = build_vdso({})
EENTER, AFTER = BASE + VDSO.eenter_after - 3, BASE + VDSO.eenter_after
ENCLU = BASE - 0x1000
STUB = exit_stub(BASE + VDSO.stubs, ENCLU, TABLE)[1]


@dataclass(eq=False)
class Thread:
    """As much of a program's thread as permits use."""

    image: Any
    cpu: Any
    own_tid: int
    regs: NativeRegisters = field(default_factory=NativeRegisters)
    blocked: int | None = None
    stored: int = 0

    def load(self) -> NativeRegisters:
        return self.regs

    def store(self) -> None:
        self.stored += 1


class Scene:
    """Some threads, one enclave, and the table that both sides see."""

    def __init__(self, threads: int = 1, *, usable: bool = True, table: bool = True) -> None:
        config = MachineConfig.with_epc(64 * 4096, processors=threads)
        machine = Machine(config, InlineRuntime(seed=3), optimised=OPTIMISED)
        self.inhabited = Inhabited(threads, machine)
        self.held: list[Thread] = []
        self.permits = Permits(usable, cast(Callable[[Any], bool], self.hold), self.failed)
        self.memory = SimpleNamespace(jumps={0x1000: 5})
        space = SimpleNamespace(memory_at=lambda linaddr: self.memory)
        self.image = SimpleNamespace(
            vdso=VDSO,
            vdso_base=BASE,
            aep=BASE + VDSO.aep,
            eenter=EENTER,
            page_table=space,
            threads={},
            permits=None,
            permits_at=TABLE,
            has_room_for_permits=False,
            exit_stubs=Stubs(STUB_BYTES, (BASE + VDSO.stubs, VDSO.most_stubs)),
        )
        self.image.entry_stubs = Stubs(STUB_BYTES)
        self.image.exit_stubs._areas[0].made.append(
            Stub(ExitSite(ENCLU - 5, b"", ENCLU, TABLE), STUB)
        )
        self.image.exit_stubs.plain.add(ENCLU)
        if table:
            fd = os.memfd_create("permits", os.MFD_ALLOW_SEALING)
            self.image.permits = PermitTable(fd, TABLE, cast(Any, self.image.threads))
        for number in range(threads):
            cpu = self.inhabited.cpu(number)
            thread = self.image.threads[number] = Thread(self.image, cpu, 100 + number)
            thread.regs.xcr0 = cpu.regs.xcr0
            cpu.regs = cast(Any, thread.regs)

    def failed(self, image: object, error: Exception) -> None:
        assert image is self.image
        raise error

    def hold(self, thread: Thread) -> bool:
        self.held.append(thread)
        self.permits.stopped(cast(Any, thread))
        return True

    def at(self, number: int = 0, tcs: int | None = None) -> Actor:
        return Actor(self, number, number if tcs is None else tcs)

    @property
    def crossings(self) -> tuple[int, int]:
        crossings = self.inhabited.enclave.crossings
        return crossings.eenter, crossings.eexit

    def state(self) -> list[object]:
        """Everything that crossings change in the machine."""
        enclave = self.inhabited.enclave
        seen: list[object] = [enclave.cur_count, repr(enclave.crossings)]
        for number, thread in self.image.threads.items():
            inside = thread.cpu.inside
            seen.append(thread.regs.xcr0)
            if inside is not None:
                seen += [inside.tcs.addr, inside.tcs_linaddr, inside.entry_epoch, inside.outside]
            at = self.inhabited.tcs(number)
            for offset in (at, at + 4096):
                seen.append(self.inhabited.hw.store.read(self.inhabited.page(offset), 0, 4096))
        return seen


class Actor:
    """One of the threads, and the TCS that it uses."""

    def __init__(self, scene: Scene, number: int, tcs: int) -> None:
        self.scene, self.thread = scene, cast(Any, scene.image.threads[number])
        self.cpu, self.regs = self.thread.cpu, self.thread.regs
        self.tcs = scene.inhabited.base + scene.inhabited.tcs(tcs)

    @property
    def slot(self) -> Slot:
        slot = self.scene.image.permits.slot(self.tcs)
        assert slot is not None
        return cast(Slot, slot)

    def stop(self) -> None:
        """Stop for a reason that may change anything, and go on."""
        self.scene.permits.stopped(self.thread)
        self.scene.permits.settle()
        self.scene.permits.going(self.thread)

    def outside(self) -> None:
        """Registers of a thread in our vDSO, at the EENTER."""
        regs = self.regs
        regs.rsp, regs.rbp, regs.rflags = EENTER_STACK, EENTER_FRAME, 0x246
        regs.fs_base, regs.gs_base = OUT_FS, OUT_GS
        regs.rip = EENTER

    def enter_with_a_stop(self) -> None:
        permits = self.scene.permits
        permits.stopped(self.thread)
        self.outside()
        permits.entering(self.tcs)
        self.cpu.enclu.eenter(self.tcs, self.scene.image.aep)
        permits.entered(self.thread)
        permits.going(self.thread)

    def exit_with_a_stop(self) -> None:
        permits, inside = self.scene.permits, None
        permits.stopped(self.thread)
        inside = self.cpu.inside
        self.cpu.enclu.eexit(AFTER)
        permits.left(self.thread, inside, ENCLU)
        permits.going(self.thread)

    def claim(self) -> None:
        """What the vDSO does to have the slot."""
        slot = self.slot
        assert slot.word("gate") % CROSSING == OUT
        slot.set("gate", slot.word("gate") + BUSY - OUT + 8 * self.thread.own_tid)
        self.outside()
        self.regs.rip = BASE + VDSO.popped

    def enter(self) -> None:
        """Enter by permit, and execute some instructions inside."""
        self.claim()
        slot = self.slot
        self.note_stack(EENTER_STACK, EENTER_FRAME)
        slot.set("outside_fs", OUT_FS)
        slot.set("outside_gs", OUT_GS)
        slot.set("gate", slot.word("gate") + CROSSING + IN - BUSY)
        self.regs.fs_base, self.regs.gs_base = slot.word("fs"), slot.word("gs")
        self.regs.rip, self.regs.rsp = slot.word("entry") + 5, 0xE000

    def exit(self) -> None:
        """Leave by permit."""
        slot, gate = self.slot, self.slot.word("gate")
        assert gate % CROSSING == IN + 8 * self.thread.own_tid
        slot.set("gate", gate - gate % CROSSING + slot.word("exited"))
        self.regs.fs_base, self.regs.gs_base = slot.word("outside_fs"), slot.word("outside_gs")
        self.regs.rip = AFTER

    def note_stack(self, rsp: int, rbp: int) -> None:
        """Store URSP and URBP where the permit says."""
        inhabited = self.scene.inhabited
        offset = self.slot.word("ursp") - inhabited.base
        page = inhabited.page(offset & -4096)
        inhabited.hw.store.write(page, offset % 4096, struct.pack("<QQ", rsp, rbp))

    def called_once(self) -> Actor:
        """Have a permit to enter."""
        self.enter_with_a_stop()
        self.exit_with_a_stop()
        assert self.slot.peek().state == OUT
        return self


def test_the_machine_is_as_after_an_entry_that_stops() -> None:
    one, other = Scene(), Scene()
    one.at().called_once().enter_with_a_stop()
    one.permits.settle()
    other.at().called_once().enter()
    other.permits.stopped(other.at().thread)
    assert other.state() == one.state()
    assert other.at().slot.word("gate") == CLOSED
    assert other.at().regs.rsp == 0xE000
    assert other.at().thread.stored == 0, "its registers are its own"


def test_the_machine_is_as_after_exits_that_stop() -> None:
    one, other = Scene(), Scene()
    for scene in (one, other):
        scene.at().enter_with_a_stop()
    one.at().exit_with_a_stop()
    other.at().exit()
    for scene in (one, other):
        scene.permits.settle()
    assert other.at().cpu.inside is None
    assert other.state() == one.state()


@pytest.mark.parametrize("last", ["inside", "outside"])
@pytest.mark.parametrize("first", ["inside", "outside"])
def test_every_crossing_is_counted_once(first: str, last: str) -> None:
    scene = Scene()
    actor = scene.at()
    actor.enter_with_a_stop()
    if first == "outside":
        actor.exit_with_a_stop()
        actor.enter()
    for _ in range(5):
        actor.exit()
        actor.enter()
    if last == "outside":
        actor.exit()
    scene.permits.settle()
    entries = 6 + (first == "outside")
    assert scene.crossings == (entries, entries - (last == "inside"))
    assert (actor.cpu.inside is not None) == (last == "inside")


def test_what_the_enclave_stores_as_urbp_and_ursp_stays() -> None:
    scene = Scene()
    actor = scene.at().called_once()
    actor.enter()
    actor.note_stack(0x5000, 0x6000)
    scene.permits.stopped(actor.thread)
    aex(actor.cpu, 32)
    assert (actor.regs.rsp, actor.regs.rbp) == (0x5000, 0x6000)


def test_what_may_change_the_machine_ends_permits_to_enter_and_keeps_those_to_leave() -> None:
    scene = Scene()
    actor = scene.at().called_once()
    actor.enter()
    actor.stop()
    assert actor.slot.peek().state == IN
    actor.exit()
    assert actor.slot.peek().state == CLOSED
    scene.permits.settle()
    assert (actor.cpu.inside, scene.crossings) == (None, (2, 2))


def test_a_stop_inside_that_changes_nothing_costs_no_permit() -> None:
    scene = Scene()
    actor = scene.at().called_once()
    actor.enter()
    scene.permits.stopped(actor.thread)
    scene.permits.going(actor.thread)
    for _ in range(2):
        scene.permits.stopped(actor.thread)
        scene.permits.going(actor.thread)
    actor.exit()
    actor.enter()
    scene.permits.settle()
    assert scene.crossings == (3, 2)


@pytest.mark.parametrize("settled", [False, True])
def test_an_asynchronous_exit_ends_the_permit_to_leave(settled: bool) -> None:
    scene = Scene()
    actor = scene.at()
    actor.enter_with_a_stop()
    scene.permits.stopped(actor.thread)
    if settled:
        scene.permits.settle()
    aex(actor.cpu, 32)
    scene.permits.going(actor.thread)
    assert actor.slot.peek().state == CLOSED


def test_another_entry_by_the_tcs_of_a_thread_that_is_stopped_ends_its_permit() -> None:
    scene = Scene(2)
    actor = scene.at(0)
    actor.enter_with_a_stop()
    scene.permits.stopped(actor.thread)
    scene.permits.entering(actor.tcs)
    assert actor.slot.peek().state == CLOSED


def test_a_thread_that_ends_at_a_stop_inside_leaves_no_permit() -> None:
    scene = Scene()
    actor = scene.at()
    actor.enter_with_a_stop()
    scene.permits.stopped(actor.thread)
    scene.permits.ended(actor.thread)
    assert actor.slot.peek().state == CLOSED


def test_settling_finds_threads_that_run_where_they_are() -> None:
    scene = Scene(3)
    actors = [scene.at(number) for number in range(3)]
    for actor in actors:
        actor.called_once()
    actors[0].enter()
    actors[1].enter()
    actors[1].exit()
    scene.permits.settle()
    assert [actor.cpu.inside is not None for actor in actors] == [True, False, False]
    assert scene.inhabited.enclave.cur_count == 1, "tracking counts who is inside"
    assert all(actor.slot.word("gate") == CLOSED for actor in actors)


def test_threads_may_change_their_tcs() -> None:
    scene = Scene(2)
    one, other = scene.at(0, tcs=0), scene.at(1, tcs=1)
    one.called_once()
    other.called_once()
    one.enter()
    one.exit()
    scene.at(1, tcs=0).enter()
    scene.at(0, tcs=1).enter()
    scene.permits.stopped(one.thread)
    assert one.cpu.inside.tcs_linaddr == other.tcs
    assert other.cpu.inside is None or other.cpu.inside.tcs_linaddr == one.tcs
    scene.permits.settle()
    assert other.cpu.inside.tcs_linaddr == one.tcs
    assert scene.crossings == (5, 3)


def test_a_thread_that_takes_over_a_tcs_has_left_its_own_before() -> None:
    scene = Scene(2)
    one, other = scene.at(0), scene.at(1)
    for actor in (one, other):
        actor.called_once()
        actor.enter_with_a_stop()
        actor.exit()
    scene.at(1, tcs=0).enter()
    scene.permits.stopped(one.thread)
    assert one.cpu.inside is None
    assert other.cpu.inside.tcs_linaddr == one.tcs


def test_a_stop_that_only_crosses_leaves_the_permits_of_others() -> None:
    scene = Scene(2)
    one, other = scene.at(0).called_once(), scene.at(1).called_once()
    one.enter_with_a_stop()
    one.exit_with_a_stop()
    assert (one.slot.peek().state, other.slot.peek().state) == (OUT, OUT)


def test_an_entry_that_stops_finds_the_thread_inside_by_its_tcs() -> None:
    scene = Scene(2)
    scene.at(0).called_once().enter()
    scene.permits.stopped(scene.at(1).thread)
    scene.permits.entering(scene.at(0).tcs)
    inside = scene.at(0).cpu.inside
    assert inside is not None and inside.tcs_linaddr == scene.at(0).tcs


def test_a_thread_about_to_use_a_permit_is_stopped_when_it_ends() -> None:
    scene = Scene(2)
    actor = scene.at(0).called_once()
    actor.claim()
    scene.permits.settle()
    assert scene.held == [actor.thread]
    assert actor.regs.rip == BASE + VDSO.ask
    assert actor.cpu.inside is None
    assert scene.crossings == (1, 1)


@pytest.mark.parametrize("place", ["pushed", "popping", "popped", "added"])
def test_a_thread_stopped_before_the_entry_gives_it_up(place: str) -> None:
    scene = Scene()
    actor = scene.at().called_once()
    actor.claim()
    actor.regs.rip = BASE + getattr(VDSO, place)
    actor.stop()
    gives_up = VDSO.undo if place in ("pushed", "popping") else VDSO.ask
    assert actor.regs.rip == BASE + gives_up
    assert (actor.slot.peek().state, actor.cpu.inside) == (CLOSED, None)


def test_what_is_taken_off_the_stack_is_not_taken_off_twice() -> None:
    scene = Scene()
    actor = scene.at().called_once()
    actor.claim()
    actor.regs.rip = BASE + VDSO.popping + 4
    actor.stop()
    assert actor.regs.rip == BASE + VDSO.undo + 4


def test_a_thread_stopped_behind_the_entry_is_at_the_entry_point() -> None:
    scene = Scene()
    actor = scene.at().called_once()
    actor.enter()
    actor.regs.rip = BASE + VDSO.added
    scene.permits.stopped(actor.thread)
    regs, slot = actor.regs, actor.slot
    assert (regs.rip, regs.rax, regs.rcx) == (slot.word("entry"), 0, AFTER)
    assert (regs.fs_base, regs.gs_base) == (slot.word("fs"), slot.word("gs"))
    outside = actor.cpu.inside.outside
    assert (outside.fs_base, outside.gs_base) == (OUT_FS, OUT_GS)


def stopped_in_stub(place: str) -> Actor:
    """A thread at a place of the code that does EEXIT, with RCX, RDX, R11 of 1, 2, 3."""
    actor = Scene().at()
    actor.enter_with_a_stop()
    regs, slot, at = actor.regs, actor.slot, STUB[place]
    order = list(STUB)
    regs.rip, regs.rbx, regs.rflags = BASE + VDSO.stubs + at, AFTER, 0x246
    regs.rax, regs.rcx, regs.rdx, regs.r11 = 0xBAD, 1, 2, 3
    slot.set("lock", slot.address)
    if place == "locked":
        regs.rax = 0
    elif place in ("swapped", "owned"):
        regs.rax, regs.rcx = 1, 0
    elif order.index(place) >= order.index("saved"):
        for name, value in (("rcx", 1), ("rdx", 2), ("r11", 3), ("rcx_then", 7)):
            slot.set(name, value)
        slot.set("flags", 0x46 << 8)
        slot.set("inside_fs", regs.fs_base)
        slot.set("inside_gs", regs.gs_base)
        regs.rcx = slot.address
    if order.index(place) > order.index("spilled") and place not in ("released", "restored"):
        regs.rcx, regs.rdx, regs.r11, regs.rflags = 0xBAD, slot.address, 0xBAD, 0x202
        regs.fs_base = regs.gs_base = 0xBAD000
    return actor


@pytest.mark.parametrize(
    "place", ["locked", "swapped", "owned", "saved", "spilled", "known", "tried", "refuse"]
)
def test_a_thread_stopped_before_the_exit_is_in_front_of_it(place: str) -> None:
    actor = stopped_in_stub(place)
    before = actor.slot.word("fs"), actor.slot.word("gs")
    if place == "tried":
        actor.slot.set("gate", CLOSED)  # the supervisor was faster
    actor.stop()
    regs = actor.regs
    assert (regs.rip, regs.rax, regs.rcx, regs.rdx, regs.r11) == (ENCLU, 4, 1, 2, 3)
    assert (regs.fs_base, regs.gs_base, regs.rflags) == (*before, 0x246)
    assert (actor.slot.word("lock"), actor.cpu.inside is not None) == (0, True)


@pytest.mark.parametrize("place", ["tried", "released", "restored"])
def test_a_thread_stopped_behind_the_exit_is_at_its_target(place: str) -> None:
    actor = stopped_in_stub(place)
    regs, slot = actor.regs, actor.slot
    slot.set("gate", CROSSING + OUT)
    if place != "tried":
        slot.set("lock", 0)
        regs.rcx, regs.rdx, regs.r11 = 7, 2, 3
    if place == "released":
        regs.rax, regs.rdx = 2, 0xBAD
    actor.stop()
    assert (regs.rip, regs.rax, regs.rcx, regs.rdx, regs.r11) == (AFTER, 4, 7, 2, 3)
    assert (regs.rflags, slot.word("lock"), actor.cpu.inside) == (0x246, 0, None)


@pytest.mark.parametrize("done", [0, 3, 6])
def test_what_is_between_the_load_and_the_exit_is_executed_once(done: int) -> None:
    actor = Scene().at()
    actor.enter_with_a_stop()
    between = bytes.fromhex("4831c9 4831d2 fc")
    labels = exit_stub(BASE + VDSO.stubs, ENCLU, TABLE, between)[1]
    stub = Stub(ExitSite(ENCLU - 12, between, ENCLU, TABLE), labels)
    actor.scene.image.exit_stubs._areas[0].made[0] = stub
    actor.regs.rip, actor.regs.rax = BASE + VDSO.stubs + done, 0xBAD
    actor.stop()
    assert (actor.regs.rip, actor.regs.rax) == (ENCLU - len(between) + done, 4)


#: Code in front of ENCLU, as runtimes have it, and how much of that is behind the load of EAX.
@pytest.mark.parametrize(
    ("code", "between"),
    [
        ("4889cb b804000000", 0),
        ("01d2fc 48c7c004000000", 0),
        ("48c7c004000000 4831c9 4831d2 4d31c0 4d31ff 4801d2 fc", 16),
        ("b804000000 31d2 4531db", 5),
        ("b804000000 31c0", None),
        ("b804000000 4831e4", None),
        ("b804000000 90", None),
        ("b805000000", None),
        ("41b804000000", None),
    ],
)
def test_loads_of_eax_in_front_of_an_exit_are_found(code: str, between: int | None) -> None:
    front = bytes.fromhex("4889c3" * 40) + bytes.fromhex(code)
    page = (front + b"\x0f\x01\xd7" + b"\x0f\x0b" * 8).ljust(4096, b"\xcc")
    memory = SimpleNamespace(own_code=lambda address, size: page[:size])
    table = SimpleNamespace(read_only_code=lambda address, size: memory)
    image = cast(Any, SimpleNamespace(page_table=table, permits_at=TABLE))
    found = find_exit(image, 0x5000 + len(front))
    assert (None if found is None else len(found.between)) == between


def test_a_lock_of_another_thread_is_left_alone() -> None:
    for place in ("locked", "swapped", "busy"):
        actor = stopped_in_stub(place)
        regs = actor.regs
        regs.rax, regs.rcx = (actor.slot.address, 1) if place == "locked" else (1, 8)
        actor.stop()
        assert (regs.rip, regs.rax, regs.rcx) == (ENCLU, 4, 1)
        assert actor.slot.word("lock") == actor.slot.address


def test_a_call_that_stopped_in_between_earns_no_permit_to_enter() -> None:
    scene = Scene()
    actor = scene.at()
    actor.enter_with_a_stop()
    actor.stop()  # a fault, say
    actor.exit_with_a_stop()
    assert actor.slot.peek().state == CLOSED


@pytest.mark.parametrize("why", ["not usable", "a listener", "no table"])
def test_some_crossings_always_stop(why: str) -> None:
    scene = Scene(usable=why != "not usable", table=why != "no table")
    if why == "a listener":
        scene.inhabited.hw.tracer = lambda event: None
    actor = scene.at()
    actor.enter_with_a_stop()
    actor.exit_with_a_stop()
    assert scene.image.permits is None or scene.image.permits.slot(actor.tcs) is None


@pytest.mark.parametrize("why", ["signals are blocked", "no exit is replaced"])
def test_some_exits_always_stop(why: str) -> None:
    scene = Scene()
    actor = scene.at()
    if why == "signals are blocked":
        actor.thread.blocked = 1
    else:
        scene.memory.jumps.clear()
    actor.enter_with_a_stop()
    assert actor.slot.peek().state == CLOSED


def test_a_thread_that_dies_inside_had_entered() -> None:
    scene = Scene()
    actor = scene.at().called_once()
    actor.enter()
    scene.permits.ended(actor.thread)
    assert actor.cpu.inside is not None
    assert scene.crossings == (2, 1)


def test_the_only_thread_of_an_address_space_knows_its_id() -> None:
    for threads, known in ((1, 100), (2, 0)):
        scene = Scene(threads)
        scene.at().called_once()
        assert scene.image.permits.words[-512] == known


def test_tcss_with_one_place_in_a_list_have_one_slot_there() -> None:
    table = PermitTable(os.memfd_create("permits", os.MFD_ALLOW_SEALING), TABLE, {})
    one, other = table.give_slot(0x1000, 0x5000), table.give_slot(0x2000, 0x1000_5000)
    assert one is not None and other is not None
    assert table.slot_of_gs(0x5000) is table.slot_of_gs(0x1000_5000) is one
    assert table.give_slot(0x1000_1000, 0x6000) is None
    table.close()


def test_stubs_fit_into_their_places() -> None:
    code, labels = exit_stub(BASE, ENCLU, TABLE)
    assert len(code) == labels["end"] <= STUB_BYTES


def test_a_closed_table_leaves_no_descriptor() -> None:
    gc.collect()  # what earlier tests dropped closes its descriptors now, not in between
    before = os.listdir("/proc/self/fd")
    PermitTable(os.memfd_create("permits", os.MFD_ALLOW_SEALING), TABLE, {}).close()
    assert len(os.listdir("/proc/self/fd")) == len(before)
