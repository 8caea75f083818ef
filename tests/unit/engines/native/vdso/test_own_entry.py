"""A thread that is stopped in a stub for its host's ENCLU is in front of it, or at the entry point.

Method: as ``test_permits``; registers and slot are those that the code has at each of its labels.
"""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.engines.native.vdso.test_permits import (
    BASE,
    OUT_FS,
    OUT_GS,
    TABLE,
    VDSO,
    Actor,
    Scene,
)

from softsgx.engines.native.vdso.entry_code import TAIL, entry_stub, tail
from softsgx.engines.native.vdso.host_jumps import EntrySite
from softsgx.engines.native.vdso.permit_code import (
    BUSY,
    CLOSED,
    CROSSING,
    IN,
    OUT,
    STUB_BYTES,
    TAIL_BYTES,
)
from softsgx.engines.native.vdso.stubs import Stub, Stubs

AREA, ENCLU, AEP = BASE - 0x8000, BASE - 0x4000, BASE - 0x3000
BETWEEN = bytes.fromhex("4889fb 31d2")
SITE = EntrySite(ENCLU - 5 - len(BETWEEN), b"\xb8\x02\0\0\0", BETWEEN, TABLE)
LABELS = SITE.stub(AREA)[1]
ORDER = sorted(
    (name for name in LABELS if name not in ("enclu", "behind")), key=lambda name: LABELS[name]
)
FLAGS, OTHER_FLAGS = 0xAD7, 0x202
#: What the host has in these, and what the stub may have in them.
OWN = {"rcx": AEP, "rdx": 2, "r11": 3, "rdi": 4, "rsi": 5, "r10": 6}


def outside() -> Actor:
    """A thread whose ENCLU has a permit, in front of it."""
    scene = Scene()
    stubs: Stubs[EntrySite] = Stubs(STUB_BYTES, (AREA, 2))
    stubs._areas[0].made.append(Stub(SITE, LABELS))
    scene.image.entry_stubs = stubs
    actor = scene.at().called_once()
    actor.outside()
    regs = actor.regs
    regs.rip, regs.rax, regs.rbx, regs.rflags = ENCLU, 2, actor.tcs, FLAGS
    for name, value in OWN.items():
        setattr(regs, name, value)
    return actor


def stopped_at(place: str) -> Actor:
    """A thread at a label of the stub, with the state that is documented there."""
    actor = outside()
    regs, slot, at = actor.regs, actor.slot, ORDER.index(place)
    regs.rip, regs.rax = AREA + LABELS[place], 0xBAD
    if ORDER.index("swapped") <= at <= ORDER.index("none"):
        regs.rax, regs.rcx = AEP, 0 if place == "locked" else 0xBAD
    if place in ("locked", "owned") or ORDER.index("saved") <= at < ORDER.index("released"):
        slot.set("lock", slot.address)
    if place == "owned":
        regs.rax, regs.rcx = AEP, 0
    if at >= ORDER.index("saved"):
        slot.set("rcx", AEP)
        regs.rcx = slot.address
    if at >= ORDER.index("spilled"):
        for name in ("rdx", "r11", "rdi", "rsi", "r10"):
            slot.set(name, OWN[name])
        slot.set("flags", 0xD7 << 8 | 1)
    if ORDER.index("spilled") < at < ORDER.index("released"):
        regs.rcx = regs.rdi = regs.rsi = regs.r10 = regs.r11 = 0xBAD
        regs.rdx, regs.rflags = slot.address, OTHER_FLAGS
    if at >= ORDER.index("claimed") and place not in ("refuse", "released", "undone"):
        slot.set("gate", slot.word("gate") + BUSY - OUT + 8 * actor.thread.own_tid)
    if at >= ORDER.index("released"):
        regs.rcx = AEP
        slot.set("lock", 7 if place == "undone" else 0)
    if place == "released":
        regs.rax, regs.rdx = OWN["rdx"], 0xBAD
    return actor


def entered(actor: Actor) -> None:
    """What the claim and the atomic instruction do to the slot."""
    slot, gate = actor.slot, actor.slot.word("gate")
    actor.note_stack(actor.regs.rsp, actor.regs.rbp)
    slot.set("outside_fs", OUT_FS)
    slot.set("outside_gs", OUT_GS)
    slot.set("aep", AEP)
    own = 8 * actor.thread.own_tid
    slot.set("gate", gate - gate % CROSSING + CROSSING + IN + own)


def registers(actor: Actor) -> dict[str, Any]:
    return {name: getattr(actor.regs, name) for name in OWN}


@pytest.mark.parametrize("place", [name for name in ORDER if name != "end"])
def test_a_thread_stopped_before_the_entry_is_in_front_of_it(place: str) -> None:
    actor = stopped_at(place)
    actor.stop()
    regs = actor.regs
    assert (regs.rip, regs.rax, registers(actor)) == (ENCLU, 2, OWN)
    assert (regs.rflags, regs.fs_base, regs.gs_base) == (FLAGS, OUT_FS, OUT_GS)
    assert actor.slot.word("lock") == (7 if place == "undone" else 0), "another has it since"
    assert (actor.cpu.inside, actor.slot.peek().state) == (None, CLOSED)


@pytest.mark.parametrize("place", ["swapped", "locked", "none"])
def test_a_lock_of_another_thread_is_left_alone(place: str) -> None:
    actor = stopped_at(place)
    actor.regs.rcx = actor.slot.address
    actor.slot.set("lock", actor.slot.address)
    actor.stop()
    assert (actor.regs.rip, actor.regs.rax, registers(actor)) == (ENCLU, 2, OWN)
    assert actor.slot.word("lock") == actor.slot.address


@pytest.mark.parametrize("done", [0, 3, 5])
def test_what_is_between_the_load_and_the_entry_is_executed_once(done: int) -> None:
    actor = outside()
    actor.regs.rip, actor.regs.rax = AREA + done, 0xBAD
    actor.stop()
    assert (actor.regs.rip, actor.regs.rax) == (ENCLU - len(BETWEEN) + done, 2)


def behind(actor: Actor) -> tuple[int, ...]:
    regs = actor.regs
    return regs.rip, regs.rax, regs.rcx, regs.fs_base, regs.gs_base, regs.rflags


@pytest.mark.parametrize("place", ["added", "at the jump", "tail", "loaded", "released"])
def test_a_thread_stopped_behind_the_entry_is_at_the_entry_point(place: str) -> None:
    actor = stopped_at("added")
    entered(actor)
    regs, slot = actor.regs, actor.slot
    regs.rdi, regs.rsi, regs.r10 = 4, 5, 6
    if place != "added":
        regs.r11, regs.rcx, regs.rflags = 3, ENCLU + 3, FLAGS
        regs.fs_base, regs.gs_base = slot.word("fs"), slot.word("gs")
        regs.rip = AREA + LABELS["refuse"] - 3
    if place in ("tail", *TAIL):
        regs.rip = BASE + VDSO.tails + TAIL_BYTES * slot.number + TAIL.get(place, 0)
    if place in TAIL:
        regs.rax, regs.rdx = slot.word("cssa"), 2
    if place == "released":
        slot.set("lock", 7)  # of a thread that has the same place in the list
        slot.set("rdx", 0xBAD)
    actor.stop()
    assert behind(actor) == (
        *(slot.word("entry"), slot.word("cssa"), ENCLU + 3),
        *(slot.word("fs"), slot.word("gs"), FLAGS),
    )
    assert registers(actor) == OWN | {"rcx": ENCLU + 3}
    assert slot.word("lock") == (7 if place == "released" else 0)
    hw, page = actor.cpu.hw, actor.cpu.inside.tcs
    assert int.from_bytes(hw.store.read(page, 40, 8), "little") == AEP, "TCS.AEP"
    outside = actor.cpu.inside.outside
    assert (outside.fs_base, outside.gs_base) == (OUT_FS, OUT_GS)


def test_the_tail_of_each_slot_has_its_place() -> None:
    actor = outside()
    assert len(tail(actor.slot.address)) <= TAIL_BYTES
    assert VDSO.tails + 256 * TAIL_BYTES <= VDSO.answers


def test_a_stub_fits_with_all_that_may_be_between() -> None:
    code, labels = entry_stub(AREA, ENCLU, TABLE, bytes(64))
    assert len(code) == labels["end"] <= STUB_BYTES
