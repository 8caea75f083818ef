"""EACCEPT, EACCEPTCOPY, EMODPE: each check of the manual's lists, their order, their effects.

The operating system's side (EAUG, EMODPR, EMODT, ETRACK) is real leaves; then one thing is broken,
or two that end differently.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.support.checks import assert_refused
from tests.support.scenes import Row, check, pairs, put, rows
from tests.support.threads import AEP, DATA, GP, RAM, Border, UserPf, ended

from softsgx.arch import PAGE_BYTES, PageType, SecInfo, SecInfoFlags, Status, Tcs, page_of
from softsgx.hw import EpcPage, PageInfoArgs, aex
from softsgx.hw.access import fetch, load, store

NEW = 0x2_0000  # offset of a page that EAUG adds
R, W, X = int(SecInfoFlags.R), int(SecInfoFlags.W), int(SecInfoFlags.X)
PENDING, MODIFIED, PR = (
    int(flag) for flag in (SecInfoFlags.PENDING, SecInfoFlags.MODIFIED, SecInfoFlags.PR)
)
REG, TCS, TRIM = (pt << 8 for pt in (PageType.REG, PageType.TCS, PageType.TRIM))
MISMATCH = Status.PAGE_ATTRIBUTES_MISMATCH
FRESH_TCS = Tcs(ossa=0x5000, nssa=1, fs_limit=0xFFF, gs_limit=0xFFF)


@dataclass
class Call:
    """One call of a leaf inside the enclave that would succeed.

    Attributes:
        kind: what the operating system has done to the target: ``new`` (EAUG), ``restricted``
            (EMODPR), ``trimmed``, ``tcs`` (EMODT), or nothing for EMODPE.
        secinfo: what is at ``rbx``.
    """

    leaf: str
    kind: str = "new"
    mode64: bool = True
    border: Border = field(init=False)
    secinfo: SecInfo = field(init=False)

    def __post_init__(self) -> None:
        self.border = border = Border(mode64=self.mode64)
        self.rbx, self.rcx = border.base + DATA, border.base + NEW
        self.rdx = border.base + DATA + PAGE_BYTES
        source = border.page(0x5000)  # an SSA page that nobody uses serves as the source
        addr = next(
            section.page(index)
            for section in border.hw.config.sections
            for index in range(40, section.pages)
        )
        leaves, secs = border.hw.leaves, border.built.secs
        leaves.eaug(PageInfoArgs(self.rcx, 0, 0, secs), addr)
        border.built.pages[self.rcx] = addr
        border.tables.map(self.rcx, addr, 7)
        self.rdx = source.linaddr + PAGE_BYTES
        self.target = border.hw.pages[addr]
        self.secinfo = SecInfo(flags=REG | R | W | PENDING)
        if self.leaf == "eacceptcopy":
            self.secinfo = SecInfo(flags=REG | R | X)
        if self.kind != "new":
            self.target.pending = False  # accepted earlier
        match self.kind:
            case "restricted":
                assert leaves.emodpr(SecInfo(flags=REG | R), addr) is Status.SUCCESS
                self.secinfo = SecInfo(flags=REG | R | PR)
            case "trimmed":
                assert leaves.emodt(SecInfo(flags=TRIM), addr) is Status.SUCCESS
                self.secinfo = SecInfo(flags=TRIM | MODIFIED)
            case "tcs":
                border.hw.store.write(self.target, 0, FRESH_TCS.pack())
                assert leaves.emodt(SecInfo(flags=TCS), addr) is Status.SUCCESS
                self.secinfo = SecInfo(flags=TCS | MODIFIED)
            case "readable":
                self.target.rwx = R
                self.secinfo = SecInfo(flags=W | X)
            case _:
                pass
        if self.kind in ("restricted", "trimmed", "tcs"):
            assert leaves.etrack(secs) is Status.SUCCESS
        border.enter()
        self.park()

    def park(self) -> None:
        """Put SECINFO where ``rbx`` says, if that is a page of the enclave."""
        page = self.border.page(DATA)
        if self.rbx // PAGE_BYTES * PAGE_BYTES == self.border.base + DATA:
            self.border.hw.store.write(page, self.rbx % PAGE_BYTES, self.secinfo.pack())

    @property
    def wanted(self) -> EpcPage:
        """The page that holds SECINFO."""
        return self.border.page(DATA)

    @property
    def source(self) -> EpcPage:
        """The page at ``rdx``."""
        return self.border.page(self.rdx - self.border.base)

    def run(self) -> object:
        """Execute the leaf."""
        self.park()
        operands = [self.rbx, self.rcx, self.rdx]
        number = 3 if self.leaf == "eacceptcopy" else 2
        return ended(lambda: getattr(self.border.cpu.enclu, self.leaf)(*operands[:number]))

    def snapshot(self) -> object:
        """Return the machine's and the processor's state."""
        self.park()
        return self.border.snapshot()


def pf(register: str, access: str = "r", *, sgx: bool = True) -> Any:
    return lambda call: UserPf(getattr(call, register), access, sgx)


def row(step: int, name: str, violate: Any, ends: Any, says: str) -> Row:
    return Row(step, name, violate, ends, frozenset({"any"}), says=says)


def mapped(register: str, to: int | None) -> Any:
    def violate(call: Any) -> None:
        linaddr = page_of(getattr(call, register))
        call.border.tables.unmap(linaddr)
        if to is not None:
            call.border.tables.map(linaddr, to, 7)

    return violate


def epcm(page: str, **values: Any) -> Any:
    def violate(call: Any) -> None:
        for name, value in values.items():
            setattr(getattr(call, page), name, value)

    return violate


def not_epc(step: int, register: str, access: str = "r") -> list[Row]:
    """INEPC of an operand."""
    plain = pf(register, access, sgx=False)
    return [
        row(step, f"{register} not mapped", mapped(register, None), plain, f"plain {register}"),
        row(step, f"{register} no EPC", mapped(register, RAM), pf(register, access), register),
    ]


BAD: dict[str, dict[str, Any]] = {
    "invalid": {"valid": False},
    "blocked": {"blocked": True},
    "pending": {"pending": True},
    "modified": {"modified": True},
    "another's": {"secs": None},
    "no REG": {"pt": PageType.TCS},
    "elsewhere": {"linaddr": 0},
    "without rights": {"rwx": 0},
}


def unusable(step: int, register: str, page: str, *, leaving: tuple[str, ...] = ()) -> list[Row]:
    """EOP of an operand: every condition broken."""
    return [
        row(step, f"{register} {why}", epcm(page, **change), pf(register), register)
        for why, change in BAD.items()
        if why not in leaving
    ]


def shift(register: str, by: int) -> Any:
    return lambda call: setattr(call, register, getattr(call, register) + by)


def secinfo(**values: Any) -> Any:
    return lambda call: setattr(call, "secinfo", call.secinfo.replace(**values))


def beyond(register: str) -> Any:
    """Move an operand just behind ELRANGE."""
    return lambda call: setattr(call, register, call.border.base + call.border.enclave.size)


RESERVED = [
    check(5, "SECINFO flag reserved", lambda c: secinfo(flags=c.secinfo.flags | 1 << 6)(c), GP),
    check(5, "SECINFO byte reserved", secinfo(reserved=bytes(55) + b"\1"), GP),
]
ILLEGAL = {
    "new": [REG | R | W, REG | R | W | PENDING | MODIFIED, REG | R | W | MODIFIED, PENDING | R | W],
    "trimmed": [TRIM, TRIM | MODIFIED | PR, TRIM | MODIFIED | PENDING, TRIM | PENDING],
    "tcs": [TCS, TCS | MODIFIED | PR, TCS | MODIFIED | PENDING, PageType.VA << 8 | MODIFIED],
    "restricted": [REG | R, REG | R | PR | MODIFIED, 7 << 8 | PR, PageType.SS_REST << 8 | PR],
}
MISMATCHES: dict[str, dict[str, Any]] = {
    "elsewhere": {"linaddr": 0},
    "other rights": {"rwx": 7},
    "other type": {"pt": PageType.SS_FIRST},
}


def eaccept_rows(kind: str) -> list[Row]:
    changed = kind != "new"
    made = [
        check(1, "RBX misaligned", shift("rbx", 8), GP),
        check(1, "RBX outside", beyond("rbx"), GP),
        *not_epc(2, "rbx"),
        *unusable(3, "rbx", "wanted"),
        *RESERVED,
        check(5, "RCX misaligned", shift("rcx", 8), GP),
        check(5, "RCX outside", beyond("rcx"), GP),
        *not_epc(6, "rcx"),
        *[
            check(7, f"request {flags:#x}", secinfo(flags=int(flags)), GP)
            for flags in ILLEGAL[kind]
        ],
        *[
            row(8, f"target {why}", epcm("target", **BAD[why]), pf("rcx"), "rcx")
            for why in ("invalid", "blocked", "another's")
        ],
        row(8, "target a VA page", epcm("target", pt=PageType.VA), pf("rcx"), "rcx"),
        check(9, "target locked", put(target__lock=-1), GP),
        check(9, "target restricted", put(target__modification_lock=True), GP),
        *[
            check(11, f"target {why}", epcm("target", **change), MISMATCH)
            for why, change in MISMATCHES.items()
        ],
        check(
            11, "other PENDING", lambda c: epcm("target", pending=not c.target.pending)(c), MISMATCH
        ),
        check(
            11,
            "other MODIFIED",
            lambda c: epcm("target", modified=not c.target.modified)(c),
            MISMATCH,
        ),
    ]
    if changed:
        made.append(
            check(
                12,
                "changed after the cycle",
                lambda c: epcm("target", bepoch=c.border.enclave.epoch)(c),
                Status.NOT_TRACKED,
            )
        )
    if kind == "tcs":
        for name, value in {
            "flags": 1,
            "cssa": 1,
            "aep": 1,
            "state": 1,
            "prevssp": 8,
            "ocetssa": 16,
            "reserved": bytes(4007) + b"\1",
        }.items():
            made.append(check(13, f"TCS.{name}", _tcs_content(name, value), GP))
    return made


def _tcs_content(name: str, value: Any) -> Any:
    return lambda c: c.border.hw.store.write(c.target, 0, FRESH_TCS.replace(**{name: value}).pack())


EACCEPTCOPY = [
    check(1, "RBX misaligned", shift("rbx", 8), GP),
    check(1, "RCX misaligned", shift("rcx", 8), GP),
    check(1, "RDX misaligned", shift("rdx", 8), GP),
    *[check(2, f"{name} outside", beyond(name), GP) for name in ("rbx", "rcx", "rdx")],
    *not_epc(3, "rbx"),
    *not_epc(3, "rcx", "w"),
    *not_epc(3, "rdx"),
    *unusable(4, "rbx", "wanted"),
    *RESERVED,
    check(5, "write-only", secinfo(flags=REG | W), GP),
    check(5, "no REG", secinfo(flags=TRIM | R), GP),
    *unusable(6, "rdx", "source"),
    check(7, "target invalid", epcm("target", valid=False), MISMATCH),
    check(7, "target not pending", epcm("target", pending=False), MISMATCH),
    check(7, "target modified", epcm("target", modified=True), MISMATCH),
    check(7, "target blocked", epcm("target", blocked=True), MISMATCH),
    check(7, "target no REG", epcm("target", pt=PageType.SS_REST), MISMATCH),
    check(7, "target another's", epcm("target", secs=None), MISMATCH),
    check(8, "target restricted", put(target__modification_lock=True), GP),
    check(9, "target's rights", epcm("target", rwx=7), MISMATCH),
    check(9, "target elsewhere", epcm("target", linaddr=0), MISMATCH),
]
EMODPE = [
    check(1, "RBX misaligned", shift("rbx", 8), GP),
    check(1, "RCX misaligned", shift("rcx", 8), GP),
    *[check(2, f"{name} outside", beyond(name), GP) for name in ("rbx", "rcx")],
    *not_epc(3, "rbx"),
    *not_epc(3, "rcx"),
    *unusable(4, "rbx", "wanted"),
    *RESERVED,
    *[
        row(6, f"target {why}", epcm("target", **BAD[why]), pf("rcx"), "rcx")
        for why in ("invalid", "blocked", "pending", "modified", "another's", "no REG")
    ],
    check(7, "target restricted", put(target__modification_lock=True), GP),
    row(8, "target elsewhere", epcm("target", linaddr=0), pf("rcx"), "rcx"),
    check(9, "write-only", lambda c: epcm("target", rwx=0)(c), GP),
]
TABLES = {
    **{("eaccept", kind): eaccept_rows(kind) for kind in ILLEGAL},
    ("eacceptcopy", "new"): EACCEPTCOPY,
    ("emodpe", "readable"): EMODPE,
}


def _alone() -> list[Any]:
    return [
        pytest.param(*call, *it.values, id=f"{'-'.join(call)}-{it.id}")
        for call, table in TABLES.items()
        for it in rows(table)
    ]


def _together() -> list[Any]:
    made = []
    for call, table in TABLES.items():
        chosen: dict[tuple[int, object], Row] = {}
        for it in table:
            chosen.setdefault((it.step, it.says), it)
        made += [
            pytest.param(*call, *pair.values, id=f"{'-'.join(call)}-{pair.id}", marks=pair.marks)
            for pair in pairs(list(chosen.values()))
            if not _exclusive(*pair.values)
        ]
    return made


def _exclusive(first: Any, later: Any) -> bool:
    """Rows that cannot be broken together: a row about a page that another one has replaced."""
    moved = {"RBX outside", "rbx outside", "RCX outside", "rcx outside", "rdx outside"}
    return first.name in moved and first.name[:3].lower() in later.name


@pytest.mark.parametrize("call", TABLES, ids="-".join)
def test_an_unbroken_call_succeeds(call: tuple[str, str]) -> None:
    assert Call(*call).run() in (None, Status.SUCCESS)


@pytest.mark.parametrize(("leaf", "kind", "broken"), _alone())
def test_a_leaf_refuses_with_the_manuals_outcome(leaf: str, kind: str, broken: Row) -> None:
    assert_refused(Call(leaf, kind), broken)


@pytest.mark.parametrize(("leaf", "kind", "first", "later"), _together())
def test_of_two_failing_checks_the_earlier_decides(
    leaf: str, kind: str, first: Row, later: Row
) -> None:
    assert_refused(Call(leaf, kind), first, later)


# --- effects ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ILLEGAL)
def test_eaccept_clears_what_was_pending_and_nothing_else(kind: str) -> None:
    call = Call("eaccept", kind)
    target, rwx, pt = call.target, call.target.rwx, call.target.pt
    assert call.run() is Status.SUCCESS
    assert (target.pending, target.modified, target.pr) == (False, False, False)
    assert (target.rwx, target.pt, target.valid) == (rwx, pt, True)
    assert not target.lock and not target.modification_lock
    call.border.hw.check_invariants()


def test_a_page_that_is_merely_new_needs_no_tracking() -> None:
    call = Call("eaccept", "new")
    call.target.bepoch = call.border.enclave.epoch
    assert call.run() is Status.SUCCESS
    store(call.border.cpu, call.rcx, b"mine")
    assert load(call.border.cpu, call.rcx, 4) == b"mine"


def test_the_caller_itself_must_have_left_since_the_change() -> None:
    call = Call("eaccept", "new")
    border = call.border
    assert call.run() is Status.SUCCESS
    leaves = border.hw.leaves
    assert leaves.emodt(SecInfo(flags=TRIM), call.target.addr) is Status.SUCCESS
    call.secinfo = SecInfo(flags=TRIM | MODIFIED)
    assert call.run() is Status.NOT_TRACKED, "no cycle"
    assert leaves.etrack(border.built.secs) is Status.SUCCESS
    assert call.run() is Status.NOT_TRACKED, "the caller is still in the old epoch"
    aex(border.cpu, 0xFD)
    border.cpu.enclu.eresume(border.rbx, AEP)
    assert call.run() is Status.SUCCESS


def test_pr_of_the_request_is_not_compared() -> None:
    call = Call("eaccept", "new")
    call.secinfo = SecInfo(flags=REG | R | W | PENDING | PR)
    assert call.run() is Status.SUCCESS


@pytest.mark.parametrize("limit", ["fs_limit", "gs_limit"])
def test_a_32_bit_tcs_needs_whole_page_limits(limit: str) -> None:
    call = Call("eaccept", "tcs", mode64=False)
    _tcs_content(limit, 0xFFE)(call)
    assert call.run() == GP
    _tcs_content(limit, 0x1FFF)(call)
    assert call.run() is Status.SUCCESS


def test_an_accepted_tcs_can_be_entered() -> None:
    call = Call("eaccept", "tcs")
    assert call.run() is Status.SUCCESS
    border = call.border
    other = border.hw.cpus[2]
    border.prepare(other)
    border.poke(ossa=0x7000)  # the first thread moves out of the way
    other.enclu.eenter(call.rcx, AEP)
    border.hw.check_invariants()


def test_a_page_of_zeros_becomes_a_tcs_that_no_thread_can_enter() -> None:
    call = Call("eaccept", "tcs")
    call.border.hw.store.write(call.target, 0, bytes(PAGE_BYTES))
    assert call.run() is Status.SUCCESS
    other = call.border.hw.cpus[2]
    call.border.prepare(other)
    assert ended(lambda: other.enclu.eenter(call.rcx, AEP)) == GP
    call.border.hw.check_invariants()


def test_eacceptcopy_copies_and_gives_the_rights_it_was_asked_for() -> None:
    call = Call("eacceptcopy")
    store(call.border.cpu, call.rdx, b"\xc3code")
    assert call.run() is Status.SUCCESS
    assert (call.target.rwx, call.target.pending) == (R | X, False)
    assert fetch(call.border.cpu, call.rcx, 5) == b"\xc3code"
    assert load(call.border.cpu, call.rcx, PAGE_BYTES) == load(
        call.border.cpu, call.rdx, PAGE_BYTES
    )
    assert ended(lambda: store(call.border.cpu, call.rcx, b"1")) == UserPf(call.rcx, "w")
    assert not call.target.modification_lock


def test_emodpe_only_adds_rights() -> None:
    call = Call("emodpe", "readable")
    assert call.run() is None
    assert call.target.rwx == R | W | X
    call.secinfo = SecInfo(flags=R)
    assert call.run() is None
    assert call.target.rwx == R | W | X, "nothing is taken away"
    assert not call.target.modification_lock


def test_emodpe_works_with_the_base_lock_held() -> None:
    call = Call("emodpe", "readable")
    call.target.lock = -1
    assert call.run() is None
