"""ENCLS, ENCLU and ENCLV by registers: the checks before any leaf, and what an instruction leaves.

That the leaves do the same either way is shown in ``tests/differential/test_instructions.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from tests.support.checks import assert_refused
from tests.support.scenes import Row, check, pairs, put, rows, state_of
from tests.support.threads import AEP, DATA, ENCLU_AT, GP, RAM, Border, UserPf, ended

from softsgx.arch import (
    PAGE_BYTES,
    Encls,
    Enclu,
    Enclv,
    PageType,
    SgxFeature,
    Status,
    VmExitReason,
)
from softsgx.hw import Fault, LogicalProcessor, Machine, Segment, encls, enclu, enclv
from softsgx.trace import Tracer

CF, ZF, FLAGS = 1 << 0, 1 << 6, 0x8D5
NOWHERE = 1 << 47
INSTRUCTIONS: dict[str, Callable[[LogicalProcessor], None]] = {
    "encls": encls,
    "enclu": enclu,
    "enclv": enclv,
}


@dataclass
class Instruction:
    """One instruction that would succeed: EPA, EENTER or EINCVIRTCHILD."""

    name: str
    mode64: bool = True
    tracer: Tracer | None = None
    border: Border = field(init=False)

    def __post_init__(self) -> None:
        self.border = Border(mode64=self.mode64, tracer=self.tracer)
        self.hw: Machine = self.border.hw
        built = self.border.built
        self.free = next(
            section.page(40) for section in self.hw.config.sections if section.pages > 40
        )
        if self.name == "enclu":
            self.cpu = self.border.cpu
            leaf, operands = int(Enclu.EENTER), (self.border.rbx, AEP, 0)
        else:
            self.cpu = self.hw.cpus[0]
            self.cpu.mode64 = self.mode64
            self.cpu.vmx_operation = True
            leaf, operands = (
                (int(Encls.EPA), (3, self.free, 0))
                if self.name == "encls"
                else (int(Enclv.EINCVIRTCHILD), (built.epc(DATA), built.secs, 0))
            )
        self.set(leaf, *operands)

    def set(self, leaf: int, rbx: int = 0, rcx: int = 0, rdx: int = 0) -> None:
        """Load the registers."""
        regs = self.cpu.regs
        regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rip = leaf, rbx, rcx, rdx, ENCLU_AT

    def run(self) -> object:
        """Execute it."""
        return ended(lambda: INSTRUCTIONS[self.name](self.cpu))

    def snapshot(self) -> object:
        """Return the machine's and the processor's state."""
        self.border.cpu = self.cpu
        return self.border.snapshot()


def _without(feature: SgxFeature) -> Callable[[Any], None]:
    def violate(scene: Any) -> None:
        config = scene.hw.config
        scene.hw.config = replace(config, features=config.features & ~feature)
        scene.hw.features = int(scene.hw.config.features)

    return violate


def _in_32_bit(scene: Any) -> None:
    scene.cpu.mode64, scene.cpu.ds = False, Segment(expand_down=True)


def _exit(reason: VmExitReason, bitmap: str) -> Callable[[Any], None]:
    def violate(scene: Any) -> None:
        scene.cpu.vmx_nonroot = True
        setattr(scene.cpu, bitmap, 1 << scene.cpu.regs.rax)

    return violate


EXIT_ENCLS = ("exit", VmExitReason.ENCLS, int(Encls.EPA))
EXIT_ENCLV = ("exit", VmExitReason.ENCLV, int(Enclv.EINCVIRTCHILD))
AVAILABLE = [
    check(1, "in a transaction", put(cpu__in_tsx=True), "abort"),
    check(3, "real mode", put(cpu__real_mode=True), "#UD"),
    check(3, "no SGX", _without(SgxFeature.SGX1), "#UD"),
]
ENABLED = [
    check(7, "not locked", put(hw__feature_control=1 << 18), GP),
    check(7, "not enabled", put(hw__feature_control=1), GP),
    check(8, "unknown leaf", put(cpu__regs__rax=0x14), GP, hides=("exit wanted",)),
    check(9, "no paging", put(cpu__paging=False), GP),
]
TABLES = {
    "encls": [
        *AVAILABLE,
        check(4, "user mode", put(cpu__cpl=3), "#UD"),
        check(5, "exit wanted", _exit(VmExitReason.ENCLS, "encls_exiting"), EXIT_ENCLS),
        *ENABLED,
        check(10, "DS expands down", _in_32_bit, GP),
    ],
    "enclu": [
        *AVAILABLE,
        check(2, "waits for ENDBRANCH", put(cpu__cr4_cet=True, cpu__u_cet=4 | 1 << 11), "#CP"),
        check(4, "CR0.TS", put(cpu__cr0_ts=True), "#NM"),
        check(5, "supervisor mode", put(cpu__cpl=0), "#UD"),
        *ENABLED,
        check(9, "CR0.NE clear", put(cpu__cr0_ne=False), GP),
        check(10, "16-bit code", put(cpu__mode64=False, cpu__cs=Segment(big=False)), GP),
    ],
    "enclv": [
        *AVAILABLE,
        check(3, "no ENCLV", _without(SgxFeature.ENCLV), "#UD"),
        check(3, "not in VMX operation", put(cpu__vmx_operation=False), "#UD"),
        check(3, "compatibility mode", put(cpu__compatibility_mode=True), "#UD"),
        check(4, "user mode", put(cpu__cpl=3), "#UD"),
        check(5, "guest without ENCLV", put(cpu__vmx_nonroot=True), "#UD", hides=("exit wanted",)),
        check(6, "exit wanted", _exit(VmExitReason.ENCLV, "enclv_exiting"), EXIT_ENCLV),
        *ENABLED,
        check(10, "DS expands down", _in_32_bit, GP),
    ],
}


def _alone() -> list[Any]:
    return [
        pytest.param(name, *row.values, id=f"{name}-{row.id}")
        for name, table in TABLES.items()
        for row in rows(table)
    ]


def _together() -> list[Any]:
    hidden = {("guest without ENCLV", "exit wanted"), ("exit wanted", "unknown leaf")}
    return [
        pytest.param(name, *pair.values, id=f"{name}-{pair.id}", marks=pair.marks)
        for name, table in TABLES.items()
        for pair in pairs(table)
        if tuple(row.name for row in pair.values) not in hidden
    ]


@pytest.mark.parametrize("name", TABLES)
def test_an_unbroken_instruction_succeeds(name: str) -> None:
    assert Instruction(name).run() is None


@pytest.mark.parametrize(("name", "row"), _alone())
def test_an_instruction_is_refused_before_any_leaf(name: str, row: Row) -> None:
    assert_refused(Instruction(name), row)


@pytest.mark.parametrize(("name", "first", "later"), _together())
def test_of_two_failing_checks_the_earlier_decides(name: str, first: Row, later: Row) -> None:
    assert_refused(Instruction(name), first, later)


FEATURES: dict[SgxFeature, list[tuple[str, Encls | Enclu]]] = {
    SgxFeature.SGX2: [
        *(("encls", leaf) for leaf in (Encls.EAUG, Encls.EMODPR, Encls.EMODT)),
        *(("enclu", leaf) for leaf in (Enclu.EACCEPT, Enclu.EMODPE, Enclu.EACCEPTCOPY)),
    ],
    SgxFeature.OVERSUB_ENCLS: [
        ("encls", leaf) for leaf in (Encls.ERDINFO, Encls.ETRACKC, Encls.ELDBC, Encls.ELDUC)
    ],
    SgxFeature.EUPDATESVN: [("encls", Encls.EUPDATESVN)],
    SgxFeature.EVERIFYREPORT2: [("enclu", Enclu.EVERIFYREPORT2)],
    SgxFeature.EDECCSSA: [("enclu", Enclu.EDECCSSA)],
}


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_a_leaf_without_its_feature_is_unknown(feature: SgxFeature) -> None:
    for name, leaf in FEATURES[feature]:
        seen: list[Any] = []
        for has in (True, False):
            scene = Instruction(name)
            if name == "enclu":
                scene.run()
            if not has:
                _without(feature)(scene)
            # Whoever gets as far as the leaf is heard, however that ends.
            scene.set(int(leaf), 0, RAM if name == "encls" else 0)
            scene.hw.tracer = seen.append
            with suppress(Fault):
                INSTRUCTIONS[name](scene.cpu)
            assert bool(seen) == has, f"{leaf.name} with {feature!r}={has}"
            seen.clear()


def test_leaves_above_63_share_the_last_bit_of_the_exiting_bitmap() -> None:
    for number in (63, 64, 0xFFFF_FFFF):
        scene = Instruction("encls")
        scene.cpu.vmx_nonroot, scene.cpu.encls_exiting = True, 1 << 63
        scene.set(number)
        assert scene.run() == ("exit", VmExitReason.ENCLS, number)


def test_the_bitmap_is_for_guests_and_for_the_leaves_it_names() -> None:
    for nonroot, bitmap in ((False, -1 & (1 << 64) - 1), (True, ~(1 << Encls.EPA) & (1 << 64) - 1)):
        scene = Instruction("encls")
        scene.cpu.vmx_nonroot, scene.cpu.encls_exiting = nonroot, bitmap
        assert scene.run() is None


def test_the_upper_half_of_rax_is_ignored() -> None:
    scene = Instruction("encls")
    scene.cpu.regs.rax |= 0xABCD << 32
    assert scene.run() is None


@pytest.mark.parametrize("leaf", Enclu)
def test_each_enclu_leaf_has_its_side_of_the_border(leaf: Enclu) -> None:
    entering = leaf in (Enclu.EENTER, Enclu.ERESUME)
    scene = Instruction("enclu")
    if entering:
        scene.run()
    scene.set(int(leaf), RAM, 0)
    before = scene.snapshot()
    assert scene.run() == GP
    assert scene.snapshot() == before


def test_eresume_alone_may_come_while_the_tracker_waits() -> None:
    scene = Instruction("enclu")
    scene.cpu.cr4_cet, scene.cpu.u_cet = True, 4 | 1 << 11
    scene.set(int(Enclu.ERESUME), RAM, AEP)
    assert scene.run() == UserPf(RAM)


# --- what an instruction leaves -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "rcx", "code", "flag"),
    [
        (Encls.EBLOCK, "data", Status.SUCCESS, 0),
        (Encls.EBLOCK, "blocked", Status.BLKSTATE, CF),
        (Encls.EBLOCK, "secs", Status.PG_IS_SECS, CF),
        (Encls.EBLOCK, "free", Status.PG_INVLD, ZF),
        (Encls.EREMOVE, "secs", Status.CHILD_PRESENT, ZF),
        (Encls.ETRACKC, "va", Status.TRACK_NOT_REQUIRED, CF),
        (Encls.ERDINFO, "free", Status.PG_INVLD, CF),
        (Encls.ERDINFO, "ram", Status.PG_NONEPC, CF),
    ],
)
@pytest.mark.parametrize("flags", [0x202, 0x202 | FLAGS])
def test_codes_go_to_rax_and_to_the_flag_the_manual_names(
    leaf: Encls, rcx: str, code: Status, flag: int, flags: int
) -> None:
    scene = Instruction("encls")
    built = scene.border.built
    places = {"data": built.epc(DATA), "blocked": built.epc(DATA), "secs": built.secs}
    places |= {"free": scene.free + PAGE_BYTES, "va": scene.free, "ram": RAM}
    if rcx == "blocked":
        scene.hw.leaves.eblock(built.epc(DATA))
    scene.hw.leaves.epa(int(PageType.VA), scene.free)
    scene.set(int(leaf), RAM, places[rcx])
    scene.cpu.regs.rflags = flags
    assert scene.run() is None
    regs = scene.cpu.regs
    assert (regs.rax, regs.rflags) == (int(code), 0x202 | flag)
    assert (regs.rip, regs.rcx) == (ENCLU_AT + 3, places[rcx])


def test_leaves_without_a_code_leave_rax_and_flags_alone() -> None:
    scene = Instruction("encls")
    scene.cpu.regs.rflags = 0x202 | FLAGS
    assert scene.run() is None
    assert scene.cpu.regs.rax == Encls.EPA and scene.cpu.regs.rflags == 0x202 | FLAGS
    assert scene.cpu.regs.rip == ENCLU_AT + 3


def test_edbgrd_gives_data_in_rbx_and_only_when_it_succeeds() -> None:
    scene = Instruction("encls")
    scene.border.enclave.flags |= 2  # DEBUG
    page = scene.border.page(DATA)
    scene.hw.store.write(page, 8, b"\x11\x22\x33\x44\x55\x66\x77\x88")
    for pending, rbx, rax in ((False, 0x8877_6655_4433_2211, 0), (True, 5, 21)):
        page.pending = pending
        scene.set(int(Encls.EDBGRD), 5, page.addr + 8)
        assert scene.run() is None
        assert (scene.cpu.regs.rbx, scene.cpu.regs.rax) == (rbx, rax)


@pytest.mark.parametrize("name", TABLES)
def test_an_address_that_is_not_canonical_is_a_protection_fault(name: str) -> None:
    scene = Instruction(name)
    regs = scene.cpu.regs
    scene.cpu.space = scene.border.tables
    scene.set(regs.rax, *((3, NOWHERE) if name == "encls" else (NOWHERE, regs.rcx)))
    assert scene.run() == GP


def test_a_32_bit_processor_sees_the_lower_halves_of_its_registers() -> None:
    scene = Instruction("encls", mode64=False)
    scene.set(int(Encls.EPA), 3 | 7 << 32, scene.free | 9 << 32)
    scene.cpu.regs.rip = 0xFFFF_FFFE
    assert scene.run() is None
    assert scene.hw.pages[scene.free].pt is PageType.VA
    assert scene.cpu.regs.rip == 1, "and its instruction pointer wraps around"


def test_instructions_are_heard_by_listeners_too() -> None:
    events: list[Any] = []
    scene = Instruction("enclu", tracer=events.append)
    kernel = Instruction("encls", tracer=events.append)
    events.clear()
    scene.run()
    scene.cpu.regs.rax, scene.cpu.regs.rbx = int(Enclu.EEXIT), AEP
    enclu(scene.cpu)
    kernel.run()
    assert [event.leaf for event in events] == ["eenter", "eexit", "epa"]
    assert state_of(kernel.hw)
