"""EDBGRD and EDBGWR: what a debugger sees of an enclave that lets it.

Goal: the manual's checks alone and in pairs; only debug enclaves tell anything, and VA pages
never their versions.  Method: calls that would succeed are broken row by row.

Source:
    SDM vol. 3D, "EDBGRD", "EDBGWR", Operation.
"""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.checks import assert_refused
from tests.support.hw import build_enclave, free_pages, make_machine, reg, secs_of, tcs
from tests.support.paging import GP, OUTSIDE, Pf
from tests.support.scenes import CallScene, Row, check, operand, pairs

from softsgx.arch import AttributesFlags, PageType, Status, Tcs
from softsgx.hw import PageInfoArgs

F = AttributesFlags
DEBUG = F.MODE64BIT | F.DEBUG
TEXT = bytes(range(64))
SIZE = 0x8000
ONES_32 = (1 << 32) - 1


def scene(leaf: str, at: int = 0x18, *, flags: int = DEBUG) -> CallScene:
    machine = make_machine()
    pages = [reg(TEXT), tcs(ossa=0x3000, oentry=0x1234)]
    built = build_enclave(machine, pages, secs=secs_of(SIZE, flags=flags))
    operands = {"rcx": built.epc(at & ~0xFFF) + at % 4096}
    if leaf == "edbgwr":
        operands = {"rbx": 0x1122334455667788, **operands}
    return CallScene(machine, leaf, operands, built)


def of_page(**fields: object) -> Any:
    def violate(call: CallScene) -> None:
        for name, value in fields.items():
            setattr(call.page(), name, value)

    return violate


def production(call: CallScene) -> None:
    call.enclave.flags &= ~int(F.DEBUG)


NO_EPC = frozenset({"RCX outside the EPC"})
STUCK = Status.PAGE_NOT_DEBUGGABLE


def checks(leaf: str) -> list[Row]:
    stuck = (STUCK, 0) if leaf == "edbgrd" else STUCK
    return [
        check(1, "RCX misaligned", operand("rcx", lambda rcx: rcx + 4), GP),
        check(2, "RCX outside the EPC", operand("rcx", lambda rcx: OUTSIDE + rcx % 4096), "rcx"),
        check(3, "RCX held exclusively", of_page(lock=-1), GP, hides=NO_EPC),
        check(4, "RCX not in use", of_page(valid=False), "rcx", hides=NO_EPC),
        check(5, "a trimmed page", of_page(pt=PageType.TRIM), "rcx", hides=NO_EPC),
        check(5, "a SECS", of_page(pt=PageType.SECS), "rcx", hides=NO_EPC),
        check(6, "pending", of_page(pending=True), stuck, hides=NO_EPC),
        check(6, "modified", of_page(modified=True), stuck, hides=NO_EPC),
        check(8, "production enclave", production, GP),
    ]


BOTH = [("edbgrd", row) for row in checks("edbgrd")] + [("edbgwr", r) for r in checks("edbgwr")]


@pytest.mark.parametrize(
    ("leaf", "row"), [pytest.param(leaf, row, id=f"{leaf}-{row.name}") for leaf, row in BOTH]
)
def test_debug_leaves_refuse_with_the_manuals_outcome(leaf: str, row: Row) -> None:
    assert_refused(scene(leaf), row)


@pytest.mark.parametrize(("first", "later"), pairs(checks("edbgrd")))
def test_edbgrd_sees_the_earlier_of_two_failures(first: Row, later: Row) -> None:
    assert_refused(scene("edbgrd"), first, later)


@pytest.mark.parametrize(("first", "later"), pairs(checks("edbgwr")))
def test_edbgwr_sees_the_earlier_of_two_failures(first: Row, later: Row) -> None:
    assert_refused(scene("edbgwr"), first, later)


@pytest.mark.parametrize("rwx", [0, 7])
@pytest.mark.parametrize("blocked", [False, True])
def test_a_debugger_reads_pages_of_any_rights_and_blocked_ones(rwx: int, blocked: bool) -> None:
    call = scene("edbgrd")
    of_page(rwx=rwx, blocked=blocked, lock=1)(call)
    assert call.run() == (Status.SUCCESS, int.from_bytes(TEXT[0x18:0x20], "little"))
    assert call.page().lock == 1


def test_every_byte_of_a_reg_page_can_be_read() -> None:
    assert scene("edbgrd", 0xFF8).run() == (Status.SUCCESS, 0)


def test_a_debugger_writes_8_bytes_and_no_more() -> None:
    call = scene("edbgwr")
    of_page(rwx=0, blocked=True)(call)
    assert call.run() is Status.SUCCESS
    written = TEXT[:0x18] + bytes.fromhex("8877665544332211") + TEXT[0x20:]
    assert call.built.read(0, 64) == written


def test_in_32_bit_mode_it_is_4_bytes_at_a_time() -> None:
    for leaf in ("edbgrd", "edbgwr"):
        call = scene(leaf, 0x1C)
        assert call.run() == GP
        call.cpu.mode64 = False
        if leaf == "edbgrd":
            assert call.run() == (Status.SUCCESS, int.from_bytes(TEXT[0x1C:0x20], "little"))
        else:
            assert call.run() is Status.SUCCESS
            assert call.built.read(0x18, 16) == (
                TEXT[0x18:0x1C] + bytes.fromhex("88776655") + TEXT[0x20:0x28]
            )


def test_of_a_tcs_the_debugger_reads_the_fields_and_writes_flags_only() -> None:
    for offset in (*range(0, 128, 8), 1024, 4088):
        read, write = scene("edbgrd", 0x1000 + offset), scene("edbgwr", 0x1000 + offset)
        assert (read.run() != GP) is (offset < 72), offset
        assert (write.run() is Status.SUCCESS) is (offset == 8), offset
    call = scene("edbgrd", 0x1000 + Tcs.OFFSETS["oentry"])
    assert call.run() == (Status.SUCCESS, 0x1234)


def test_a_tcs_of_a_machine_with_cet_has_two_more_fields_to_read() -> None:
    for offset, seen in ((72, True), (80, True), (88, False)):
        machine = make_machine(attributes=DEBUG | F.CET)
        built = build_enclave(machine, [tcs(ossa=0)], secs=secs_of(SIZE, flags=DEBUG))
        call = CallScene(machine, "edbgrd", {"rcx": built.epc(0) + offset}, built)
        assert (call.run() == (Status.SUCCESS, 0)) is seen


@pytest.mark.parametrize("pt", [PageType.SS_FIRST, PageType.SS_REST])
def test_shadow_stack_pages_need_debug_like_any_other(pt: PageType) -> None:
    call = scene("edbgrd")
    of_page(pt=pt)(call)
    assert call.run() == (Status.SUCCESS, int.from_bytes(TEXT[0x18:0x20], "little"))
    production(call)
    assert call.run() == GP


def test_of_a_va_page_one_learns_only_which_slots_are_used() -> None:
    call = scene("edbgrd")
    leaves = call.machine.leaves
    va = next(free_pages(call.machine))
    leaves.epa(PageType.VA, va)
    assert leaves.eblock(call.built.epc(0)) is Status.SUCCESS
    assert leaves.etrack(call.built.secs) is Status.SUCCESS
    info = PageInfoArgs(0, bytearray(4096), bytearray(128))
    assert leaves.ewb(info, call.built.epc(0), va + 16) is Status.SUCCESS
    production(call)
    seen = [leaves.edbgrd(va + slot * 8)[1] for slot in range(512)]
    assert seen == [0, 0, (1 << 64) - 1] + [0] * 509
    call.cpu.mode64 = False
    assert [leaves.edbgrd(va + at)[1] for at in (12, 16, 20, 24)] == [0, ONES_32, ONES_32, 0]
    call.cpu.mode64 = True
    call.leaf, call.operands = "edbgwr", {"rbx": 0, "rcx": va}
    assert call.run() == Pf(va)
