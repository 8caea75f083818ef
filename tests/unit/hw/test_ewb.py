"""EWB: each check alone, every two checks together, and what success changes.

Goal: which fault or code software sees, in the manual's order, for each type of page.  Method: a
call that would succeed is broken row by row; operands are given in memory, as objects, and as
objects to the fast implementation.

Source:
    SDM vol. 3D, "EWB", Operation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from tests.support.checks import Check, assert_refused, pair_params, row_params
from tests.support.paging import (
    GP,
    OUTSIDE,
    PAGEINFO_AT,
    PCMD_AT,
    SRCPGE_AT,
    Bench,
    Call,
    Exit,
    Pf,
    PlainPf,
    in_guest,
    outcome,
)

from softsgx.arch import PAGE_BYTES, ConflictCode, PageInfo, PageType, Pcmd, SecInfo, Status
from softsgx.hw import READ, WRITE, Leaves, PageInfoArgs, PageTables

CHILDREN = frozenset({"REG", "TCS", "TRIM", "SS_FIRST", "SS_REST"})
SECS, VA = frozenset({"SECS"}), frozenset({"VA"})
ALL = CHILDREN | SECS | VA
MODES = ("memory", "objects", "fast")


class EwbScene:
    """An evictable page of a kind, an empty slot, and the call that would evict it."""

    def __init__(self, kind: str, mode: str) -> None:
        self.bench = bench = Bench()
        self.mode = mode
        self.secs = bench.secs()
        self.target = bench.kind(kind, self.secs)
        self.other = bench.child(self.secs)
        self.va = bench.va()
        bench.make_evictable(self.target)
        self.page, self.va_page = bench.page(self.target), bench.page(self.va)
        self.enclave = bench.enclave(self.secs if kind != "SECS" else self.target)
        self.call = Call(bench.cpu, "ewb", self.target, self.va + 24)
        self.srcpge, self.pcmd = bytearray(b"\xa5" * PAGE_BYTES), bytearray(b"\x5a" * 128)
        self.info: PageInfoArgs | None = None

    def run(self) -> object:
        if self.mode == "memory":
            self.call.store()
            return self.call.run()
        call, cpu = self.call, self.bench.cpu
        leaves = self.bench.machine.leaves if self.mode == "fast" else Leaves(cpu)
        if self.info is None:
            self.info = PageInfoArgs(call.linaddr, self.srcpge, self.pcmd, call.secs)
        return outcome(partial(leaves.ewb, self.info, call.rcx, call.rdx))

    def snapshot(self) -> object:
        self.call.store()
        operands = None
        if self.info is not None:
            operands = (self.info.linaddr, self.info.secs)
        else:
            operands = (self.call.linaddr, self.call.secs)
        return self.bench.snapshot(), bytes(self.srcpge), bytes(self.pcmd), operands


def add_to(name: str, amount: int) -> Any:
    def violate(scene: EwbScene) -> None:
        setattr(scene.call, name, getattr(scene.call, name) + amount)

    return violate


def move(name: str, where: Any) -> Any:
    """Move an operand to another page, keeping the offset, so that misalignment stays."""

    def violate(scene: EwbScene) -> None:
        there = where(scene) if callable(where) else where
        setattr(scene.call, name, there + getattr(scene.call, name) % PAGE_BYTES)

    return violate


def put(what: str, name: str, value: Any) -> Any:
    def violate(scene: EwbScene) -> None:
        setattr(getattr(scene, what), name, value)

    return violate


def block_later(scene: EwbScene) -> None:
    scene.page.bepoch = scene.enclave.epoch + 1


def never_tracked(scene: EwbScene) -> None:
    scene.page.bepoch = scene.enclave.epoch


def adopt(scene: EwbScene) -> None:
    scene.bench.child(scene.target)


def guest_child(scene: EwbScene) -> None:
    in_guest(scene.bench.cpu)
    scene.enclave.virt_children = 1


def gp(_: EwbScene) -> object:
    return GP


def pf_rcx(scene: EwbScene) -> object:
    return Pf(scene.call.rcx)


def pf_rdx(scene: EwbScene) -> object:
    return Pf(scene.call.rdx)


def code(status: Status) -> Any:
    return lambda _: status


def row(step: int, name: str, violate: Any, ends: Any, **more: Any) -> Check[EwbScene]:
    return Check(step, name, violate, ends, more.pop("kinds", ALL), **more)


LOCKED = frozenset({"RCX held exclusively", "RCX held shared"})
CHECKS = [
    row(1, "PAGEINFO misaligned", add_to("rbx", 16), gp, memory=True),
    row(1, "RCX misaligned", add_to("rcx", 8), gp),
    row(2, "RCX outside the EPC", move("rcx", OUTSIDE), pf_rcx),
    row(3, "RDX misaligned", add_to("rdx", 4), gp),
    row(4, "RDX outside the EPC", move("rdx", OUTSIDE + 0x10000), pf_rdx),
    row(
        5,
        "slot and page are one EPC page",
        move("rdx", lambda scene: scene.call.rcx & -PAGE_BYTES),
        gp,
        hides=frozenset({"RDX outside the EPC"}),
    ),
    row(6, "LINADDR given", put("call", "linaddr", 0x10_1000), gp),
    row(6, "SECS given", lambda scene: put("call", "secs", scene.secs)(scene), gp),
    row(7, "PCMD misaligned", add_to("pcmd", 64), gp, memory=True),
    row(7, "SRCPGE misaligned", add_to("srcpge", 2048), gp, memory=True),
    row(8, "RCX held exclusively", put("page", "lock", -1), gp),
    row(8, "RCX held shared", put("page", "lock", 1), gp),
    row(9, "VA page held exclusively", put("va_page", "lock", -1), gp),
    row(10, "RCX not in use", put("page", "valid", False), pf_rcx),
    row(11, "VA page not in use", put("va_page", "valid", False), pf_rdx),
    row(
        11,
        "RDX in a REG page",
        move("rdx", lambda scene: scene.other),
        pf_rdx,
        hides=frozenset(
            {
                "RDX outside the EPC",
                "slot and page are one EPC page",
                "VA page held exclusively",
            }
        ),
    ),
    row(12, "blocked in an epoch to come", block_later, gp, kinds=CHILDREN),
    row(12, "tracking facility held", put("enclave", "tracking_lock", True), gp, kinds=CHILDREN),
    row(
        14,
        "not blocked",
        put("page", "blocked", False),
        code(Status.PAGE_NOT_BLOCKED),
        kinds=CHILDREN,
    ),
    row(
        15,
        "not tracked",
        never_tracked,
        code(Status.NOT_TRACKED),
        kinds=CHILDREN,
        hides=frozenset({"blocked in an epoch to come"}),
    ),
    row(16, "child resident", adopt, code(Status.CHILD_PRESENT), kinds=SECS),
    row(
        17,
        "child resident in a guest",
        guest_child,
        code(Status.CHILD_PRESENT),
        kinds=SECS,
        hides=LOCKED,
    ),
]
ROWS = [
    *row_params(CHECKS, sorted(ALL), ["memory"]),
    *row_params(CHECKS, ["REG"], ["objects"]),
    *row_params(CHECKS, ["TCS", "SECS", "VA"], ["fast"]),
]
PAIRS = [
    *pair_params(CHECKS, ["REG", "SECS", "VA"], ["memory"]),
    *pair_params(CHECKS, ["TCS", "SECS", "VA"], ["fast"]),
]


@pytest.mark.parametrize(("kind", "mode", "check"), ROWS)
def test_ewb_refuses_with_the_manuals_outcome(kind: str, mode: str, check: Check[EwbScene]) -> None:
    assert_refused(EwbScene(kind, mode), check)


@pytest.mark.parametrize(("kind", "mode", "first", "later"), PAIRS)
def test_of_two_failing_checks_of_ewb_the_earlier_is_seen(
    kind: str, mode: str, first: Check[EwbScene], later: Check[EwbScene]
) -> None:
    assert_refused(EwbScene(kind, mode), first, later)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", sorted(ALL))
def test_ewb_frees_the_page_fills_the_slot_and_writes_the_metadata(kind: str, mode: str) -> None:
    scene = EwbScene(kind, mode)
    bench, page = scene.bench, scene.page
    page.rwx, page.pending, page.modified, page.pr = 5, True, True, True
    flags, linaddr, children = page.secinfo_flags(), page.linaddr, scene.enclave.children
    pages = len(bench.store)
    secinfo = int(PageType[kind]) << 8 | 5 | 8 | 16 | 32
    assert flags == secinfo

    assert scene.run() == Status.SUCCESS

    assert not page.valid
    version = bench.slot_value(scene.call.rdx)
    assert version != 0
    machine = bench.machine
    if mode == "memory":
        srcpge, raw = machine.ram_read(SRCPGE_AT, PAGE_BYTES), machine.ram_read(PCMD_AT, 128)
        written = PageInfo.unpack(machine.ram_read(PAGEINFO_AT, 32))
        assert (written.srcpge, written.secinfo) == (SRCPGE_AT, PCMD_AT)
        assert (written.linaddr, written.secs) == (linaddr, 0)
    else:
        srcpge, raw = bytes(scene.srcpge), bytes(scene.pcmd)
        assert scene.info is not None
        assert (scene.info.linaddr, scene.info.secs) == (linaddr, 0)
    pcmd = Pcmd.unpack(raw)
    assert pcmd.secinfo == SecInfo(flags=secinfo)
    assert pcmd.enclave_id == (0 if kind == "VA" else scene.enclave.eid)
    assert pcmd.reserved == bytes(40)
    assert pcmd.mac not in (bytes(16), b"\x5a" * 16)
    assert len(set(srcpge)) > 200, "ciphertext looks like noise"
    child = kind in CHILDREN
    assert scene.enclave.children == children - child
    assert len(bench.store) == pages - child, "the plaintext is still in the store"
    assert (page.lock, scene.va_page.lock, scene.enclave.tracking_lock) == (0, 0, False)
    assert (linaddr != 0) == child


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", sorted(ALL))
def test_ewb_into_an_occupied_slot_reports_12_and_evicts_all_the_same(kind: str, mode: str) -> None:
    scene = EwbScene(kind, mode)
    slots = scene.va_page.slots
    assert slots is not None
    slots[3] = 0x1238
    assert scene.run() == Status.VA_SLOT_OCCUPIED
    assert not scene.page.valid
    assert scene.bench.slot_value(scene.call.rdx) not in (0, 0x1238)


def test_ewb_needs_the_va_page_only_shared() -> None:
    scene = EwbScene("REG", "memory")
    scene.va_page.lock = 2
    assert scene.run() == Status.SUCCESS
    assert scene.va_page.lock == 2


@pytest.mark.parametrize("slot", [0, 1, 255, 511])
def test_ewb_uses_the_slot_that_rdx_names_and_no_other(slot: int) -> None:
    scene = EwbScene("REG", "memory")
    scene.call.rdx = scene.va + 8 * slot
    assert scene.run() == Status.SUCCESS
    slots = scene.va_page.slots
    assert slots is not None
    assert [i for i, version in enumerate(slots) if version] == [slot]


def test_ewb_does_not_ask_whether_the_enclave_is_initialised() -> None:
    scene = EwbScene("REG", "memory")
    scene.enclave.flags &= ~1
    assert scene.run() == Status.SUCCESS


@pytest.mark.parametrize("lock", [-1, 1])
def test_in_a_guest_a_held_source_page_makes_ewb_exit_to_the_hypervisor(lock: int) -> None:
    scene = EwbScene("REG", "memory")
    in_guest(scene.bench.cpu)
    scene.page.lock = lock
    before = scene.snapshot()
    assert scene.run() == Exit(
        ConflictCode.EPC_PAGE_CONFLICT_EXCEPTION, 0, scene.target, scene.target
    )
    assert scene.snapshot() == before


def test_in_a_guest_a_held_va_page_is_still_gp() -> None:
    scene = EwbScene("REG", "memory")
    in_guest(scene.bench.cpu)
    scene.va_page.lock = -1
    assert scene.run() == GP


def test_a_slot_in_the_page_itself_is_found_before_anything_is_read_or_locked() -> None:
    scene = EwbScene("VA", "memory")
    in_guest(scene.bench.cpu)
    scene.page.lock = 1
    scene.call.rdx = scene.target + 8
    assert scene.run() == GP, "a held page would be a VM exit"
    scene.bench.cpu.space = space = PageTables()
    space.map(scene.target, scene.target, READ | WRITE)
    assert scene.run() == GP, "PAGEINFO is not mapped"


def test_outside_a_guest_virtual_children_do_not_keep_a_secs() -> None:
    scene = EwbScene("SECS", "memory")
    scene.enclave.virt_children = 1
    assert scene.run() == Status.SUCCESS


@pytest.mark.parametrize("missing", [PAGEINFO_AT, SRCPGE_AT, PCMD_AT])
@pytest.mark.parametrize("rights", [0, READ])
def test_memory_that_cannot_be_written_faults_before_anything_has_changed(
    missing: int, rights: int
) -> None:
    scene = EwbScene("REG", "memory")
    scene.call.pcmd = PCMD_AT + 0x2000  # a page of its own
    missing = scene.call.pcmd if missing == PCMD_AT else missing
    scene.bench.cpu.space = space = PageTables()
    for linear in (PAGEINFO_AT, SRCPGE_AT, scene.call.pcmd, scene.target, scene.va):
        space.map(linear & -PAGE_BYTES, linear & -PAGE_BYTES, READ | WRITE)
    if rights:
        space.map(missing & -PAGE_BYTES, missing & -PAGE_BYTES, rights)
    else:
        space.unmap(missing & -PAGE_BYTES)
    before = scene.snapshot()
    got = scene.run()
    assert isinstance(got, PlainPf) and got.address & -PAGE_BYTES == missing & -PAGE_BYTES
    assert scene.snapshot() == before


def test_ewb_reaches_pages_through_paging_and_reports_linear_addresses() -> None:
    scene = EwbScene("REG", "memory")
    scene.bench.cpu.space = space = PageTables()
    for linear in (PAGEINFO_AT, SRCPGE_AT):
        space.map(linear & -PAGE_BYTES, linear & -PAGE_BYTES, READ | WRITE)
    space.map(0x40_0000, scene.target, READ | WRITE)
    space.map(0x50_0000, scene.va, READ | WRITE)
    scene.call.rcx, scene.call.rdx = 0x40_0000, 0x50_0000 + scene.call.rdx % PAGE_BYTES
    scene.page.valid = False
    assert scene.run() == Pf(0x40_0000)
    scene.page.valid = True
    assert scene.run() == Status.SUCCESS
    assert not scene.page.valid
