"""EEXTEND, and what building leaves together measure.

Goal: the manual's checks alone and in pairs; MRENCLAVE of known sequences.  Method: a call that
would succeed is broken row by row; digests were computed from the manual's block layout.

Source:
    SDM vol. 3D, "EEXTEND", Operation; "ECREATE" and "EADD" for their blocks.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.checks import Check, assert_refused
from tests.support.hw import Built, PageSpec, build_enclave, make_machine, reg
from tests.support.paging import GP, OUTSIDE
from tests.support.scenes import CallScene, check, operand, pairs, put, rows

from softsgx.arch import (
    CHUNK_BYTES,
    CHUNKS_PER_PAGE,
    PAGE_BYTES,
    AttributesFlags,
    PageType,
    Status,
)
from softsgx.hw import PageInfoArgs

VECTORS = {
    "ecreate": "9e197c8837c6d65632dbdd59cd7df4f1a25b68d8e4e5eb6ca3b20b05311fecb8",
    "eadd": "995c454650d39811c9c53e1af534aa6c34a496ce9302c34e0ced2c7a7e2c4103",
    "eextend": "1f2cf80bd03ffd8bfac33f7cba128aff511c3af666b93bb66e7ef718418bdade",
    "tcs": "2280eda7599b4f23813224621835d69de20107e0d8b13881e19481578669e02c",
}
ZERO_REG = PageSpec(measured=False)
ZERO_TCS = PageSpec(PageType.TCS, rights=7, measured=False)


def measured(*pages: PageSpec) -> Built:
    return build_enclave(make_machine(), pages, size=0x2000, init=False)


def digest(built: Built) -> str:
    return built.machine.measurements[built.enclave.eid].hexdigest()


def test_known_sequences_have_their_digests() -> None:
    assert digest(measured()) == VECTORS["ecreate"]
    assert digest(measured(ZERO_REG)) == VECTORS["eadd"]
    assert digest(measured(PageSpec())) == VECTORS["eextend"]
    assert digest(measured(PageSpec(), ZERO_TCS)) == VECTORS["tcs"]


def test_einit_makes_the_digest_mrenclave_and_ends_the_measurement() -> None:
    built = build_enclave(make_machine(), [PageSpec(), ZERO_TCS], size=0x2000)
    assert built.enclave.mrenclave.hex() == VECTORS["tcs"]
    assert built.machine.measurements == {}


@given(
    chunks=st.lists(st.integers(0, CHUNKS_PER_PAGE - 1), max_size=4),
    other=st.lists(st.integers(0, CHUNKS_PER_PAGE - 1), max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_chunks_and_their_order_are_measured_as_they_come(
    chunks: list[int], other: list[int]
) -> None:
    digests = []
    for order in (chunks, other):
        built = measured(PageSpec(data=bytes(range(256)) * 16, measured=False))
        for chunk in order:
            built.machine.leaves.eextend(built.secs, built.epc(0) + chunk * CHUNK_BYTES)
        digests.append(digest(built))
    assert (digests[0] == digests[1]) == (chunks == other)


def test_bytes_count_only_where_they_are_extended() -> None:
    plain, changed = bytes(PAGE_BYTES), bytes(CHUNK_BYTES) + b"\1" + bytes(PAGE_BYTES - 257)
    for chunk, same in ((0, True), (1, False)):
        digests = set()
        for data in (plain, changed):
            built = measured(PageSpec(data=data, measured=False))
            built.machine.leaves.eextend(built.secs, built.epc(0) + chunk * CHUNK_BYTES)
            digests.add(digest(built))
        assert (len(digests) == 1) is same


def scene() -> CallScene:
    built = build_enclave(make_machine(), [reg(b"data"), reg()], init=False)
    operands = {"rbx": built.secs, "rcx": built.epc(0) + 3 * CHUNK_BYTES}
    return CallScene(built.machine, "eextend", operands, built)


def other_enclave(call: CallScene) -> None:
    call.operands["rbx"] = call.built.epc(0x1000)


def retype(pt: PageType) -> Any:
    def violate(call: CallScene) -> None:
        call.page().pt = pt

    return violate


def of_page(**fields: object) -> Any:
    def violate(call: CallScene) -> None:
        for name, value in fields.items():
            setattr(call.page(), name, value)

    return violate


def initialize(call: CallScene) -> None:
    call.enclave.flags |= AttributesFlags.INIT


NO_EPC = frozenset({"RCX outside the EPC"})
CHECKS = [
    check(1, "RBX misaligned", operand("rbx", lambda rbx: rbx + CHUNK_BYTES), GP),
    check(2, "RBX outside the EPC", operand("rbx", lambda rbx: OUTSIDE + rbx % 4096), "rbx"),
    check(3, "RCX misaligned", operand("rcx", lambda rcx: rcx + 64), GP),
    check(4, "RCX outside the EPC", operand("rcx", lambda rcx: OUTSIDE + rcx % 4096), "rcx"),
    check(5, "RCX held exclusively", of_page(lock=-1), GP, hides=NO_EPC),
    check(6, "RCX not in use", of_page(valid=False), "rcx", hides=NO_EPC),
    check(7, "RCX in a trimmed page", retype(PageType.TRIM), "rcx", hides=NO_EPC),
    check(7, "RCX in a VA page", retype(PageType.VA), "rcx", hides=NO_EPC),
    check(8, "RBX is another page", other_enclave, GP, hides={"RBX outside the EPC"}),
    check(9, "measurement held", put(enclave__measurement_lock=True), GP),
    check(10, "initialised", initialize, GP),
]


@pytest.mark.parametrize("row", rows(CHECKS))
def test_eextend_refuses_with_the_manuals_outcome(row: Check[Any]) -> None:
    assert_refused(scene(), row)


@pytest.mark.parametrize(("first", "later"), pairs(CHECKS))
def test_the_earlier_of_two_failing_checks_decides(first: Check[Any], later: Check[Any]) -> None:
    assert_refused(scene(), first, later)


def test_neither_pending_nor_blocked_nor_a_held_secs_matters() -> None:
    call = scene()
    of_page(pending=True, blocked=True)(call)
    call.machine.pages[call.built.secs].lock = -1
    assert call.run() is None


def test_a_measurement_survives_the_eviction_of_its_secs() -> None:
    built = measured()
    leaves, eid = built.machine.leaves, built.enclave.eid
    va, elsewhere = built.secs + PAGE_BYTES, built.secs + 2 * PAGE_BYTES
    leaves.epa(PageType.VA, va)
    srcpge, pcmd = bytearray(PAGE_BYTES), bytearray(128)
    assert leaves.ewb(PageInfoArgs(0, srcpge, pcmd), built.secs, va) is Status.SUCCESS
    assert leaves.eldu(PageInfoArgs(0, srcpge, pcmd), elsewhere, va) is Status.SUCCESS
    assert built.machine.pages[elsewhere].owner.eid == eid
    built.secs = elsewhere
    assert digest(built) == VECTORS["ecreate"]
