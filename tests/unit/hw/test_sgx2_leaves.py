"""EAUG, EMODPR, EMODT: what changes in an enclave that runs, as the operating system sees it.

Goal: the manual's checks alone and in pairs, and each effect.  Method: calls that would succeed are
broken row by row.

Source:
    SDM vol. 3D, "EAUG", "EMODPR", "EMODT", Operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.support.checks import Check, assert_refused
from tests.support.hw import build_enclave, free_pages, make_machine, reg, secs_of, tcs
from tests.support.paging import GP, OUTSIDE, Exit, Pf, in_guest
from tests.support.scenes import CallScene, InfoScene, Row, check, memory, operand, pairs, put, rows

from softsgx.arch import (
    PAGE_BYTES,
    AttributesFlags,
    ConflictCode,
    PageType,
    SecInfo,
    Status,
)
from softsgx.hw import PageInfoArgs

F = AttributesFlags
SIZE = 0x8000
NEW = 0x4000  # offset of the page that EAUG adds
NO_EPC = frozenset({"RCX outside the EPC"})
CET = {"attributes": F.MODE64BIT | F.CET}


def uninitialised(call: Any) -> None:
    call.enclave.flags &= ~int(F.INIT)


# --- EAUG ----------------------------------------------------------------------------------------


def augmenting(secinfo: SecInfo | None = None, **config: Any) -> InfoScene:
    machine = make_machine(**config)
    flags = config.get("attributes", F.MODE64BIT)
    built = build_enclave(machine, [reg()], secs=secs_of(SIZE, flags=flags))
    machine.kernel.cr4_cet = bool(flags & F.CET)
    target = next(free_pages(machine))
    return InfoScene(
        machine, "eaug", target, None, secinfo, built.base + NEW, built.secs, built=built
    )


def another_page(call: InfoScene) -> None:
    page = call.machine.page_at(next(free_pages(call.machine)) + 8 * PAGE_BYTES)
    assert page is not None
    page.fill(PageType.VA)
    call.secs = page.addr + call.secs % PAGE_BYTES


def secs_gone(call: InfoScene) -> None:
    call.secs_page.valid = False


def source_given(call: InfoScene) -> None:
    call.source = bytes(PAGE_BYTES)


def source_at(addr: int) -> Callable[[InfoScene], None]:
    def violate(call: InfoScene) -> None:
        call.source = bytes(PAGE_BYTES)
        call.at["srcpge"] = addr

    return violate


def secinfo_at(addr: int) -> Callable[[InfoScene], None]:
    def violate(call: InfoScene) -> None:
        call.secinfo = SecInfo.of(PageType.SS_REST, 3)
        call.at["secinfo"] = addr

    return violate


EAUG = [
    check(1, "RCX misaligned", operand("rcx", lambda rcx: rcx + 8), GP),
    check(2, "RCX outside the EPC", operand("rcx", lambda rcx: OUTSIDE + rcx % 4096), "rcx"),
    check(3, "SECINFO misaligned", secinfo_at(0x3_0020), GP),
    check(4, "LINADDR misaligned", operand("linaddr", lambda at: at + 0x10), GP),
    check(4, "SECS misaligned", operand("secs", lambda at: at + 0x10), GP),
    check(5, "SRCPGE given", source_given, GP),
    check(5, "SRCPGE given by address", source_at(0x2_0000), GP),
    check(6, "SECS outside the EPC", operand("secs", lambda at: OUTSIDE + at % 4096), "secs"),
    check(7, "RCX held", put(target__lock=1), GP, hides=NO_EPC),
    check(8, "RCX in use", put(target__valid=True), "rcx", hides=NO_EPC),
    check(9, "shadow stack without CET", put(secinfo=SecInfo.of(PageType.SS_REST, 3)), GP),
    check(9, "SECINFO of a REG page", put(secinfo=SecInfo.of(PageType.REG, 3)), GP),
    check(11, "SECS held exclusively", put(secs_page__lock=-1), GP),
    check(12, "no SECS there", secs_gone, "secs", hides={"SECS outside the EPC"}),
    check(
        12,
        "a VA page as SECS",
        another_page,
        "secs",
        hides={"SECS outside the EPC", "SECS held exclusively"},
    ),
    check(13, "not initialised", uninitialised, GP),
    check(14, "LINADDR outside the enclave", operand("linaddr", lambda at: at + SIZE), GP),
]


@pytest.mark.parametrize("row", rows(EAUG))
def test_eaug_refuses_with_the_manuals_outcome(row: Check[Any]) -> None:
    assert_refused(augmenting(), row)


@pytest.mark.parametrize(("first", "later"), pairs(EAUG))
def test_eaug_sees_the_earlier_of_two_failures(first: Check[Any], later: Check[Any]) -> None:
    assert_refused(augmenting(), first, later)


@pytest.mark.parametrize("addr", [0x1_0000, 0x1_0008])
def test_eaug_takes_pageinfo_from_aligned_memory_only(addr: int) -> None:
    call = augmenting()
    memory("info", addr)(call)
    call.secinfo, call.source = None, None
    assert (call.run() is None) is (addr % 32 == 0)


def test_an_augmented_page_is_zero_and_pending_and_counted() -> None:
    call = augmenting()
    assert call.run() is None
    page = call.target
    assert page.valid and page.secs is call.secs_page
    assert (page.pt, page.rwx, page.linaddr) == (PageType.REG, 3, call.linaddr)
    assert page.pending and not (page.modified or page.pr or page.blocked)
    assert call.machine.store.read(page, 0, PAGE_BYTES) == bytes(PAGE_BYTES)
    assert call.enclave.children == 2
    call.machine.check_invariants()


def test_an_augmented_shadow_stack_begins_with_its_token() -> None:
    for pt, tail in ((PageType.SS_FIRST, True), (PageType.SS_REST, False)):
        call = augmenting(SecInfo.of(pt, 3), **CET)
        assert call.run() is None
        token = call.linaddr + PAGE_BYTES | 1 if tail else 0
        data = bytes(PAGE_BYTES - 8) + token.to_bytes(8, "little")
        assert call.machine.store.read(call.target, 0, PAGE_BYTES) == data
        assert (call.target.pt, call.target.rwx, call.target.pending) == (pt, 3, True)


@pytest.mark.parametrize(
    "violate",
    [
        put(secinfo__flags=0x203),
        put(secinfo__flags=0x607),
        put(secinfo__flags=0x601),
        put(secinfo__flags=0x603 | 8),
        put(secinfo__reserved=b"\1" + bytes(55)),
        put(cpu__cr4_cet=False),
        put(linaddr=0x7000_0000_0000),
        put(linaddr=0x7000_0000_0000 + SIZE - PAGE_BYTES),
    ],
)
def test_an_illegal_shadow_stack_page_is_refused(violate: Callable[[InfoScene], None]) -> None:
    call = augmenting(SecInfo.of(PageType.SS_REST, 3), **CET)
    violate(call)
    before = call.snapshot()
    assert call.run() == GP
    assert call.snapshot() == before


def test_secinfo_in_memory_is_read() -> None:
    call = augmenting(SecInfo.of(PageType.SS_REST, 3), **CET)
    call.at["secinfo"] = 0x3_0040
    assert call.run() is None
    assert call.target.pt is PageType.SS_REST


def test_cr4_alone_makes_no_shadow_stacks() -> None:
    call = augmenting(SecInfo.of(PageType.SS_REST, 3))
    call.cpu.cr4_cet = True
    assert call.run() == GP


# --- EMODPR and EMODT ----------------------------------------------------------------------------


def changing(leaf: str, secinfo: SecInfo) -> CallScene:
    machine = make_machine()
    built = build_enclave(machine, [reg(b"code", rights=7), tcs(ossa=0x3000)], size=SIZE)
    built.page(0).bepoch, built.enclave.epoch = 1, 5
    return CallScene(machine, leaf, {"rbx": secinfo, "rcx": built.epc(0)}, built)


def restricting() -> CallScene:
    return changing("emodpr", SecInfo.of(PageType.SECS, 1))


def retyping() -> CallScene:
    return changing("emodt", SecInfo.of(PageType.TRIM))


def of_page(**fields: object) -> Any:
    def violate(call: CallScene) -> None:
        for name, value in fields.items():
            setattr(call.page(), name, value)

    return violate


def secinfo(**fields: object) -> Any:
    def violate(call: CallScene) -> None:
        for name, value in fields.items():
            setattr(call.operands["rbx"], name, value)

    return violate


BUSY, STUCK = Status.EPC_PAGE_CONFLICT, Status.PAGE_NOT_MODIFIABLE
OPERANDS = [
    check(1, "SECINFO misaligned", memory("rbx", 0x3_0020), GP),
    check(1, "RCX misaligned", operand("rcx", lambda rcx: rcx + 64), GP),
    check(2, "RCX outside the EPC", operand("rcx", lambda rcx: OUTSIDE + rcx % 4096), "rcx"),
    check(3, "SECINFO reserved byte", secinfo(reserved=bytes(55) + b"\1"), GP),
]
IN_USE = check(5, "RCX not in use", of_page(valid=False), "rcx", hides=NO_EPC)
LOCK_A = check(6, "state being changed", of_page(modification_lock=True), BUSY, hides=NO_EPC)
EMODPR = [
    *OPERANDS,
    check(3, "W without R", secinfo(flags=2), GP),
    check(3, "PR asked for", secinfo(flags=0x21), GP),
    check(4, "RCX held exclusively", of_page(lock=-1), GP, hides=NO_EPC),
    IN_USE,
    LOCK_A,
    check(7, "pending", of_page(pending=True), STUCK, hides=NO_EPC),
    check(7, "modified", of_page(modified=True), STUCK, hides=NO_EPC),
    check(8, "a TCS", of_page(pt=PageType.TCS), "rcx", hides=NO_EPC),
    check(9, "not initialised", uninitialised, GP),
]
EMODT = [
    *OPERANDS,
    check(3, "to REG", secinfo(flags=0x200), GP),
    check(3, "to VA", secinfo(flags=0x300), GP),
    check(3, "PENDING asked for", secinfo(flags=0x408), GP),
    check(4, "RCX held", of_page(lock=1), BUSY, hides=NO_EPC),
    IN_USE,
    LOCK_A,
    check(7, "a trimmed page", of_page(pt=PageType.TRIM), "rcx", hides=NO_EPC),
    check(7, "a VA page", of_page(pt=PageType.VA), "rcx", hides=NO_EPC),
    check(8, "pending", of_page(pending=True), STUCK, hides=NO_EPC),
    check(8, "modified", of_page(modified=True), STUCK, hides=NO_EPC),
    check(9, "not initialised", uninitialised, GP),
]
SCENES = {"emodpr": restricting, "emodt": retyping}
ALL_ROWS = [("emodpr", row) for row in EMODPR] + [("emodt", row) for row in EMODT]


@pytest.mark.parametrize(
    ("leaf", "row"), [pytest.param(leaf, row, id=f"{leaf}-{row.name}") for leaf, row in ALL_ROWS]
)
def test_restricting_and_retyping_refuse_with_the_manuals_outcome(leaf: str, row: Row) -> None:
    assert_refused(SCENES[leaf](), row)


@pytest.mark.parametrize(("first", "later"), pairs(EMODPR))
def test_emodpr_sees_the_earlier_of_two_failures(first: Row, later: Row) -> None:
    assert_refused(restricting(), first, later)


@pytest.mark.parametrize(("first", "later"), pairs(EMODT))
def test_emodt_sees_the_earlier_of_two_failures(first: Row, later: Row) -> None:
    assert_refused(retyping(), first, later)


@pytest.mark.parametrize(("had", "asked", "left"), [(7, 1, 1), (7, 3, 3), (3, 5, 1), (1, 7, 1)])
def test_emodpr_takes_rights_and_never_gives_any(had: int, asked: int, left: int) -> None:
    call = restricting()
    of_page(rwx=had)(call)
    secinfo(flags=asked)(call)
    memory("rbx", 0x3_0040)(call)
    assert call.run() is Status.SUCCESS
    page = call.page()
    assert (page.rwx, page.pr, page.bepoch, page.pt) == (left, True, 5, PageType.REG)
    assert (page.lock, page.modification_lock) == (0, False)


def test_emodpr_may_share_its_page_and_in_a_guest_a_conflict_stays_a_fault() -> None:
    call = restricting()
    of_page(lock=2)(call)
    assert call.run() is Status.SUCCESS
    in_guest(call.cpu)
    of_page(lock=-1)(call)
    assert call.run() == GP


@pytest.mark.parametrize(
    ("offset", "had", "target", "ends"),
    [
        (0, PageType.REG, PageType.TCS, Status.SUCCESS),
        (0, PageType.REG, PageType.TRIM, Status.SUCCESS),
        (0x1000, PageType.TCS, PageType.TRIM, Status.SUCCESS),
        (0x1000, PageType.TCS, PageType.TCS, "fault"),
        (0, PageType.SS_FIRST, PageType.TRIM, Status.SUCCESS),
        (0, PageType.SS_REST, PageType.TRIM, Status.SUCCESS),
        (0, PageType.SS_REST, PageType.TCS, "fault"),
    ],
)
def test_emodt_retypes_what_the_manual_allows(
    offset: int, had: PageType, target: PageType, ends: object
) -> None:
    call = changing("emodt", SecInfo.of(target, 7))
    call.operands["rcx"] = call.built.epc(offset)
    of_page(pt=had, pr=True)(call)
    if ends == "fault":
        assert call.run() == Pf(call.operands["rcx"])
        return
    assert call.run() is ends
    page = call.page()
    assert (page.pt, page.rwx, page.modified, page.pr) == (target, 0, True, False)
    assert page.bepoch == 5
    assert call.enclave.children == 2


def test_in_a_guest_a_held_page_gives_emodt_a_conflict_error_exit() -> None:
    call = retyping()
    in_guest(call.cpu)
    rcx = call.operands["rcx"]
    of_page(lock=1)(call)
    assert call.run() == Exit(ConflictCode.EPC_PAGE_CONFLICT_ERROR, 7, rcx, rcx)
    of_page(lock=0, modification_lock=True)(call)
    assert call.run() is BUSY


def test_a_restricted_page_leaves_only_after_a_tracking_cycle() -> None:
    call = restricting()
    assert call.run() is Status.SUCCESS
    leaves, rcx = call.machine.leaves, call.operands["rcx"]
    va = next(free_pages(call.machine))
    leaves.epa(PageType.VA, va)
    assert leaves.eblock(rcx) is Status.SUCCESS

    def evict() -> Status:
        return leaves.ewb(PageInfoArgs(0, bytearray(PAGE_BYTES), bytearray(128)), rcx, va)

    assert evict() is Status.NOT_TRACKED
    assert leaves.etrack(call.built.secs) is Status.SUCCESS
    assert evict() is Status.SUCCESS
