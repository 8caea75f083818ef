"""ENCLV: VIRTCHILDCNT and ENCLAVECONTEXT, which a hypervisor keeps for its guests.

Goal: the manual's checks alone and in pairs; the counter never goes below zero and holds back the
SECS only in a guest.  Method: calls that would succeed are broken row by row.

Source:
    SDM vol. 3D, "EDECVIRTCHILD", "EINCVIRTCHILD", "ESETCONTEXT", Operation.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.checks import assert_refused
from tests.support.hw import build_enclave, make_machine, reg
from tests.support.paging import GP, OUTSIDE, in_guest
from tests.support.scenes import CallScene, Row, check, operand, pairs, park

from softsgx.arch import PageType, RdInfo, Status

COUNTING = ("edecvirtchild", "eincvirtchild")


def counting(leaf: str) -> CallScene:
    machine = make_machine()
    built = build_enclave(machine, [reg()])
    built.enclave.virt_children = 2
    return CallScene(machine, leaf, {"rbx": built.epc(0), "rcx": built.secs}, built)


def setting() -> CallScene:
    machine = make_machine()
    built = build_enclave(machine, [reg()])
    value = park(machine, 0x1_0000, (0x1234_5678).to_bytes(8, "little"))
    park(machine, 0x1_0008, bytes(8))
    return CallScene(machine, "esetcontext", {"rcx": built.secs, "rdx": value}, built)


def of_page(register: str, **fields: object) -> Any:
    def violate(call: CallScene) -> None:
        for name, value in fields.items():
            setattr(call.page(register), name, value)

    return violate


def not_the_secs(call: CallScene) -> None:
    call.operands["rcx"] = call.built.epc(0)


def not_a_secs(call: CallScene) -> None:
    call.operands["rcx"] = call.built.epc(0) + call.operands["rcx"] % 4096


BUSY = Status.EPC_PAGE_CONFLICT
NO_EPC = frozenset({"page outside the EPC"})
ROWS = [
    check(1, "page misaligned", operand("rbx", lambda rbx: rbx + 64), GP),
    check(2, "page outside the EPC", operand("rbx", lambda rbx: OUTSIDE + rbx % 4096), "rbx"),
    check(2, "SECS outside the EPC", operand("rcx", lambda rcx: OUTSIDE + rcx % 4096), "rcx"),
    check(3, "page held exclusively", of_page("rbx", lock=-1), BUSY, hides=NO_EPC),
    check(4, "page not in use", of_page("rbx", valid=False), "rbx", hides=NO_EPC),
    check(5, "a VA page", of_page("rbx", pt=PageType.VA), "rbx", hides=NO_EPC),
    check(6, "another page as SECS", not_the_secs, GP, hides={"SECS outside the EPC"}),
    check(6, "the middle of the SECS", operand("rcx", lambda rcx: rcx + 8), GP),
]
SET = [
    check(1, "SECS misaligned", operand("rcx", lambda rcx: rcx + 64), GP),
    check(2, "page outside the EPC", operand("rcx", lambda rcx: OUTSIDE + rcx % 4096), "rcx"),
    check(3, "value misaligned", operand("rdx", lambda rdx: rdx + 4), GP),
    check(4, "SECS held exclusively", of_page("rcx", lock=-1), BUSY, hides=NO_EPC),
    check(5, "a REG page", not_a_secs, "rcx", hides=NO_EPC | {"SECS held exclusively"}),
    check(5, "SECS not in use", of_page("rcx", valid=False), "rcx", hides=NO_EPC),
]


@pytest.mark.parametrize("leaf", COUNTING)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_counting_refuses_with_the_manuals_outcome(leaf: str, row: Row) -> None:
    assert_refused(counting(leaf), row)


@pytest.mark.parametrize("leaf", COUNTING)
@pytest.mark.parametrize(("first", "later"), pairs(ROWS))
def test_counting_sees_the_earlier_of_two_failures(leaf: str, first: Row, later: Row) -> None:
    assert_refused(counting(leaf), first, later)


@pytest.mark.parametrize("row", SET, ids=lambda row: row.name)
def test_esetcontext_refuses_with_the_manuals_outcome(row: Row) -> None:
    assert_refused(setting(), row)


@pytest.mark.parametrize(("first", "later"), pairs(SET))
def test_esetcontext_sees_the_earlier_of_two_failures(first: Row, later: Row) -> None:
    assert_refused(setting(), first, later)


@given(st.lists(st.booleans(), max_size=30))
@settings(max_examples=30, deadline=None)
def test_the_count_is_ups_minus_downs_and_refuses_to_pass_zero(ups: list[bool]) -> None:
    call = counting("eincvirtchild")
    call.enclave.virt_children = count = 0
    for nth, up in enumerate(ups):
        # A child and the SECS itself name the enclave equally well.
        call.operands["rbx"] = call.built.epc(0) if nth % 2 else call.built.secs
        call.leaf = "eincvirtchild" if up else "edecvirtchild"
        refused = not up and count == 0
        assert call.run() is (Status.INVALID_COUNTER if refused else Status.SUCCESS)
        count += 1 if up else 0 if refused else -1
        assert call.enclave.virt_children == count


def test_a_virtual_child_keeps_the_secs_in_a_guest_and_nowhere_else() -> None:
    call = counting("edecvirtchild")
    leaves, secs = call.machine.leaves, call.built.secs
    assert leaves.eremove(call.built.epc(0)) is Status.SUCCESS
    in_guest(call.cpu)
    assert leaves.eremove(secs) is Status.CHILD_PRESENT
    call.cpu.epc_virtualization = False
    assert leaves.eremove(secs) is Status.SUCCESS


def test_erdinfo_tells_the_context_that_was_set() -> None:
    call = setting()
    info = RdInfo()
    assert call.machine.leaves.erdinfo(info, call.built.secs) is Status.SUCCESS
    assert info.enclave_context == call.built.secs, "paging's address by default"
    assert call.run() is Status.SUCCESS
    for page in (call.built.secs, call.built.epc(0)):
        assert call.machine.leaves.erdinfo(info, page) is Status.SUCCESS
        assert info.enclave_context == 0x1234_5678
    call.operands["rdx"] = (7).to_bytes(8, "little")
    assert call.run() is Status.SUCCESS
    assert call.enclave.context == 7
