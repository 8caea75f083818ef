"""ECREATE: which SECS it takes, in which order it looks, what an enclave then is.

Goal: the manual's checks alone and in pairs, and every initial value.  Method: a call that would
succeed is broken row by row.

Source:
    SDM vol. 3D, "ECREATE", Operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.support.checks import Check, assert_refused
from tests.support.hw import free_pages, make_machine, secs_of
from tests.support.paging import GP, OUTSIDE, Exit, in_guest
from tests.support.scenes import InfoScene, check, memory, operand, pairs, put, rows

from softsgx.arch import (
    PAGE_BYTES,
    Attributes,
    AttributesFlags,
    CetAttributes,
    ConflictCode,
    MiscSelect,
    PageType,
    SecInfo,
    Secs,
    Xfrm,
)

SIZE, BASE = 0x10_0000, 0x7000_0000_0000
F = AttributesFlags


def scene(source: Secs | None = None, **config: Any) -> InfoScene:
    machine = make_machine(**config)
    source = secs_of(SIZE, BASE) if source is None else source
    return InfoScene(
        machine,
        "ecreate",
        next(free_pages(machine)),
        source.pack(),
        SecInfo.of(PageType.SECS),
    )


def source_with(**fields: object) -> Callable[[InfoScene], None]:
    def violate(call: InfoScene) -> None:
        assert call.source is not None
        call.source = Secs.unpack(call.source).replace(**fields).pack()

    return violate


def in_use(call: InfoScene) -> None:
    call.target.fill(PageType.VA)


CHECKS = [
    check(1, "PAGEINFO misaligned", memory("info", 0x1_0010), GP),
    check(1, "RCX misaligned", operand("rcx", lambda rcx: rcx + 8), GP),
    check(2, "RCX outside the EPC", operand("rcx", lambda rcx: OUTSIDE + rcx % 4096), "rcx"),
    check(3, "SRCPGE misaligned", memory("srcpge", 0x2_0800), GP),
    check(3, "SECINFO misaligned", memory("secinfo", 0x3_0020), GP),
    check(4, "LINADDR given", put(linaddr=BASE), GP),
    check(4, "SECS given", put(secs=0x50201000), GP),
    check(5, "SECINFO reserved byte", put(secinfo__reserved=bytes(55) + b"\1"), GP),
    check(5, "SECINFO reserved bit", put(secinfo__flags=1 << 16), GP),
    check(5, "SECINFO of a REG page", put(secinfo=SecInfo.of(PageType.REG)), GP),
    check(6, "RCX held", put(target__lock=1), GP, hides={"RCX outside the EPC"}),
    check(7, "RCX in use", in_use, "rcx", hides={"RCX outside the EPC"}),
    check(9, "XFRM without SSE", source_with(attributes=Attributes(flags=4, xfrm=1)), GP),
]


@pytest.mark.parametrize("row", rows(CHECKS))
def test_ecreate_refuses_with_the_manuals_outcome(row: Check[Any]) -> None:
    assert_refused(scene(), row)


@pytest.mark.parametrize(("first", "later"), pairs(CHECKS))
def test_the_earlier_of_two_failing_checks_decides(first: Check[Any], later: Check[Any]) -> None:
    assert_refused(scene(), first, later)


def attributes(flags: int, xfrm: int = 3) -> dict[str, object]:
    return {"attributes": Attributes(flags=int(flags), xfrm=int(xfrm))}


ILLEGAL: dict[str, dict[str, object]] = {
    "AVX-512 in part": attributes(F.MODE64BIT, 7 | Xfrm.OPMASK),
    "AVX-512 without AVX": attributes(F.MODE64BIT, 3 | Xfrm.OPMASK | Xfrm.ZMM_HI256 | 1 << 7),
    "half of MPX": attributes(F.MODE64BIT, 3 | Xfrm.BNDREGS),
    "both of MPX, which XCR0 takes and SGX does not": attributes(
        F.MODE64BIT, 3 | Xfrm.BNDREGS | Xfrm.BNDCSR
    ),
    "a state that the processor lacks": attributes(F.MODE64BIT, 3 | 1 << 40),
    "CET_ATTRIBUTES without CET": {"cet_attributes": 1},
    "CET bitmap without CET": {"cet_leg_bitmap_offset": PAGE_BYTES},
    "MISCSELECT not supported": {"miscselect": int(MiscSelect.CPINFO)},
    "MISCSELECT reserved": {"miscselect": 1 << 31},
    "no SSA frame": {"ssa_frame_size": 0},
    "base not canonical": {"base": 1 << 47},
    "32-bit base too high": {"base": 1 << 32} | attributes(0),
    "size above the 64-bit limit": {"size": 1 << 37, "base": 0},
    "size above the 32-bit limit": {"size": 1 << 32, "base": 0} | attributes(0),
    "one page": {"size": PAGE_BYTES},
    "no page": {"size": 0},
    "size no power of two": {"size": 3 * PAGE_BYTES, "base": 0},
    "base no multiple of the size": {"base": BASE + SIZE // 2},
    "INIT": attributes(F.MODE64BIT | F.INIT),
    "reserved attribute 3": attributes(F.MODE64BIT | 1 << 3),
    "reserved attribute 63": attributes(F.MODE64BIT | 1 << 63),
    "CET, which the machine lacks": attributes(F.MODE64BIT | F.CET),
    "reserved bytes after CET_ATTRIBUTES": {"reserved1": bytes(14) + b"\1"},
    "reserved bytes after MRENCLAVE": {"reserved2": b"\1" + bytes(31)},
    "reserved bytes after MRSIGNER": {"reserved3": bytes(31) + b"\1"},
    "reserved bytes at the end": {"reserved4": bytes(3833) + b"\1"},
    "CONFIGID without KSS": {"config_id": bytes(63) + b"\1"},
    "CONFIGSVN without KSS": {"config_svn": 1},
}


@pytest.mark.parametrize("fields", [pytest.param(v, id=k) for k, v in ILLEGAL.items()])
def test_an_illegal_secs_is_refused_and_takes_no_eid(fields: dict[str, object]) -> None:
    call = scene(max_size_64=36)
    source_with(**fields)(call)
    before = call.snapshot()
    assert call.run() == GP
    assert call.snapshot() == before


LEGAL: dict[str, dict[str, object]] = {
    "32-bit": {"base": 0x1000_0000} | attributes(0),
    "largest 64-bit": {"size": 1 << 36, "base": 0},
    "largest 32-bit": {"size": 1 << 31, "base": 0} | attributes(F.DEBUG),
    "AVX": attributes(F.MODE64BIT, 7),
    "AVX-512": attributes(F.MODE64BIT, 7 | 7 << 5),
    "EXINFO": {"miscselect": 1},
    "KSS": {"config_id": b"\1" * 64, "config_svn": 3} | attributes(F.MODE64BIT | F.KSS),
    "controlled attributes": attributes(F.MODE64BIT | F.PROVISIONKEY | F.EINITTOKENKEY),
    "MRENCLAVE given": {"mrenclave": b"\1" * 32},
}


@pytest.mark.parametrize("fields", [pytest.param(v, id=k) for k, v in LEGAL.items()])
def test_a_legal_secs_is_taken(fields: dict[str, object]) -> None:
    call = scene(max_size_64=36)
    source_with(**fields)(call)
    assert call.run() is None
    assert call.target.owner.mrenclave == bytes(32)


@pytest.mark.parametrize(
    ("xfrm", "miscselect", "pages"), [(3, 1, 1), (7 | 7 << 5, 0, 1), (7 | 7 << 5 | 1 << 9, 1, 1)]
)
def test_the_ssa_frame_must_hold_xsave_area_misc_and_gprs(
    xfrm: int, miscselect: int, pages: int
) -> None:
    # 3 + 4 components end at 2816 bytes: one page holds all but the largest.
    call = scene(secs_of(SIZE, BASE, xfrm=xfrm, miscselect=miscselect, ssa_frame_size=pages))
    assert call.run() is None


def test_a_frame_that_is_one_byte_too_small_is_refused() -> None:
    # 184 bytes of GPRSGX and 16 of EXINFO leave 3896 of one page.
    for size, taken in ((3896 - 576, True), (3897 - 576, False)):
        call = scene(
            secs_of(SIZE, BASE, xfrm=7, miscselect=1), xsave={2: (size, 576)}, xfrm=7, processors=1
        )
        assert (call.run() is None) is taken, size


def test_states_beyond_sse_need_osxsave() -> None:
    call = scene(secs_of(SIZE, BASE, xfrm=7))
    call.cpu.cr4_osxsave = False
    assert call.run() == GP
    source_with(**attributes(F.MODE64BIT, 3))(call)
    assert call.run() is None


CET_ON = {"attributes": F.MODE64BIT | F.CET}


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({"cet_attributes": int(CetAttributes.SH_STK_EN | CetAttributes.ENDBR_EN)}, True),
        ({"cet_leg_bitmap_offset": 2 * PAGE_BYTES}, True),
        ({"cet_attributes": 0x40}, False),
        ({"cet_leg_bitmap_offset": 8}, False),
        ({"cet_leg_bitmap_offset": 1 << 47}, False),
        ({"cet_attributes": 1} | attributes(F.MODE64BIT), False),
        ({"cet_leg_bitmap_offset": PAGE_BYTES} | attributes(F.MODE64BIT), False),
    ],
)
def test_cet_fields_agree_with_the_attribute(fields: dict[str, object], taken: bool) -> None:
    call = scene(secs_of(SIZE, BASE, flags=F.MODE64BIT | F.CET), **CET_ON)
    source_with(**fields)(call)
    assert (call.run() is None) is taken


def test_init_is_no_legal_attribute_on_any_machine() -> None:
    both = F.MODE64BIT | F.INIT
    call = scene(secs_of(SIZE, BASE, flags=both), attributes=both)
    assert call.run() == GP


def test_a_new_enclave_has_the_manuals_initial_values() -> None:
    call = scene(secs_of(SIZE, BASE, isv_svn=7, isv_prod_id=8, mrsigner=b"\1" * 32))
    assert call.run() is None
    page, enclave = call.target, call.target.owner
    assert page.valid and page.pt is PageType.SECS and page.secs is None
    assert (page.rwx, page.linaddr, page.pending, page.modified, page.pr, page.blocked) == (
        0, 0, False, False, False, False,
    )  # fmt: skip
    assert (enclave.base, enclave.size, enclave.eid) == (BASE, SIZE, 1)
    assert (enclave.isv_svn, enclave.isv_prod_id) == (0, 0)
    assert (enclave.children, enclave.virt_children, enclave.context) == (0, 0, call.rcx)
    assert not enclave.initialized
    assert page.lock == 0


def test_eids_are_not_reused_when_an_enclave_is_gone() -> None:
    call = scene()
    for eid in (1, 2, 3):
        assert call.run() is None
        assert call.target.owner.eid == eid
        call.machine.leaves.eremove(call.rcx)
        assert call.machine.measurements == {}


def test_in_a_guest_a_held_page_exits_to_the_hypervisor() -> None:
    call = scene()
    in_guest(call.cpu)
    call.target.lock = -1
    assert call.run() == Exit(ConflictCode.EPC_PAGE_CONFLICT_EXCEPTION, 0, call.rcx, call.rcx)
