"""EPA, EBLOCK, ETRACK, ETRACKC, EREMOVE, ERDINFO: outcomes, their order, and effects.

Goal: each row of the manual's Operation sections, and which of two failing rows software sees.
EWB and the loads have modules of their own.  Method: a call that would succeed is broken row by
row, then in pairs; nothing may change when a leaf refuses.

Source:
    SDM vol. 3D, "EPA", "EBLOCK", "ETRACK", "ETRACKC", "EREMOVE", "ERDINFO", Operation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from tests.support.checks import Check, assert_refused, pair_params, row_params
from tests.support.paging import (
    GP,
    OUTSIDE,
    RDINFO_AT,
    Bench,
    Exit,
    Pf,
    PlainPf,
    in_guest,
    outcome,
)

from softsgx.arch import PAGE_BYTES, ConflictCode, PageType, RdInfo, Status
from softsgx.hw import READ, Leaves, PageTables

CHILDREN = ("REG", "TCS", "TRIM", "SS_FIRST", "SS_REST")
TYPES = (*CHILDREN, "SECS", "VA")


class LeafScene:
    """A page of a kind and a leaf that would succeed on it."""

    def __init__(self, leaf: str, kind: str, *, guest: bool = False, fast: bool = False) -> None:
        self.bench = bench = Bench()
        self.leaf = leaf
        if guest:
            in_guest(bench.cpu)
        self.leaves = bench.machine.leaves if fast else Leaves(bench.cpu)
        self.secs = bench.secs()
        self.rcx = bench.free() if kind == "free" else bench.kind(kind, self.secs)
        if kind == "SECS":
            self.secs = self.rcx
        self.rbx = {"epa": 3, "erdinfo": RDINFO_AT}.get(leaf)
        self.page, self.enclave = bench.page(self.rcx), bench.enclave(self.secs)

    def run(self) -> object:
        operands = [self.rcx] if self.rbx is None else [self.rbx, self.rcx]
        return outcome(partial(getattr(self.leaves, self.leaf), *operands))

    def snapshot(self) -> object:
        return self.bench.snapshot()


def put(what: str, name: str, value: Any) -> Any:
    def violate(scene: LeafScene) -> None:
        setattr(getattr(scene, what), name, value)

    return violate


def misalign_rcx(scene: LeafScene) -> None:
    scene.rcx += 256


def leave_epc(scene: LeafScene) -> None:
    scene.rcx = OUTSIDE + scene.rcx % PAGE_BYTES


def misalign_rbx(scene: LeafScene) -> None:
    assert scene.rbx is not None
    scene.rbx += 16


def retype(pt: PageType) -> Any:
    def violate(scene: LeafScene) -> None:
        in_use = scene.page.valid
        scene.page.fill(pt)
        scene.page.valid = in_use

    return violate


def use(scene: LeafScene) -> None:
    scene.page.fill(PageType.VA)


def adopt(scene: LeafScene) -> None:
    scene.bench.child(scene.page.addr)


def somebody_inside(scene: LeafScene) -> None:
    scene.enclave.cur_count = 1


def somebody_from_before(scene: LeafScene) -> None:
    scene.enclave.prev_count = 1


def gp(_: LeafScene) -> object:
    return GP


def pf(scene: LeafScene) -> object:
    return Pf(scene.rcx)


def code(status: Status) -> Any:
    return lambda _: status


def row(step: int, name: str, violate: Any, ends: Any, kinds: Any = (), **more: Any) -> Any:
    return Check(step, name, violate, ends, frozenset(kinds or (*TYPES, "free")), **more)


RCX_ROWS = [
    row(1, "RCX misaligned", misalign_rcx, gp),
    row(2, "RCX outside the EPC", leave_epc, pf),
]
HELD_ALONE = row(3, "held exclusively", put("page", "lock", -1), gp)
HELD_SHARED = row(3, "held shared", put("page", "lock", 2), gp)
HELD_CODE = row(3, "held exclusively", put("page", "lock", -1), code(Status.EPC_PAGE_CONFLICT))
NOT_IN_USE = put("page", "valid", False)

CHECKS: dict[str, list[Check[LeafScene]]] = {
    "epa": [
        row(1, "RBX is not 3", lambda scene: setattr(scene, "rbx", 2), gp),
        *RCX_ROWS,
        HELD_ALONE,
        HELD_SHARED,
        row(4, "in use", use, pf),
    ],
    "eblock": [
        *RCX_ROWS,
        HELD_CODE,
        row(5, "not in use", NOT_IN_USE, code(Status.PG_INVLD)),
        row(6, "a SECS", retype(PageType.SECS), code(Status.PG_IS_SECS)),
        row(6, "a VA page", retype(PageType.VA), code(Status.NOTBLOCKABLE)),
        row(
            7, "ETRACK runs", put("enclave", "etrack_running", True), code(Status.ENTRYEPOCH_LOCKED)
        ),
        row(8, "blocked already", put("page", "blocked", True), code(Status.BLKSTATE)),
    ],
    "etrack": [
        *RCX_ROWS,
        HELD_ALONE,
        row(4, "not in use", NOT_IN_USE, pf, hides={"facility held"}),
        row(3, "facility held", put("enclave", "tracking_lock", True), gp),
        # Without a SECS there is no facility to be held.
        row(4, "no SECS", retype(PageType.VA), pf, hides={"facility held"}),
        row(5, "cycle incomplete", somebody_from_before, code(Status.PREV_TRK_INCMPL)),
    ],
    "etrackc": [
        *RCX_ROWS,
        HELD_CODE,
        row(4, "not in use", NOT_IN_USE, code(Status.PG_INVLD)),
        row(5, "a VA page", retype(PageType.VA), code(Status.TRACK_NOT_REQUIRED)),
        row(
            6,
            "facility held",
            put("enclave", "tracking_lock", True),
            code(Status.EPC_PAGE_CONFLICT),
        ),
        row(7, "cycle incomplete", somebody_from_before, code(Status.PREV_TRK_INCMPL)),
    ],
    "eremove": [
        *RCX_ROWS,
        HELD_ALONE,
        HELD_SHARED,
        row(6, "child resident", adopt, code(Status.CHILD_PRESENT), ["SECS"]),
        row(
            8,
            "somebody inside",
            somebody_inside,
            code(Status.ENCLAVE_ACT),
            ["REG", "TCS", "SS_FIRST", "SS_REST"],
        ),
        row(
            8,
            "somebody inside from before",
            somebody_from_before,
            code(Status.ENCLAVE_ACT),
            ["REG", "TCS", "SS_FIRST", "SS_REST"],
        ),
    ],
    "erdinfo": [
        row(1, "RBX misaligned", misalign_rbx, gp),
        row(1, "RCX misaligned", misalign_rcx, gp),
        row(2, "RCX outside the EPC", leave_epc, code(Status.PG_NONEPC)),
        HELD_CODE,
        row(4, "not in use", NOT_IN_USE, code(Status.PG_INVLD)),
    ],
}
KINDS = {
    "epa": ["free"],
    "eblock": [*CHILDREN],
    "etrack": ["SECS"],
    "etrackc": [*CHILDREN, "SECS"],
    "eremove": [*TYPES],
    "erdinfo": [*TYPES],
}
PAIR_KINDS = KINDS | {
    "eblock": ["REG"],
    "etrackc": ["REG", "SECS"],
    "eremove": ["REG", "SECS", "VA"],
    "erdinfo": ["REG", "SECS"],
}
MODES = {leaf: ["plain", "fast"] if leaf == "eblock" else ["plain"] for leaf in CHECKS}
ROWS = [
    pytest.param(leaf, *param.values, id=f"{leaf}-{param.id}")
    for leaf, checks in CHECKS.items()
    for param in row_params(checks, KINDS[leaf], MODES[leaf])
]
PAIRS = [
    pytest.param(leaf, *param.values, id=f"{leaf}-{param.id}", marks=param.marks)
    for leaf, checks in CHECKS.items()
    for param in pair_params(checks, PAIR_KINDS[leaf], MODES[leaf])
]


@pytest.mark.parametrize(("leaf", "kind", "mode", "check"), ROWS)
def test_a_leaf_refuses_with_the_manuals_outcome(
    leaf: str, kind: str, mode: str, check: Check[LeafScene]
) -> None:
    assert_refused(LeafScene(leaf, kind, fast=mode == "fast"), check)


@pytest.mark.parametrize(("leaf", "kind", "mode", "first", "later"), PAIRS)
def test_of_two_failing_checks_the_earlier_is_seen(
    leaf: str, kind: str, mode: str, first: Check[LeafScene], later: Check[LeafScene]
) -> None:
    assert_refused(LeafScene(leaf, kind, fast=mode == "fast"), first, later)


# --- EPA ---------------------------------------------------------------------------------------


def test_epa_makes_a_va_page_of_512_empty_slots() -> None:
    scene = LeafScene("epa", "free")
    assert scene.run() is None
    page = scene.page
    assert page.valid and page.pt is PageType.VA
    assert list(page.versions) == [0] * 512
    assert (page.rwx, page.linaddr, page.secs) == (0, 0, None)
    assert (page.blocked, page.pending, page.modified, page.pr) == (False,) * 4
    assert page.lock == 0


@pytest.mark.parametrize("rbx", [0, 1, 2, 4, 0x300, 3 << 8, 1 << 32 | 3])
def test_epa_takes_no_other_constant_than_3(rbx: int) -> None:
    scene = LeafScene("epa", "free")
    scene.rbx = rbx
    assert scene.run() == GP
    assert not scene.page.valid


# --- EBLOCK ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kind", CHILDREN)
def test_eblock_sets_blocked_and_records_the_epoch_and_nothing_else(kind: str, fast: bool) -> None:
    scene = LeafScene("eblock", kind, fast=fast)
    scene.page.pending, scene.page.modified = True, True
    scene.enclave.flags &= ~1  # neither INIT nor PENDING nor MODIFIED matter
    scene.enclave.epoch = 5
    before: Any = scene.snapshot()
    assert scene.run() == Status.SUCCESS
    assert scene.page.blocked and scene.page.bepoch == 5
    before[0][scene.rcx].update(blocked=True, bepoch=5)
    assert scene.snapshot() == before


def test_eblock_of_a_blocked_page_leaves_its_epoch_alone() -> None:
    scene = LeafScene("eblock", "REG")
    assert scene.run() == Status.SUCCESS
    scene.enclave.epoch += 3
    assert scene.run() == Status.BLKSTATE
    assert scene.page.bepoch == 0


def test_eblock_takes_the_page_only_shared() -> None:
    scene = LeafScene("eblock", "REG")
    scene.page.lock = 2
    assert scene.run() == Status.SUCCESS
    assert scene.page.lock == 2


@pytest.mark.parametrize(("kind", "status"), [("SECS", 18), ("VA", 5), ("free", 6)])
def test_eblock_tells_apart_what_cannot_be_blocked(kind: str, status: int) -> None:
    scene = LeafScene("eblock", kind)
    before = scene.snapshot()
    assert scene.run() == status
    assert scene.snapshot() == before


# --- ETRACK, ETRACKC ---------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", ["etrack", "etrackc"])
def test_a_tracking_cycle_starts_a_new_epoch_and_changes_nothing_else(leaf: str) -> None:
    scene = LeafScene(leaf, "SECS")
    scene.enclave.epoch, scene.enclave.cur_count = 7, 3
    scene.enclave.flags &= ~1  # INIT does not matter
    before: Any = scene.snapshot()
    assert scene.run() == Status.SUCCESS
    before[0][scene.rcx]["enclave"].update(epoch=8, cur_count=0, prev_count=3)
    assert scene.snapshot() == before
    assert scene.run() == Status.PREV_TRK_INCMPL


@pytest.mark.parametrize("kind", CHILDREN)
def test_etrackc_finds_the_enclave_of_any_child(kind: str) -> None:
    scene = LeafScene("etrackc", kind)
    assert scene.run() == Status.SUCCESS
    assert scene.enclave.epoch == 1
    assert (scene.page.lock, scene.enclave.tracking_lock) == (0, False)


def test_etrack_and_etrackc_share_a_page_with_others() -> None:
    for leaf in ("etrack", "etrackc"):
        scene = LeafScene(leaf, "SECS")
        scene.page.lock = 2
        assert scene.run() == Status.SUCCESS
        assert scene.page.lock == 2


@pytest.mark.parametrize("kind", [*CHILDREN, "VA", "free"])
def test_etrack_wants_a_secs(kind: str) -> None:
    scene = LeafScene("etrack", kind)
    before = scene.snapshot()
    assert scene.run() == Pf(scene.rcx)
    assert scene.snapshot() == before


@pytest.mark.parametrize(
    ("violate", "conflict"),
    [
        (put("enclave", "tracking_lock", True), ConflictCode.TRACKING_RESOURCE_CONFLICT),
        (somebody_from_before, ConflictCode.TRACKING_REFERENCE_CONFLICT),
    ],
)
@pytest.mark.parametrize(("leaf", "kind"), [("etrack", "SECS"), ("etrackc", "REG")])
def test_in_a_guest_a_tracking_conflict_exits_with_the_enclave_context(
    leaf: str, kind: str, violate: Any, conflict: ConflictCode
) -> None:
    scene = LeafScene(leaf, kind, guest=True)
    scene.enclave.context = 0x1234_5000
    violate(scene)
    before = scene.snapshot()
    assert scene.run() == Exit(conflict, 0, 0x1234_5000, 0)
    assert scene.snapshot() == before


# --- EREMOVE -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_eremove_frees_a_page_with_any_epcm_flags(kind: str) -> None:
    scene = LeafScene("eremove", kind)
    if kind in CHILDREN:
        scene.page.pending = scene.page.modified = scene.page.pr = scene.page.blocked = True
    if kind == "VA":
        assert scene.page.slots is not None
        scene.page.slots[5] = 0x808  # live slots do not matter
    pages = len(scene.bench.store)
    assert scene.run() == Status.SUCCESS
    assert not scene.page.valid and scene.page.lock == 0
    assert scene.enclave.children == 0
    assert len(scene.bench.store) == pages - (kind in CHILDREN)
    scene.bench.machine.check_invariants()


def test_eremove_of_a_free_page_succeeds_and_changes_nothing() -> None:
    scene = LeafScene("eremove", "free")
    before = scene.snapshot()
    assert scene.run() == Status.SUCCESS
    assert scene.snapshot() == before


@pytest.mark.parametrize(("modified", "status"), [(False, 0), (True, 14)])
def test_only_an_accepted_trim_page_goes_while_threads_are_inside(
    modified: bool, status: int
) -> None:
    scene = LeafScene("eremove", "TRIM")
    scene.page.modified = modified
    somebody_inside(scene)
    assert scene.run() == status
    assert scene.page.valid is modified
    assert scene.enclave.children == modified


def test_eremove_of_a_secs_counts_resident_children_only() -> None:
    bench = Bench()
    secs = bench.secs()
    child = bench.child(secs, pending=True)
    assert outcome(partial(bench.leaves.eremove, secs)) == Status.CHILD_PRESENT
    bench.evict(child)
    assert outcome(partial(bench.leaves.eremove, secs)) == Status.SUCCESS


@pytest.mark.parametrize(("guest", "status"), [(False, 0), (True, 13)])
def test_virtual_children_keep_a_secs_only_in_a_guest(guest: bool, status: int) -> None:
    scene = LeafScene("eremove", "SECS", guest=guest)
    scene.enclave.virt_children = 1
    before = scene.snapshot()
    assert scene.run() == status
    if status:
        assert scene.snapshot() == before


def test_a_processor_inside_another_enclave_does_not_matter() -> None:
    scene = LeafScene("eremove", "REG")
    scene.bench.enclave(scene.bench.secs()).cur_count = 2
    assert scene.run() == Status.SUCCESS


@pytest.mark.parametrize("lock", [-1, 1])
@pytest.mark.parametrize(("leaf", "kind"), [("epa", "free"), ("eremove", "REG")])
def test_in_a_guest_a_held_page_makes_a_leaf_exit(leaf: str, kind: str, lock: int) -> None:
    scene = LeafScene(leaf, kind, guest=True)
    scene.page.lock = lock
    before = scene.snapshot()
    conflict = ConflictCode.EPC_PAGE_CONFLICT_EXCEPTION
    assert scene.run() == Exit(conflict, 0, scene.rcx, scene.rcx)
    assert scene.snapshot() == before


@pytest.mark.parametrize(("leaf", "kind"), [("eblock", "REG"), ("erdinfo", "REG")])
def test_in_a_guest_leaves_with_a_code_for_a_held_page_still_give_it(leaf: str, kind: str) -> None:
    scene = LeafScene(leaf, kind, guest=True)
    scene.page.lock = -1
    assert scene.run() == Status.EPC_PAGE_CONFLICT


# --- ERDINFO -----------------------------------------------------------------------------------


def rdinfo(scene: LeafScene) -> RdInfo:
    assert scene.run() == Status.SUCCESS
    return RdInfo.unpack(scene.bench.machine.ram_read(RDINFO_AT, 32))


@pytest.mark.parametrize("flags", range(16))
@pytest.mark.parametrize("kind", CHILDREN)
def test_erdinfo_tells_a_childs_entry_and_its_enclaves_context(kind: str, flags: int) -> None:
    scene = LeafScene("erdinfo", kind)
    scene.page.rwx = 5
    for bit, name in enumerate(("pending", "modified", "pr", "blocked")):
        setattr(scene.page, name, bool(flags >> bit & 1))
    scene.enclave.context = 0xABC000
    scene.bench.machine.ram_write(RDINFO_AT, b"\xff" * 32)
    expected = int(PageType[kind]) << 8 | 5 | (flags & 7) << 3 | (flags >> 3) << 63
    assert rdinfo(scene) == RdInfo(flags=expected, enclave_context=0xABC000)


def test_erdinfo_of_a_va_page_has_neither_status_nor_context() -> None:
    assert rdinfo(LeafScene("erdinfo", "VA")) == RdInfo(flags=3 << 8)


@pytest.mark.parametrize("guest", [False, True])
@pytest.mark.parametrize("children", [0, 1])
@pytest.mark.parametrize("virtual", [0, 1])
def test_erdinfo_of_a_secs_tells_which_children_it_has(
    children: int, virtual: int, guest: bool
) -> None:
    scene = LeafScene("erdinfo", "SECS", guest=guest)
    scene.enclave.context, scene.enclave.virt_children = 0x9000, virtual
    if children:
        adopt(scene)
    # A guest is told of virtual children as if they were children: it knows no others.
    status = (children or virtual) if guest else children | virtual << 1
    assert rdinfo(scene) == RdInfo(status=status, flags=0, enclave_context=0x9000)


def test_erdinfo_fills_an_object_as_it_fills_memory() -> None:
    scene = LeafScene("erdinfo", "REG")
    info = RdInfo()
    assert Leaves(scene.bench.cpu).erdinfo(info, scene.rcx) == Status.SUCCESS
    assert info == rdinfo(scene)


def test_erdinfo_takes_the_page_only_shared() -> None:
    scene = LeafScene("erdinfo", "REG")
    scene.page.lock = 1
    assert scene.run() == Status.SUCCESS
    assert scene.page.lock == 1


# --- paging ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        ("epa", "free"),
        ("eblock", "REG"),
        ("etrack", "SECS"),
        ("etrackc", "REG"),
        ("eremove", "REG"),
        ("erdinfo", "REG"),
    ],
)
def test_an_operand_that_paging_refuses_faults_without_the_sgx_bit(leaf: str, kind: str) -> None:
    scene = LeafScene(leaf, kind)
    scene.bench.cpu.space = space = PageTables()
    space.map(RDINFO_AT & -PAGE_BYTES, RDINFO_AT & -PAGE_BYTES, READ | 2)
    before = scene.snapshot()
    assert scene.run() == PlainPf(scene.rcx)
    assert scene.snapshot() == before
