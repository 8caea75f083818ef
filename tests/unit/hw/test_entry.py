"""EENTER, ERESUME and EEXIT: each check of the manual's lists, their order, and their effects.

Every row is broken alone and together with every later row that ends differently; a refused entry
has changed nothing, and has not left the processor counted in.
"""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.checks import assert_refused
from tests.support.scenes import Row, check, pairs, put, rows
from tests.support.threads import (
    AEP,
    CET_PAGE,
    CODE,
    DATA,
    ENCLU_AT,
    FS,
    GP,
    GS,
    NSSA,
    RAM,
    SSA,
    TCS,
    Border,
    UserPf,
)

from softsgx.arch import (
    PAGE_BYTES,
    TCS_ACTIVE,
    TCS_INACTIVE,
    AttributesFlags,
    PageType,
    TcsFlags,
    Xfrm,
)
from softsgx.hw import GeneralProtection, Segment, aex
from softsgx.hw.access import load

NONCANONICAL = 1 << 47
TF = 1 << 8


class Broken(Border):
    """A border with its SSA frame named, for rows about it."""

    @property
    def index(self) -> int:
        """The frame that the leaf looks at."""
        return 0

    @property
    def xsave_page(self) -> int:
        """Its first page."""
        return self.base + self.frame(self.index)

    @property
    def gpr_address(self) -> int:
        """Its GPRSGX."""
        return self.base + self.frame(self.index + 1) - 184


def _tcs(**fields: int) -> Any:
    return lambda scene: scene.poke(**fields)


def _epcm(where: str, **fields: Any) -> Any:
    """Change the EPCM entry of the page at an address that the scene names."""

    def violate(scene: Any) -> None:
        page = scene.page(getattr(scene, where) // PAGE_BYTES * PAGE_BYTES - scene.base)
        for name, value in fields.items():
            setattr(page, name, value)

    return violate


def _mapped(where: str, to: int | None, rights: int = 7) -> Any:
    """Let paging map an address to other memory, or with fewer rights, or not at all."""

    def violate(scene: Any) -> None:
        linaddr = getattr(scene, where) // PAGE_BYTES * PAGE_BYTES
        entry = scene.tables.entry(linaddr)
        scene.tables.unmap(linaddr)
        if to is not None:
            scene.tables.map(linaddr, to or entry[0], rights)

    return violate


def _secs_of_another(where: str) -> Any:
    def violate(scene: Any) -> None:
        page = scene.page(getattr(scene, where) // PAGE_BYTES * PAGE_BYTES - scene.base)
        page.secs = scene.page(DATA)  # any other page: the identity is compared

    return violate


def _fault(where: str, access: str, *, sgx: bool = True) -> Any:
    return lambda scene: UserPf(getattr(scene, where), access, sgx)


def _faults(step: int, where: str, pt: PageType, access: str, *, ssa: bool) -> list[Row]:
    """Rows of one page that must be what the leaf wants: of some type, accessible."""
    violations: list[tuple[str, Any]] = [
        ("is ordinary memory", _mapped(where, RAM)),
        ("is not valid", _epcm(where, valid=False)),
        ("is blocked", _epcm(where, blocked=True)),
        ("is pending", _epcm(where, pending=True)),
        ("is modified", _epcm(where, modified=True)),
        ("is elsewhere in the enclave", _epcm(where, linaddr=0)),
        ("is of another type", _epcm(where, pt=pt)),
    ]
    if ssa:
        violations += [
            ("is another enclave's", _secs_of_another(where)),
            ("cannot be written", _epcm(where, rwx=1)),
        ]
    made = [
        _row(step, f"{where} {name}", violate, _fault(where, access), f"pf {where}")
        for name, violate in violations
    ]
    if ssa:
        unreadable = _epcm(where, rwx=2)
        made.append(
            _row(step, f"{where} cannot be read", unreadable, _fault(where, "r"), f"pf {where}")
        )
    # Whatever the refusals above report, the leaf stores in each of these pages.
    plain = _fault(where, "w", sgx=False)
    made.append(_row(step, f"{where} is read-only to paging", _mapped(where, 0, 5), plain, "plain"))
    made.append(_row(step, f"{where} is not mapped", _mapped(where, None), plain, "plain"))
    return made


def _row(step: int, name: str, violate: Any, ends: Any, says: str) -> Row:
    return Row(step, name, violate, ends, frozenset({"any"}), says=says)


_BY_PAGING = ("mapped", "ordinary", "paging")

COMMON = [
    check(2, "TCS misaligned", lambda s: put(rbx=s.rbx + 8)(s), GP),
    *[
        row
        for row in _faults(3, "rbx", PageType.REG, "r", ssa=False)
        if any(word in row.name for word in _BY_PAGING)
    ],
    check(4, "AEP not canonical", put(rcx=NONCANONICAL), GP),
    check(5, "another leaf holds the TCS", put(tcs__lock=-1), GP),
    *[
        row
        for row in _faults(6, "rbx", PageType.REG, "r", ssa=False)
        if not any(word in row.name for word in _BY_PAGING)
    ],
    check(7, "OSSA misaligned", _tcs(ossa=SSA + 8), GP),
    check(7, "OFSBASGX misaligned", _tcs(ofs_base=8), GP),
    check(7, "OGSBASGX misaligned", _tcs(ogs_base=8), GP),
    check(8, "TCS.FLAGS reserved", _tcs(flags=4), GP),
    check(9, "enclave not initialised", lambda s: put(flags=s.enclave.flags & ~1)(s.enclave), GP),
    check(10, "32-bit enclave", lambda s: put(flags=s.enclave.flags & ~4)(s.enclave), GP),
    check(11, "CR4.OSFXSR clear", put(cpu__cr4_osfxsr=False), GP),
    check(12, "no XSAVE for XFRM", put(cpu__cr4_osxsave=False, enclave__xfrm=7), GP),
    check(12, "XFRM beyond XCR0", put(cpu__regs__xcr0=3, enclave__xfrm=7), GP),
    check(13, "TCS notifies, enclave does not", _tcs(flags=int(TcsFlags.AEXNOTIFY)), GP),
    check(
        13,
        "enclave notifies, TCS does not",
        lambda s: put(flags=s.enclave.flags | AttributesFlags.AEXNOTIFY)(s.enclave),
        GP,
    ),
    *_faults(15, "xsave_page", PageType.TCS, "w", ssa=True),
    *_faults(16, "gpr_address", PageType.TCS, "w", ssa=True),
    check(19, "TCS active", _tcs(state=TCS_ACTIVE), GP),
]
EENTER = [
    *COMMON,
    check(14, "no free frame", _tcs(nssa=0), GP),
    check(17, "entry point not canonical", _tcs(oentry=NONCANONICAL), GP),
    check(18, "FS base not canonical", _tcs(ofs_base=NONCANONICAL), GP),
    check(18, "GS base not canonical", _tcs(ogs_base=NONCANONICAL), GP),
]
ERESUME = [
    *COMMON,
    check(14, "nothing to resume", _tcs(cssa=0), GP),
    check(17, "RIP not canonical", lambda s: s.poke_gpr(0, rip=NONCANONICAL), GP),
    check(18, "FS base not canonical", lambda s: s.poke_gpr(0, fs_base=NONCANONICAL), GP),
    check(18, "GS base not canonical", lambda s: s.poke_gpr(0, gs_base=NONCANONICAL), GP),
    check(
        21,
        "XSTATE_BV beyond XFRM",
        lambda s: s.hw.store.write(s.page(s.frame(0)), 512, bytes([4])),
        GP,
    ),
    check(
        21, "XSAVE header not zero", lambda s: s.hw.store.write(s.page(s.frame(0)), 535, b"\1"), GP
    ),
    check(21, "MXCSR illegal", lambda s: s.hw.store.write(s.page(s.frame(0)), 26, b"\1"), GP),
]


def _tables(leaf: str) -> list[Row]:
    return EENTER if leaf == "eenter" else ERESUME


def _alone() -> list[Any]:
    return [
        pytest.param(leaf, *row.values, id=f"{leaf}-{row.id}")
        for leaf in ("eenter", "eresume")
        for row in rows(_tables(leaf))
    ]


def _together() -> list[Any]:
    return [
        pytest.param(leaf, *pair.values, id=f"{leaf}-{pair.id}", marks=pair.marks)
        for leaf in ("eenter", "eresume")
        for pair in pairs(_representatives(_tables(leaf)))
    ]


def _representatives(table: list[Row]) -> list[Row]:
    """One row of each step and outcome: the others of a step are alternatives."""
    chosen: dict[tuple[int, object], Row] = {}
    for row in table:
        chosen.setdefault((row.step, row.says), row)
    return list(chosen.values())


@pytest.mark.parametrize(("leaf", "row"), _alone())
def test_entry_refuses_with_the_manuals_outcome(leaf: str, row: Row) -> None:
    assert_refused(Broken(leaf, frame_pages=2), row)


@pytest.mark.parametrize(("leaf", "first", "later"), _together())
def test_of_two_failing_checks_the_earlier_decides(leaf: str, first: Row, later: Row) -> None:
    assert_refused(Broken(leaf, frame_pages=2), first, later)


@pytest.mark.parametrize("leaf", ["eenter", "eresume"])
def test_an_unbroken_entry_succeeds(leaf: str) -> None:
    scene = Broken(leaf, frame_pages=2)
    assert scene.run() is None
    scene.hw.check_invariants()


def test_every_page_of_a_long_xsave_area_is_checked_and_the_first_bad_one_faults() -> None:
    xfrm = int(Xfrm.X87 | Xfrm.SSE | Xfrm.AVX | Xfrm.TILECFG | Xfrm.TILEDATA)
    pages = 3  # 11008 bytes
    for bad in range(pages):
        scene = Border(frame_pages=4, xfrm=xfrm, config={"xfrm": xfrm})
        for later in range(bad, pages):
            scene.page(SSA + later * PAGE_BYTES).blocked = True
        assert scene.run() == UserPf(scene.base + SSA + bad * PAGE_BYTES, "w")
    scene = Border(frame_pages=4, xfrm=xfrm, config={"xfrm": xfrm})
    # The last page holds GPRSGX; a page that neither reaches is nobody's business.
    scene.page(SSA + 3 * PAGE_BYTES).blocked = True
    assert scene.run() == UserPf(scene.base + SSA + 4 * PAGE_BYTES - 184, "w")


# --- 32-bit -------------------------------------------------------------------------------------

FLAT32 = [
    check(1, "DS unusable", put(cpu__ds=Segment(usable=False)), GP),
    check(1, "DS expands down", put(cpu__ds=Segment(expand_down=True)), GP),
    check(1, "DS base", put(cpu__ds=Segment(base=PAGE_BYTES)), GP),
    check(1, "CS base", put(cpu__cs=Segment(base=PAGE_BYTES)), GP),
    check(1, "ES base", put(cpu__es=Segment(base=PAGE_BYTES)), GP),
    check(1, "SS base", put(cpu__ss=Segment(base=PAGE_BYTES)), GP),
    check(1, "SS is 16-bit", put(cpu__ss=Segment(big=False)), GP),
    _row(6, "TCS is blocked", _epcm("rbx", blocked=True), _fault("rbx", "r"), "pf"),
    check(16, "GPRSGX beyond DS", put(cpu__ds=Segment(limit=0x1000_0000 + SSA + 0xF48 + 182)), GP),
    check(17, "entry point beyond CS", put(cpu__cs=Segment(limit=0x1000)), GP),
    check(18, "FS beyond DS", _tcs(fs_limit=0xFFFF_FFFF - 0x1000_2000 - 0x1000), GP),
]


@pytest.mark.parametrize("row", rows(FLAT32))
def test_a_32_bit_entry_needs_flat_segments(row: Row) -> None:
    scene = Broken(mode64=False)
    if "FS beyond" in row.name:
        scene.cpu.ds = Segment(limit=0x7FFF_FFFF)
    assert_refused(scene, row)


@pytest.mark.parametrize(("first", "later"), pairs(FLAT32))
def test_32_bit_segments_come_before_the_tcs(first: Row, later: Row) -> None:
    assert_refused(Broken(mode64=False), first, later)


@pytest.mark.parametrize(
    "segments", [{"es": Segment(base=5, usable=False)}, {"ss": Segment(base=5, usable=False)}]
)
def test_unusable_es_and_ss_are_not_looked_at(segments: dict[str, Segment]) -> None:
    scene = Border(mode64=False)
    for name, segment in segments.items():
        setattr(scene.cpu, name, segment)
    assert scene.run() is None


def test_a_32_bit_thread_gets_its_segment_limits_and_a_64_bit_one_does_not() -> None:
    for mode64, limit in ((False, 0xFFF), (True, 0xFFFF_FFFF)):
        scene = Border(mode64=mode64)
        before = scene.cpu.fs
        scene.enter()
        assert (scene.cpu.fs.limit, scene.cpu.gs.limit) == (limit, limit)
        assert scene.cpu.fs.selector == scene.cpu.gs.selector == 0x0B
        scene.cpu.enclu.eexit(AEP)
        assert scene.cpu.fs == scene.cpu.gs == before


def test_a_segment_that_wraps_around_needs_all_of_ds() -> None:
    for limit, result in ((0xFFFF_FFFF, None), (0xFFFF_FFFE, GP)):
        scene = Border(mode64=False)
        scene.poke(fs_limit=0xFFFF_FFFF)
        scene.cpu.ds = Segment(limit=limit)
        assert scene.run() == result


# --- effects ------------------------------------------------------------------------------------


def test_eenter_starts_at_the_entry_point_with_the_manuals_registers() -> None:
    scene = Border()
    cpu, regs = scene.cpu, scene.cpu.regs
    regs.rdx, regs.rsi, regs.rdi, regs.r8, regs.r15 = 1, 2, 3, 4, 5
    regs.rflags = 0x202 | TF
    assert scene.run() is None
    assert regs.rip == scene.base + CODE + 0x10
    assert (regs.rax, regs.rcx) == (0, ENCLU_AT + 3)
    assert (regs.rsp, regs.rbp) == (0x7000, 0x7100), "EENTER keeps the stack"
    assert (regs.rdx, regs.rsi, regs.rdi, regs.r8, regs.r15) == (1, 2, 3, 4, 5)
    assert (regs.fs_base, regs.gs_base) == (scene.base + FS, scene.base + GS)
    assert regs.xcr0 == 3, "XCR0 becomes XFRM"
    assert regs.rflags == 0x202, "without opt-in TF is cleared"
    assert (scene.peek("state"), scene.peek("aep"), scene.peek("cssa")) == (TCS_ACTIVE, AEP, 0)
    assert (scene.gpr(0).ursp, scene.gpr(0).urbp) == (0x7000, 0x7100)
    assert cpu.inside is not None and cpu.inside.secs is scene.hw.pages[scene.built.secs]
    scene.hw.check_invariants()


def test_eenter_uses_the_frame_that_cssa_names_and_tells_it_in_rax() -> None:
    scene = Border()
    scene.poke(cssa=NSSA - 1)
    scene.enter()
    assert scene.cpu.regs.rax == NSSA - 1
    assert scene.gpr(NSSA - 1).ursp == 0x7000 and scene.gpr(0).ursp == 0


def test_without_osxsave_xcr0_is_left_alone() -> None:
    scene = Border()
    scene.cpu.cr4_osxsave, scene.cpu.regs.xcr0 = False, 0x77
    scene.enter()
    assert scene.cpu.regs.xcr0 == 0x77
    scene.cpu.enclu.eexit(AEP)
    assert scene.cpu.regs.xcr0 == 0x77


def test_a_tcs_serves_one_processor_at_a_time_and_the_next_after_its_exit() -> None:
    scene = Border()
    other = scene.hw.cpus[2]
    scene.prepare(other)
    scene.enter()
    with pytest.raises(GeneralProtection):
        other.enclu.eenter(scene.rbx, AEP)
    scene.hw.check_invariants()
    scene.cpu.enclu.eexit(AEP)
    other.enclu.eenter(scene.rbx, AEP)
    scene.hw.check_invariants()


def test_the_debuggers_opt_in_leaves_the_trap_flag_alone_both_ways() -> None:
    scene = Border(flags=AttributesFlags.DEBUG)
    scene.poke(flags=int(TcsFlags.DBGOPTIN))
    scene.cpu.regs.rflags = 0x202 | TF
    scene.enter()
    assert scene.cpu.regs.rflags & TF
    scene.cpu.regs.rflags &= ~TF
    scene.cpu.enclu.eexit(AEP)
    assert not scene.cpu.regs.rflags & TF


def test_without_opt_in_an_exit_gives_the_trap_flag_back() -> None:
    scene = Border()
    scene.cpu.regs.rflags = 0x202 | TF
    scene.enter()
    scene.cpu.enclu.eexit(AEP)
    assert scene.cpu.regs.rflags == 0x202 | TF


def test_dbgoptin_excuses_a_tcs_from_notification() -> None:
    scene = Border()
    scene.poke(flags=int(TcsFlags.DBGOPTIN | TcsFlags.AEXNOTIFY))
    assert scene.run() is None


def test_entry_and_exit_flush_the_tlb() -> None:
    scene = Border()
    cpu = scene.cpu
    load(cpu, RAM, 1)
    scene.enter()
    assert not cpu.tlb
    load(cpu, scene.base + DATA, 1)
    assert cpu.tlb
    cpu.enclu.eexit(AEP)
    assert not cpu.tlb


# --- EEXIT --------------------------------------------------------------------------------------


def test_eexit_goes_to_rbx_and_scrubs_nothing() -> None:
    scene = Border()
    scene.enter()
    regs = scene.cpu.regs
    regs.rax, regs.rdx, regs.rsp, regs.rbp, regs.r9 = 10, 11, 12, 13, 14
    scene.cpu.enclu.eexit(0x40_5000)
    assert (regs.rip, regs.rcx) == (0x40_5000, AEP)
    assert (regs.rax, regs.rdx, regs.rsp, regs.rbp, regs.r9) == (10, 11, 12, 13, 14)
    assert (regs.fs_base, regs.gs_base, regs.xcr0) == (0x1234_5000, 0x1235_5000, 7)
    assert (scene.peek("state"), scene.peek("cssa")) == (TCS_INACTIVE, 0)
    assert scene.cpu.inside is None
    scene.hw.check_invariants()


def test_eexit_into_the_enclave_succeeds_and_the_next_access_sees_ones() -> None:
    scene = Border()
    scene.enter()
    scene.cpu.enclu.eexit(scene.base + CODE)
    assert load(scene.cpu, scene.base + CODE, 4) == b"\xff" * 4


@pytest.mark.parametrize(("mode64", "target"), [(True, NONCANONICAL), (False, 0x5000)])
def test_eexit_refuses_a_target_that_cannot_be_fetched(mode64: bool, target: int) -> None:
    scene = Border(mode64=mode64)
    scene.enter()
    scene.cpu.cs = Segment(limit=0x4FFF)
    before = scene.snapshot()
    with pytest.raises(GeneralProtection):
        scene.cpu.enclu.eexit(target)
    assert scene.snapshot() == before


@pytest.mark.parametrize("leaf", ["eenter", "eresume"])
def test_a_tcs_cannot_be_entered_twice(leaf: str) -> None:
    scene = Border()
    scene.enter()
    scene.poke(state=TCS_INACTIVE, cssa=1)  # as if it were another thread's
    before = scene.snapshot()
    with pytest.raises(GeneralProtection):
        getattr(scene.cpu.enclu, leaf)(scene.rbx, AEP)
    assert scene.snapshot() == before


@pytest.mark.parametrize("leaf", ["eexit", "eaccept", "emodpe", "eacceptcopy", "edeccssa"])
def test_leaves_of_the_inside_are_refused_outside(leaf: str) -> None:
    scene = Border()
    operands = {"eexit": 1, "edeccssa": 0, "eacceptcopy": 3}.get(leaf, 2)
    before = scene.snapshot()
    with pytest.raises(GeneralProtection):
        getattr(scene.cpu.enclu, leaf)(*[scene.base] * operands)
    assert scene.snapshot() == before


# --- CET ----------------------------------------------------------------------------------------

_BAD_SLOTS: dict[str, dict[str, Any]] = {
    "not valid": {"valid": False},
    "blocked": {"blocked": True},
    "pending": {"pending": True},
    "modified": {"modified": True},
    "elsewhere": {"linaddr": 0},
    "of another type": {"pt": PageType.REG},
    "of the first type": {"pt": PageType.SS_FIRST},
    "read-only": {"rwx": 1},
}
CET = [
    check(19, "TCS active", _tcs(state=TCS_ACTIVE), GP),
    check(20, "CR4.CET clear", put(cpu__cr4_cet=False), GP),
    check(20, "OCETSSA misaligned", _tcs(ocetssa=CET_PAGE + 8), GP),
    *[
        _row(21, f"slot {why}", _epcm("slot_page", **change), _fault("slot_page", "w"), "pf")
        for why, change in _BAD_SLOTS.items()
    ],
]


class BrokenCet(Broken):
    """The same with a CET save slot."""

    @property
    def slot_page(self) -> int:
        """Where the slot of the leaf's frame is."""
        return self.base + CET_PAGE


@pytest.mark.parametrize("row", rows(CET))
def test_an_enclave_with_cet_needs_its_save_slot(row: Row) -> None:
    assert_refused(BrokenCet(cet=True), row)


@pytest.mark.parametrize(("first", "later"), pairs(CET))
def test_cet_comes_last(first: Row, later: Row) -> None:
    assert_refused(BrokenCet(cet=True), first, later)


def test_cet_state_is_the_enclaves_inside_and_the_outsides_again_after() -> None:
    scene = BrokenCet(cet=True)
    cpu = scene.cpu
    scene.poke(prevssp=0x9000)
    cpu.ssp, cpu.u_cet = 0x1000, 1
    scene.enter()
    assert (cpu.ssp, cpu.u_cet) == (0x9000, 0x5 | 1 << 11), "the entry point needs an ENDBRANCH"
    cpu.ssp, cpu.u_cet = 0x8FF0, 0x5
    aex(cpu, 0xFD)
    assert (cpu.ssp, cpu.u_cet) == (0x1000, 1)
    assert scene.built.read(CET_PAGE, 16) == b"".join(
        value.to_bytes(8, "little") for value in (0x8FF0, 0x5)
    )
    cpu.enclu.eresume(scene.rbx, AEP)
    assert (cpu.ssp, cpu.u_cet) == (0x8FF0, 0x5)
    cpu.enclu.eexit(AEP)
    assert (cpu.ssp, cpu.u_cet) == (0x1000, 1)
    assert scene.peek("prevssp") == 0x8FF0
    assert scene.page(TCS).valid


def test_an_enclave_without_cet_runs_without_it_and_the_outside_has_its_own_back() -> None:
    scene = Border()
    cpu = scene.cpu
    cpu.cr4_cet, cpu.u_cet, cpu.ssp = True, 0x5, 0x1000
    scene.enter()
    assert cpu.u_cet == 0
    aex(cpu, 0xFD)
    assert (cpu.u_cet, cpu.ssp) == (0x5, 0x1000), "an interrupted jump has had its ENDBRANCH"
    cpu.enclu.eresume(scene.rbx, AEP)
    assert cpu.u_cet == 0
    cpu.enclu.eexit(AEP)
    assert (cpu.u_cet, cpu.ssp) == (0x5 | 1 << 11, 0x1000), "EEXIT is an indirect jump"
