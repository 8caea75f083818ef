"""EADD: which pages may join an enclave, in which order that is found out, what they become.

Goal: the manual's checks alone and in pairs, and the EPCM entry and bytes of each type.  Method: a
call that would succeed is broken row by row.

Source:
    SDM vol. 3D, "EADD", Operation.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import pytest
from tests.support.checks import Check, assert_refused
from tests.support.hw import DEFAULT_BASE, build_enclave, free_pages, make_machine, secs_of
from tests.support.paging import GP, OUTSIDE, Exit, in_guest
from tests.support.scenes import InfoScene, check, memory, operand, pairs, put, rows

from softsgx.arch import (
    PAGE_BYTES,
    AttributesFlags,
    ConflictCode,
    PageType,
    SecInfo,
    Tcs,
    eadd_block,
    ecreate_block,
)

SIZE = 0x10_000
AT = DEFAULT_BASE + 0x3000
F = AttributesFlags
CET = {"attributes": F.MODE64BIT | F.CET}


def scene(
    pt: PageType = PageType.REG,
    rights: int = 3,
    data: bytes = b"\xa5" * PAGE_BYTES,
    *,
    flags: int = F.MODE64BIT,
    base: int = DEFAULT_BASE,
    **config: Any,
) -> InfoScene:
    machine = make_machine(**config)
    built = build_enclave(machine, [], secs=secs_of(SIZE, base, flags=flags), init=False)
    target = next(free_pages(machine))
    linaddr = base + AT - DEFAULT_BASE
    return InfoScene(
        machine, "eadd", target, data, SecInfo.of(pt, rights), linaddr, built.secs, built=built
    )


def initialize(call: InfoScene) -> None:
    call.enclave.flags |= F.INIT


def another_page(call: InfoScene) -> None:
    page = call.machine.page_at(next(free_pages(call.machine)) + 8 * PAGE_BYTES)
    assert page is not None
    page.fill(PageType.VA)
    call.secs = page.addr + call.secs % PAGE_BYTES


def secs_gone(call: InfoScene) -> None:
    call.secs_page.valid = False


NO_SECS = {"SECS outside the EPC", "SECS held exclusively"}
CHECKS = [
    check(1, "PAGEINFO misaligned", memory("info", 0x1_0010), GP),
    check(1, "RCX misaligned", operand("rcx", lambda rcx: rcx + 8), GP),
    check(2, "RCX outside the EPC", operand("rcx", lambda rcx: OUTSIDE + rcx % 4096), "rcx"),
    check(3, "SRCPGE misaligned", memory("srcpge", 0x2_0800), GP),
    check(3, "SECINFO misaligned", memory("secinfo", 0x3_0020), GP),
    check(3, "LINADDR misaligned", operand("linaddr", lambda at: at + 0x10), GP),
    check(3, "SECS misaligned", operand("secs", lambda at: at + 0x10), GP),
    check(4, "SECS outside the EPC", operand("secs", lambda at: OUTSIDE + at % 4096), "secs"),
    check(5, "SECINFO reserved byte", put(secinfo__reserved=b"\1" + bytes(55)), GP),
    check(5, "SECINFO with PENDING", put(secinfo__flags=0x203 | 8), GP),
    check(5, "SECINFO of a SECS", put(secinfo__flags=0x003), GP),
    check(5, "SECINFO of a shadow stack without CET", put(secinfo__flags=0x503), GP),
    check(5, "SECINFO of no type", put(secinfo__flags=0x903), GP),
    check(7, "RCX held", put(target__lock=2), GP, hides={"RCX outside the EPC"}),
    check(8, "RCX in use", put(target__valid=True), "rcx", hides={"RCX outside the EPC"}),
    check(9, "SECS held exclusively", put(secs_page__lock=-1), GP, hides={"SECS outside the EPC"}),
    check(10, "no SECS there", secs_gone, "secs", hides={"SECS outside the EPC"}),
    check(10, "a VA page as SECS", another_page, "secs", hides=NO_SECS),
    check(12, "W without R", put(secinfo__flags=0x202), GP),
    check(13, "LINADDR below the enclave", put(linaddr=DEFAULT_BASE - PAGE_BYTES), GP),
    check(13, "LINADDR above the enclave", put(linaddr=DEFAULT_BASE + SIZE), GP),
    check(14, "measurement held", put(enclave__measurement_lock=True), GP),
    check(15, "initialised", initialize, GP),
]


@pytest.mark.parametrize("row", rows(CHECKS))
def test_eadd_refuses_with_the_manuals_outcome(row: Check[Any]) -> None:
    assert_refused(scene(), row)


@pytest.mark.parametrize(("first", "later"), pairs(CHECKS))
def test_the_earlier_of_two_failing_checks_decides(first: Check[Any], later: Check[Any]) -> None:
    assert_refused(scene(), first, later)


def test_the_secs_is_held_shared_and_may_be_shared() -> None:
    call = scene()
    call.secs_page.lock = 3
    assert call.run() is None
    assert call.secs_page.lock == 3


@pytest.mark.parametrize("mapped", [False, True], ids=["objects", "memory"])
@pytest.mark.parametrize("rights", [0, 1, 3, 5, 7, 4])
def test_a_reg_page_has_the_rights_and_bytes_it_was_given(rights: int, mapped: bool) -> None:
    call = scene(rights=rights)
    if mapped:
        call.at = {"info": 0x1_0000}
    assert call.run() is None
    page = call.target
    assert page.valid and (page.pt, page.rwx, page.linaddr) == (PageType.REG, rights, AT)
    assert page.secs is call.secs_page
    assert not (page.blocked or page.pending or page.modified or page.pr)
    assert call.machine.store.read(page, 0, PAGE_BYTES) == call.source
    assert call.enclave.children == 1
    call.machine.check_invariants()


def test_the_bytes_added_are_a_copy() -> None:
    call = scene()
    source = bytearray(PAGE_BYTES)
    call.source = source  # type: ignore[assignment]
    assert call.run() is None
    source[:] = b"\xff" * PAGE_BYTES
    assert call.machine.store.read(call.target, 0, 8) == bytes(8)


@pytest.mark.parametrize("rights", [0, 2, 7])
def test_a_tcs_loses_its_rights_its_state_and_its_opt_in_before_it_is_measured(rights: int) -> None:
    source = Tcs(
        state=1, flags=0xFF03, ossa=0x4000, cssa=5, nssa=2, oentry=0x10, aep=0x1234, ofs_base=0x5000
    )
    call = scene(PageType.TCS, rights, source.pack())
    assert call.run() is None
    assert call.target.rwx == 0 and call.target.pt is PageType.TCS
    kept = Tcs.unpack(call.machine.store.read(call.target, 0, PAGE_BYTES))
    # EADD does not look at FLAGS otherwise; entry refuses what is reserved there.
    assert kept == source.replace(state=0, flags=0xFF02, cssa=0, aep=0)
    blocks = ecreate_block(1, SIZE) + eadd_block(0x3000, 0x100)
    assert call.machine.measurements[call.enclave.eid].digest() == sha256(blocks).digest()


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({"reserved": bytes(4007) + b"\1"}, False),
        ({"ocetssa": 16}, False),
        ({"prevssp": 8}, False),
        ({"fs_limit": 0}, True),
    ],
)
def test_a_tcs_with_reserved_bytes_is_refused(fields: dict[str, object], taken: bool) -> None:
    assert (scene(PageType.TCS, 0, Tcs(**fields).pack()).run() is None) is taken


def test_with_cet_a_tcs_may_have_an_ocetssa_and_no_prevssp() -> None:
    assert scene(PageType.TCS, 0, Tcs(ocetssa=16).pack(), **CET).run() is None
    assert scene(PageType.TCS, 0, Tcs(prevssp=8).pack(), **CET).run() == GP


@pytest.mark.parametrize(
    ("fs", "gs", "taken"), [(0xFFF, 0x1FFF, True), (0xFFE, 0xFFF, False), (0xFFF, 0x1000, False)]
)
def test_limits_of_a_32_bit_tcs_end_with_a_page(fs: int, gs: int, taken: bool) -> None:
    page = Tcs(fs_limit=fs, gs_limit=gs).pack()
    call = scene(PageType.TCS, 0, page, flags=0, base=0x1000_0000)
    assert (call.run() is None) is taken


def shadow_stack(pt: PageType, tail: int, linaddr: int = AT, rights: int = 3) -> InfoScene:
    data = bytes(PAGE_BYTES - 8) + tail.to_bytes(8, "little")
    call = scene(pt, rights, data, flags=F.MODE64BIT | F.CET, **CET)
    call.cpu.cr4_cet = True
    call.linaddr = linaddr
    return call


def test_a_shadow_stack_page_has_its_token_and_no_other_bytes() -> None:
    token = AT + PAGE_BYTES | 1
    for pt, tail in ((PageType.SS_FIRST, token), (PageType.SS_REST, 0)):
        call = shadow_stack(pt, tail)
        assert call.run() is None
        assert (call.target.pt, call.target.rwx) == (pt, 3)
        assert shadow_stack(pt, tail ^ 1).run() == GP
        assert shadow_stack(pt, tail, rights=7).run() == GP
        assert shadow_stack(pt, tail, rights=1).run() == GP
        dirty = shadow_stack(pt, tail)
        assert dirty.source is not None
        dirty.source = b"\1" + dirty.source[1:]
        assert dirty.run() == GP
        without_cr4 = shadow_stack(pt, tail)
        without_cr4.cpu.cr4_cet = False
        assert without_cr4.run() == GP


@pytest.mark.parametrize("offset", [0, SIZE - PAGE_BYTES])
def test_no_shadow_stack_page_is_at_an_end_of_the_enclave(offset: int) -> None:
    assert shadow_stack(PageType.SS_REST, 0, DEFAULT_BASE + offset).run() == GP


def test_one_linear_address_may_be_added_twice() -> None:
    call = scene()
    assert call.run() is None
    call.rcx = next(free_pages(call.machine))
    assert call.run() is None
    assert call.enclave.children == 2


def test_in_a_guest_a_held_page_exits_to_the_hypervisor() -> None:
    call = scene()
    in_guest(call.cpu)
    call.target.lock = 1
    assert call.run() == Exit(ConflictCode.EPC_PAGE_CONFLICT_EXCEPTION, 0, call.rcx, call.rcx)
