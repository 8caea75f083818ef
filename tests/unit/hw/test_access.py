"""Accesses at a TLB miss: what each check refuses, what outsiders see, what stays usable.

One enclave, one processor inside or outside; every condition of a direct enclave access is broken
alone, for each kind of access.
"""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.threads import (
    AEP,
    CODE,
    DATA,
    GP,
    RAM,
    SSA,
    TCS,
    Border,
    UserPf,
    ended,
)

from softsgx.arch import PAGE_BYTES, PageType, Pfec, SecInfo, Status
from softsgx.hw import (
    EXECUTE,
    READ,
    WRITE,
    GeneralProtection,
    PageFault,
    Segment,
    aex,
    check_access,
    deliver,
    enclave_operand,
)
from softsgx.hw.access import fetch, load, store

ACCESSES = {"r": READ, "w": WRITE, "x": EXECUTE}
NONCANONICAL = 1 << 47


def inside(**options: Any) -> Border:
    scene = Border(**options)
    scene.enter()
    return scene


def access_memory(scene: Border, linaddr: int, access: str, size: int = 4) -> object:
    """Access memory as an instruction does; return what it saw."""
    if access == "w":
        store(scene.cpu, linaddr, bytes(size))
        return None
    return (load if access == "r" else fetch)(scene.cpu, linaddr, size)


def touch(scene: Border, linaddr: int, access: str, size: int = 4) -> object:
    """Access memory as an instruction does; return what it saw, or its fault."""
    return ended(lambda: access_memory(scene, linaddr, access, size))


REFUSALS: dict[str, dict[str, Any]] = {
    "not valid": {"valid": False},
    "blocked": {"blocked": True},
    "pending": {"pending": True},
    "modified": {"modified": True},
    "a TCS": {"pt": PageType.TCS},
    "trimmed": {"pt": PageType.TRIM},
    "a shadow stack": {"pt": PageType.SS_REST},
    "of nobody": {"secs": None},
    "elsewhere": {"linaddr": 0},
    "without rights": {"rwx": 0},
}


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("why", REFUSALS)
def test_the_epcm_refuses_with_the_sgx_bit_and_the_exact_address(why: str, access: str) -> None:
    scene = inside()
    page = scene.page(DATA)
    page.rwx = 7
    for name, value in REFUSALS[why].items():
        setattr(page, name, value)
    before, at = scene.snapshot(), scene.base + DATA + 0x123
    assert touch(scene, at, access) == UserPf(at, access)
    assert scene.snapshot() == before


@pytest.mark.parametrize("access", ACCESSES)
def test_pr_restricts_nothing_and_each_right_grants_its_own_access(access: str) -> None:
    for granted, right in ACCESSES.items():
        scene = inside()
        page = scene.page(DATA)
        page.pr, page.rwx = True, right
        refused = isinstance(touch(scene, scene.base + DATA, access), UserPf)
        assert refused == (granted != access)


@pytest.mark.parametrize("access", ACCESSES)
def test_paging_decides_first_and_without_the_sgx_bit(access: str) -> None:
    scene = inside()
    scene.page(DATA).valid = False  # as after an eviction
    at = scene.base + DATA
    for mapped in (False, True):
        scene.tables.unmap(at)
        if mapped:
            scene.tables.map(at, scene.built.epc(DATA), 7 & ~ACCESSES[access])
        with pytest.raises(PageFault) as caught:
            access_memory(scene, at, access)
        code = {"r": Pfec.U, "w": Pfec.U | Pfec.W, "x": Pfec.U | Pfec.I}[access]
        assert caught.value.code == code | (Pfec.P if mapped else 0)


def test_ordinary_memory_inside_elrange_is_refused() -> None:
    scene = inside()
    scene.tables.map(scene.base + DATA, RAM, 7)
    assert touch(scene, scene.base + DATA, "r") == UserPf(scene.base + DATA, "r")


@pytest.mark.parametrize("offset", [CODE, DATA, TCS])
def test_outsiders_load_ones_and_store_nothing(offset: int) -> None:
    scene = Border()
    at, before = scene.base + offset, scene.built.read(offset, 64)
    assert load(scene.cpu, at, 8) == fetch(scene.cpu, at, 8) == b"\xff" * 8
    store(scene.cpu, at, b"attacker")
    assert scene.built.read(offset, 64) == before


def test_epc_beyond_the_enclave_is_abort_page_for_the_enclave_too() -> None:
    scene = inside()
    alias = RAM + PAGE_BYTES
    scene.tables.map(alias, scene.built.epc(DATA), 7)
    assert load(scene.cpu, alias, 4) == b"\xff" * 4
    store(scene.cpu, alias, b"gone")
    assert scene.built.read(DATA, 4) == bytes(4)


def test_the_enclave_reads_and_writes_its_own_memory_and_the_process() -> None:
    scene = inside()
    store(scene.cpu, scene.base + DATA + 7, b"mine")
    store(scene.cpu, RAM, b"theirs")
    assert scene.built.read(DATA + 7, 4) == b"mine" == load(scene.cpu, scene.base + DATA + 7, 4)
    assert load(scene.cpu, RAM, 6) == b"theirs" == scene.hw.ram_read(RAM, 6)


def test_an_enclave_fetches_only_from_itself() -> None:
    scene = inside()
    assert fetch(scene.cpu, scene.base + CODE, 3) == b"\x90" * 3
    assert touch(scene, RAM, "x") == GP
    scene.tables.unmap(RAM)
    assert touch(scene, RAM, "x") == UserPf(RAM, "x", sgx=False), "paging comes first"
    aex(scene.cpu, 0xFD)
    scene.tables.map(RAM, RAM, 7)
    assert touch(scene, RAM, "x") == bytes(4)


def end_of_range() -> Border:
    """A processor inside an enclave whose last page, and the one after it, are mapped."""
    scene = Border()
    last = scene.base + scene.enclave.size - PAGE_BYTES
    page = scene.page(SSA + PAGE_BYTES)
    page.linaddr, page.rwx = last, 7
    scene.tables.map(last, page.addr, 7)
    scene.tables.map(last + PAGE_BYTES, RAM, 7)
    scene.hw.ram_write(RAM, b"outside!")
    scene.enter()
    return scene


def test_data_that_straddles_the_end_of_the_enclave_is_judged_piece_by_piece() -> None:
    scene = end_of_range()
    end = scene.base + scene.enclave.size
    assert load(scene.cpu, end - 4, 8) == bytes(4) + b"outs"
    store(scene.cpu, end - 2, b"abcd")
    assert load(scene.cpu, end - 2, 4) == b"abcd" and scene.hw.ram_read(RAM, 3) == b"cdt"
    scene.page(SSA + PAGE_BYTES).blocked = True
    scene.cpu.flush_tlb()
    assert touch(scene, end - 4, "r", 8) == UserPf(end - 4, "r")
    assert touch(scene, end, "r", 4) == b"cdts"


def test_code_that_straddles_the_end_of_the_enclave_is_refused() -> None:
    scene = end_of_range()
    end = scene.base + scene.enclave.size
    assert touch(scene, end - 4, "x", 4) == bytes(4)
    assert touch(scene, end - 2, "x", 4) == GP
    scene.page(SSA + PAGE_BYTES).blocked = True
    scene.cpu.flush_tlb()
    assert touch(scene, end - 2, "x", 4) == GP, "the range is looked at before the EPCM"


def test_a_store_that_faults_on_its_second_page_has_stored_nothing() -> None:
    scene = inside()
    scene.page(SSA + PAGE_BYTES).blocked = True
    at = scene.base + SSA + PAGE_BYTES
    assert touch(scene, at - 4, "w", 8) == UserPf(at, "w")
    before = scene.built.read(SSA + PAGE_BYTES - 4, 4)
    with pytest.raises(PageFault):
        store(scene.cpu, at - 4, b"12345678")
    assert scene.built.read(SSA + PAGE_BYTES - 4, 4) == before


def test_addresses_outside_the_segment_are_protection_faults() -> None:
    scene = inside()
    assert {touch(scene, NONCANONICAL, access) for access in "rw"} == {GP}
    narrow = inside(mode64=False)
    narrow.cpu.ds = Segment(limit=0xFFFF)
    assert touch(narrow, 0x1_0000, "r") == GP


# --- the TLB ------------------------------------------------------------------------------------


def test_a_blocked_page_stays_usable_through_the_tlb_until_the_thread_exits() -> None:
    scene = inside()
    at = scene.base + DATA
    store(scene.cpu, at, b"data")
    load(scene.cpu, at, 4)
    assert scene.hw.leaves.eblock(scene.built.epc(DATA)) is Status.SUCCESS
    assert load(scene.cpu, at, 4) == b"data"
    store(scene.cpu, at, b"more")
    aex(scene.cpu, 0xFD)
    scene.cpu.enclu.eresume(scene.rbx, AEP)
    assert touch(scene, at, "r") == UserPf(at, "r")


def test_a_kind_of_access_that_was_not_made_before_the_block_is_a_miss() -> None:
    scene = inside()
    load(scene.cpu, scene.base + DATA, 1)
    assert scene.hw.leaves.eblock(scene.built.epc(DATA)) is Status.SUCCESS
    assert touch(scene, scene.base + DATA, "w") == UserPf(scene.base + DATA, "w")
    assert load(scene.cpu, scene.base + DATA, 1) == b"\0"


def test_a_restricted_page_keeps_its_old_rights_in_the_tlb() -> None:
    scene = inside()
    at = scene.base + DATA
    store(scene.cpu, at, b"data")
    secinfo = SecInfo.of(PageType.REG, READ)
    assert scene.hw.leaves.emodpr(secinfo, scene.built.epc(DATA)) is Status.SUCCESS
    store(scene.cpu, at, b"late")
    assert load(scene.cpu, at, 4) == b"late"
    scene.cpu.flush_tlb()
    assert touch(scene, at, "w") == UserPf(at, "w")


def test_after_emodpe_a_translation_with_fewer_rights_faults_once() -> None:
    scene = inside()
    at, want = scene.base + DATA + PAGE_BYTES, scene.base + DATA
    scene.page(SSA + PAGE_BYTES).linaddr = at
    scene.page(SSA + PAGE_BYTES).rwx = READ
    scene.tables.map(at, scene.built.epc(SSA + PAGE_BYTES), 7)
    load(scene.cpu, at, 1)
    store(scene.cpu, want, SecInfo.of(PageType.REG, READ | WRITE).pack())
    scene.cpu.enclu.emodpe(want, at)
    with pytest.raises(PageFault) as caught:
        store(scene.cpu, at, b"x")
    deliver(scene.cpu, caught.value)
    scene.cpu.enclu.eresume(scene.rbx, AEP)
    store(scene.cpu, at, b"x")
    assert load(scene.cpu, at, 1) == b"x"


def test_a_remapped_page_is_found_at_its_new_place_after_a_flush_only() -> None:
    scene = Border()
    scene.hw.ram_write(RAM, b"old")
    scene.hw.ram_write(RAM + PAGE_BYTES, b"new")
    assert load(scene.cpu, RAM, 3) == b"old"
    scene.tables.map(RAM, RAM + PAGE_BYTES, 7)
    assert load(scene.cpu, RAM, 3) == b"old"
    assert fetch(scene.cpu, RAM, 3) == b"new", "another kind of access walks again"
    scene.cpu.flush_tlb()
    assert load(scene.cpu, RAM, 3) == b"new"


# --- for other engines, and for leaves ----------------------------------------------------------


@pytest.mark.parametrize("access", ACCESSES)
def test_the_pure_check_says_what_the_access_does(access: str) -> None:
    for change in [*REFUSALS.values(), {"rwx": 7}, {"rwx": 7, "pr": True}]:
        scene = inside()
        page, at = scene.page(DATA), scene.base + DATA + 5
        page.rwx = 7
        for name, value in change.items():
            setattr(page, name, value)
        before = scene.snapshot()
        verdict = check_access(scene.hw.pages[scene.built.secs], page, at, ACCESSES[access])
        assert scene.snapshot() == before
        seen = touch(scene, at, access, 1)
        if verdict is None:
            assert not isinstance(seen, UserPf)
        else:
            assert seen == UserPf(verdict.address, access)


def test_the_pure_check_refuses_what_is_no_epc() -> None:
    scene = Border()
    fault = check_access(scene.hw.pages[scene.built.secs], None, 0x1234, READ)
    assert fault is not None and fault.code == Pfec.P | Pfec.SGX | Pfec.U


@pytest.mark.parametrize("pt", PageType)
def test_shadow_stack_accesses_are_for_shadow_stacks_alone(pt: PageType) -> None:
    scene = Border()
    page, secs = scene.page(DATA), scene.hw.pages[scene.built.secs]
    page.pt = pt
    fault = check_access(secs, page, scene.base + DATA, WRITE, shadow_stack=True)
    if pt in (PageType.SS_FIRST, PageType.SS_REST):
        assert fault is None
    else:
        assert fault is not None and fault.code & Pfec.SS


def test_a_leafs_operand_is_checked_without_the_tlb() -> None:
    scene = inside()
    at = scene.base + DATA
    load(scene.cpu, at, 1)
    assert enclave_operand(scene.cpu, at, WRITE) is scene.page(DATA)
    scene.page(DATA).blocked = True
    assert load(scene.cpu, at, 1) == b"\0"
    assert ended(lambda: enclave_operand(scene.cpu, at + 8, READ)) == UserPf(at + 8, "r")
    scene.tables.map(at, RAM, 7)
    assert ended(lambda: enclave_operand(scene.cpu, at, WRITE)) == UserPf(at, "w")
    scene.tables.unmap(at)
    assert ended(lambda: enclave_operand(scene.cpu, at, READ)) == UserPf(at, "r", sgx=False)
    with pytest.raises(GeneralProtection):
        enclave_operand(scene.cpu, NONCANONICAL, READ)
