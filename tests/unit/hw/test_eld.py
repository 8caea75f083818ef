"""ELDU, ELDB, ELDUC, ELDBC: each check alone, every two together, and what success changes.

Goal: which fault or code software sees, in the manual's order, for each type of page, and where
the two families differ.  Method: a load that would succeed is broken row by row; operands are
given in memory, as objects, and as objects to the fast implementation.

Source:
    SDM vol. 3D, "ELDB/ELDU/ELDBC/ELDUC", Operation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from tests.support.checks import Check, assert_refused, pair_params, row_params
from tests.support.paging import (
    BASE,
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
    pattern,
)

from softsgx.arch import PAGE_BYTES, ConflictCode, PageType, Pcmd, Status
from softsgx.hw import READ, WRITE, Leaves, PageTables

CHILDREN = frozenset({"REG", "TCS", "TRIM", "SS_FIRST", "SS_REST"})
SECS, VA = frozenset({"SECS"}), frozenset({"VA"})
ALL = CHILDREN | SECS | VA
MODES = ("memory", "objects", "fast")
LEAVES = ("eldu", "eldb", "elduc", "eldbc")


class EldScene:
    """An evicted page of a kind, a free EPC page, and the call that would load it."""

    def __init__(self, kind: str, mode: str, leaf: str = "eldu") -> None:
        self.bench = bench = Bench()
        self.kind, self.mode, self.leaf = kind, mode, leaf
        self.secs = bench.secs()
        self.other = bench.child(self.secs)
        victim = bench.kind(kind, self.secs)
        page = bench.page(victim)
        page.rwx = 5 if kind in CHILDREN else 0
        self.eid = 0 if kind == "VA" else page.owner.eid
        self.linaddr = page.linaddr
        self.blob = bench.evict(victim)
        self.rcx = bench.free()
        self.page, self.va_page = bench.page(self.rcx), bench.page(self.blob.slot)
        self.secs_page = bench.page(self.secs)
        self.call = Call(
            bench.cpu, leaf, self.rcx, self.blob.slot, linaddr=self.linaddr, secs=self.blob.secs
        )
        self.pcmd = Pcmd.unpack(self.blob.pcmd)

    def run(self) -> object:
        call, bench = self.call, self.bench
        if self.mode == "memory":
            self._store()
            return call.run()
        leaves = bench.machine.leaves if self.mode == "fast" else Leaves(bench.cpu)
        info = self.blob.args()
        info.linaddr, info.secs, info.secinfo = call.linaddr, call.secs, self.pcmd.pack()
        return outcome(partial(getattr(leaves, self.leaf), info, call.rcx, call.rdx))

    def snapshot(self) -> object:
        self._store()
        return self.bench.snapshot()

    def _store(self) -> None:
        machine = self.bench.machine
        machine.ram_write(SRCPGE_AT, bytes(self.blob.srcpge))
        machine.ram_write(PCMD_AT, self.pcmd.pack())
        self.call.store()


def add_to(name: str, amount: int) -> Any:
    def violate(scene: EldScene) -> None:
        setattr(scene.call, name, getattr(scene.call, name) + amount)

    return violate


def move(name: str, where: int) -> Any:
    """Move an operand to another page, keeping the offset, so that misalignment stays."""

    def violate(scene: EldScene) -> None:
        setattr(scene.call, name, where + getattr(scene.call, name) % PAGE_BYTES)

    return violate


def put(what: str, name: str, value: Any) -> Any:
    def violate(scene: EldScene) -> None:
        setattr(getattr(scene, what), name, value)

    return violate


def take_target(scene: EldScene) -> None:
    page = scene.page
    page.fill(PageType.REG, rwx=3, secs=scene.secs_page, linaddr=BASE)
    scene.bench.store.fill(page, pattern(1))
    scene.bench.enclave(scene.secs).children += 1


def slot_in_reg_page(scene: EldScene) -> None:
    scene.call.rdx = scene.other + scene.call.rdx % PAGE_BYTES


def secs_is_a_reg_page(scene: EldScene) -> None:
    scene.call.secs = scene.other + scene.call.secs % PAGE_BYTES


def give_secs(scene: EldScene) -> None:
    scene.call.secs = scene.secs


def unknown_type(scene: EldScene) -> None:
    scene.pcmd.secinfo.flags |= 0x9 << 8


def wrong_tag(scene: EldScene) -> None:
    scene.pcmd.mac = bytes(16)


def gp(_: EldScene) -> object:
    return GP


def held(scene: EldScene) -> object:
    return Status.EPC_PAGE_CONFLICT if scene.leaf.endswith("c") else GP


def pf(operand: str) -> Any:
    return lambda scene: Pf(getattr(scene.call, operand))


def mac_fail(_: EldScene) -> object:
    return Status.MAC_COMPARE_FAIL


def row(step: int, name: str, violate: Any, ends: Any, **more: Any) -> Check[EldScene]:
    return Check(step, name, violate, ends, more.pop("kinds", ALL), **more)


SECS_ROWS = frozenset(
    {
        "SECS misaligned",
        "SECS outside the EPC",
        "SECS held exclusively",
        "SECS not in use",
        "SECS is a REG page",
    }
)
CHECKS = [
    row(1, "PAGEINFO misaligned", add_to("rbx", 16), gp, memory=True),
    row(1, "RCX misaligned", add_to("rcx", 8), gp),
    row(2, "RCX outside the EPC", move("rcx", OUTSIDE), pf("rcx")),
    row(3, "RDX misaligned", add_to("rdx", 4), gp),
    row(4, "RDX outside the EPC", move("rdx", OUTSIDE + 0x10000), pf("rdx")),
    row(5, "PCMD misaligned", add_to("pcmd", 64), gp, memory=True),
    row(5, "SRCPGE misaligned", add_to("srcpge", 2048), gp, memory=True),
    row(6, "RCX held exclusively", put("page", "lock", -1), held),
    row(6, "RCX held shared", put("page", "lock", 1), held),
    row(7, "VA page held exclusively", put("va_page", "lock", -1), held),
    row(8, "RCX in use", take_target, pf("rcx")),
    row(9, "VA page not in use", put("va_page", "valid", False), pf("rdx")),
    row(
        9,
        "RDX in a REG page",
        slot_in_reg_page,
        pf("rdx"),
        hides=frozenset({"RDX outside the EPC", "VA page held exclusively"}),
    ),
    row(11, "SECS misaligned", add_to("secs", 8), gp, kinds=CHILDREN),
    row(12, "SECS outside the EPC", move("secs", OUTSIDE), pf("secs"), kinds=CHILDREN),
    row(13, "SECS held exclusively", put("secs_page", "lock", -1), held, kinds=CHILDREN),
    row(14, "SECS not in use", put("secs_page", "valid", False), pf("secs"), kinds=CHILDREN),
    row(
        14,
        "SECS is a REG page",
        secs_is_a_reg_page,
        pf("secs"),
        kinds=CHILDREN,
        hides=frozenset({"SECS outside the EPC", "SECS held exclusively"}),
    ),
    row(15, "SECS given for a page without one", give_secs, gp, kinds=SECS | VA),
    row(16, "no such page type", unknown_type, gp, hides=SECS_ROWS),
    row(17, "wrong MAC", wrong_tag, mac_fail),
]
ROWS = [
    *row_params(CHECKS, ["REG", "SECS", "VA"], ["memory"]),
    *row_params(CHECKS, ["TRIM"], ["objects"]),
]
FAST_ROWS = row_params(CHECKS, ["TCS", "SECS", "VA"], ["fast"])
PAIRS = pair_params(CHECKS, ["REG", "SECS", "VA"], ["memory"])
FAST_PAIRS = pair_params(CHECKS, ["TCS", "SECS", "VA"], ["fast"])


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize(("kind", "mode", "check"), ROWS)
def test_a_load_refuses_with_the_manuals_outcome(
    kind: str, mode: str, check: Check[EldScene], leaf: str
) -> None:
    scene = EldScene(kind, mode, leaf)
    assert_refused(scene, check)


@pytest.mark.parametrize(("kind", "mode", "check"), FAST_ROWS)
def test_the_fast_load_refuses_with_the_manuals_outcome(
    kind: str, mode: str, check: Check[EldScene]
) -> None:
    assert_refused(EldScene(kind, mode), check)


@pytest.mark.parametrize(("kind", "mode", "first", "later"), PAIRS)
def test_of_two_failing_checks_of_a_load_the_earlier_is_seen(
    kind: str, mode: str, first: Check[EldScene], later: Check[EldScene]
) -> None:
    # The two families share their order and differ in what some rows end as.
    leaf = "eldu" if first.ends is not held else "eldbc"
    assert_refused(EldScene(kind, mode, leaf), first, later)


@pytest.mark.parametrize(("kind", "mode", "first", "later"), FAST_PAIRS)
def test_of_two_failing_checks_of_the_fast_load_the_earlier_is_seen(
    kind: str, mode: str, first: Check[EldScene], later: Check[EldScene]
) -> None:
    assert_refused(EldScene(kind, mode), first, later)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("kind", sorted(ALL))
def test_a_load_fills_the_epcm_entry_and_empties_the_slot(kind: str, leaf: str, mode: str) -> None:
    scene = EldScene(kind, mode, leaf)
    bench, page = scene.bench, scene.page
    children, epoch = bench.enclave(scene.secs).children, bench.enclave(scene.secs).epoch

    assert scene.run() == Status.SUCCESS

    child = kind in CHILDREN
    assert page.valid and page.pt is PageType[kind]
    assert page.rwx == (5 if child else 0)
    assert page.linaddr == scene.linaddr
    assert (page.pending, page.modified, page.pr) == (False, False, False)
    assert page.blocked is (child and leaf in ("eldb", "eldbc"))
    assert page.secs is (scene.secs_page if child else None)
    assert bench.slot_value(scene.blob.slot) == 0
    assert bench.enclave(scene.secs).children == children + child
    if page.blocked:
        assert page.bepoch == epoch
    assert (page.lock, scene.va_page.lock, scene.secs_page.lock) == (0, 0, 0)
    if kind == "SECS":
        assert page.owner.eid == scene.eid
        assert page.owner.context == scene.rcx
    bench.machine.check_invariants()


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("flags", range(8))
def test_pending_modified_and_pr_survive_an_eviction(flags: int, leaf: str) -> None:
    bench = Bench()
    secs = bench.secs()
    names: dict[str, Any] = {
        name: bool(flags >> i & 1) for i, name in enumerate(("pending", "modified", "pr"))
    }
    victim = bench.child(secs, rwx=1, linaddr=BASE + 0x5000, content=pattern(7), **names)
    blob = bench.evict(victim)
    assert Pcmd.unpack(blob.pcmd).secinfo.flags == 2 << 8 | flags << 3 | 1
    there = bench.free()
    assert bench.load(blob, there, leaf) == Status.SUCCESS
    page = bench.page(there)
    assert {name: getattr(page, name) for name in names} == names
    assert (page.rwx, page.linaddr) == (1, BASE + 0x5000)
    assert bench.content(there) == pattern(7)


def test_a_secs_comes_back_with_its_hidden_fields_and_fresh_tracking() -> None:
    bench = Bench()
    secs = bench.secs(miscselect=1, isv_prod_id=7, isv_svn=9, config_svn=3, mrsigner=b"s" * 32)
    before = bench.enclave(secs)
    before.padding, before.isv_family_id, before.isv_ext_prod_id = b"p" * 352, b"f" * 16, b"e" * 16
    before.virt_children, before.epoch = 4, 11
    blob = bench.evict(secs)
    assert Pcmd.unpack(blob.pcmd).enclave_id == before.eid
    there = bench.free()
    assert bench.load(blob, there) == Status.SUCCESS
    after = bench.enclave(there)
    same = {
        *("eid", "size", "base", "ssa_frame_size", "miscselect", "flags", "xfrm", "mrenclave"),
        *("mrsigner", "config_id", "isv_prod_id", "isv_svn", "config_svn", "padding"),
        *("isv_family_id", "isv_ext_prod_id", "virt_children", "cet_attributes"),
    }
    for name in same:
        assert getattr(after, name) == getattr(before, name), name
    assert after.context == there != before.context
    assert (after.children, after.cur_count, after.prev_count) == (0, 0, 0)


def test_a_va_page_comes_back_with_every_version_it_held() -> None:
    bench = Bench()
    va = bench.va()
    slots = bench.page(va).versions
    for slot in range(512):
        slots[slot] = 8 * (slot + 1)
    blob = bench.evict(va)
    there = bench.free()
    assert bench.load(blob, there, "eldb") == Status.SUCCESS
    loaded = bench.page(there)
    assert list(loaded.versions) == list(range(8, 8 * 513, 8))
    assert not loaded.blocked, "VA pages cannot be blocked"


def test_loads_need_va_page_and_secs_only_shared() -> None:
    scene = EldScene("REG", "memory")
    scene.va_page.lock, scene.secs_page.lock = 3, 2
    assert scene.run() == Status.SUCCESS
    assert (scene.va_page.lock, scene.secs_page.lock) == (3, 2)


@pytest.mark.parametrize("lock", [-1, 1])
@pytest.mark.parametrize("leaf", LEAVES)
def test_in_a_guest_a_held_target_makes_a_load_exit_to_the_hypervisor(leaf: str, lock: int) -> None:
    scene = EldScene("REG", "memory", leaf)
    in_guest(scene.bench.cpu)
    scene.page.lock = lock
    before = scene.snapshot()
    expected = (
        Exit(ConflictCode.EPC_PAGE_CONFLICT_ERROR, 7, scene.rcx, scene.rcx)
        if leaf.endswith("c")
        else Exit(ConflictCode.EPC_PAGE_CONFLICT_EXCEPTION, 0, scene.rcx, scene.rcx)
    )
    assert scene.run() == expected
    assert scene.snapshot() == before


@pytest.mark.parametrize("operand", ["va_page", "secs_page"])
@pytest.mark.parametrize("leaf", LEAVES)
def test_in_a_guest_a_held_va_page_or_secs_is_no_exit(leaf: str, operand: str) -> None:
    scene = EldScene("REG", "memory", leaf)
    in_guest(scene.bench.cpu)
    getattr(scene, operand).lock = -1
    assert scene.run() == held(scene)


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("twin", ["slot in the target", "SECS is the target", "SECS is the VA"])
def test_a_load_with_one_page_in_two_roles_is_refused_and_changes_nothing(
    leaf: str, twin: str
) -> None:
    scene = EldScene("REG", "memory", leaf)
    if twin == "slot in the target":
        scene.call.rdx = scene.rcx
    else:
        scene.call.secs = scene.rcx if twin == "SECS is the target" else scene.va_page.addr
    before = scene.snapshot()
    assert scene.run() in (GP, Status.EPC_PAGE_CONFLICT, Pf(scene.call.rdx), Pf(scene.call.secs))
    assert scene.snapshot() == before


@pytest.mark.parametrize("missing", [PAGEINFO_AT, SRCPGE_AT, PCMD_AT + 0x2000])
def test_unmapped_operands_of_a_load_fault_as_ordinary_memory(missing: int) -> None:
    scene = EldScene("REG", "memory")
    scene.snapshot()
    scene.bench.machine.ram_write(PCMD_AT + 0x2000, scene.pcmd.pack())
    scene.call.pcmd = PCMD_AT + 0x2000
    scene.bench.cpu.space = space = PageTables()
    for linear in (PAGEINFO_AT, SRCPGE_AT, PCMD_AT + 0x2000, scene.rcx, scene.va_page.addr):
        space.map(linear & -PAGE_BYTES, linear & -PAGE_BYTES, READ | WRITE)
    space.map(scene.secs, scene.secs, READ | WRITE)
    space.unmap(missing & -PAGE_BYTES)
    before = scene.snapshot()
    got = scene.run()
    assert isinstance(got, PlainPf) and got.address & -PAGE_BYTES == missing & -PAGE_BYTES
    assert scene.snapshot() == before
    space.map(missing & -PAGE_BYTES, missing & -PAGE_BYTES, READ)  # a load only reads them
    assert scene.run() == Status.SUCCESS
