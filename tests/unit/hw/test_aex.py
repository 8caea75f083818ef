"""Asynchronous exits and the way back: SSA frames, synthetic state, notification, interrupts.

Hypothesis chooses what the registers hold; what an exit must leave behind and what resuming must
bring back is compared field by field.
"""

from __future__ import annotations

import random
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.inhabited import Inhabited
from tests.support.threads import (
    AEP,
    CODE,
    DATA,
    ENCLU_AT,
    GP,
    NSSA,
    RAM,
    SSA,
    TCS,
    Border,
    UserPf,
    ended,
)

from softsgx.arch import (
    PAGE_BYTES,
    TCS_INACTIVE,
    AttributesFlags,
    ExitType,
    MiscSelect,
    PageType,
    Pfec,
    Status,
    TcsFlags,
    Vector,
    Xfrm,
)
from softsgx.hw import (
    GeneralProtection,
    PageFault,
    PageInfoArgs,
    Registers,
    aex,
    deliver,
    interrupt,
)
from softsgx.runtime import SeededRuntime
from softsgx.trace import Event

GPRS = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
TF, IF, RF, IOPL = 1 << 8, 1 << 9, 1 << 16, 3 << 12
RESTORED = 0x254CD5
INTERRUPT = 0xFD


def entered(**options: object) -> Border:
    scene = Border(**options)  # type: ignore[arg-type]
    scene.enter()
    return scene


# --- what an exit leaves behind -----------------------------------------------------------------


def test_the_synthetic_state_is_the_manuals_and_nothing_of_the_enclaves() -> None:
    scene = entered()
    cpu, regs = scene.cpu, scene.cpu.regs
    for number, name in enumerate(GPRS):
        setattr(regs, name, 0x5EC0 + number)
    regs.rip, regs.rflags = scene.base + CODE + 0x80, 0x0021_0ED7 | RF
    aex(cpu, INTERRUPT)
    assert (regs.rax, regs.rbx, regs.rcx) == (3, scene.rbx, AEP)
    assert {getattr(regs, name) for name in ("rdx", "rsi", "rdi")} == {0}
    assert {getattr(regs, f"r{number}") for number in range(8, 16)} == {0}
    assert (regs.rsp, regs.rbp, regs.rip) == (0x7000, 0x7100, AEP)
    assert regs.rflags == 0x0020_0602, "CF PF AF ZF SF OF RF are clear, the others as they were"
    assert (regs.fs_base, regs.gs_base, regs.xcr0) == (0x1234_5000, 0x1235_5000, 7)
    assert (scene.peek("cssa"), scene.peek("state")) == (1, TCS_INACTIVE)
    assert cpu.inside is None and not cpu.tlb
    scene.hw.check_invariants()


def test_a_32_bit_exit_leaves_the_upper_registers_alone() -> None:
    scene = entered(mode64=False)
    scene.cpu.regs.r8 = scene.cpu.regs.r15 = 8
    aex(scene.cpu, INTERRUPT)
    assert (scene.cpu.regs.r8, scene.cpu.regs.r15) == (8, 8)


def test_the_frame_holds_the_interrupted_registers_and_the_outsides_stack() -> None:
    scene = entered()
    regs = scene.cpu.regs
    values = {name: 0x1_0000_0000 + number for number, name in enumerate(GPRS)}
    for name, value in values.items():
        setattr(regs, name, value)
    regs.rip, regs.fs_base, regs.gs_base = scene.base + 0x20, 0x111000, 0x222000
    scene.poke_gpr(0, aexnotify=0x80)
    aex(scene.cpu, INTERRUPT)
    gpr = scene.gpr(0)
    assert {name: getattr(gpr, name) for name in GPRS} == values
    assert (gpr.rip, gpr.fs_base, gpr.gs_base) == (scene.base + 0x20, 0x111000, 0x222000)
    assert (gpr.ursp, gpr.urbp, gpr.exitinfo, gpr.aexnotify) == (0x7000, 0x7100, 0, 0x80)


@pytest.mark.parametrize(
    ("vector", "fcw", "fsw", "mxcsr", "bv"),
    [
        (INTERRUPT, 0x037F, 0, 0x1FB0, 2),
        (Vector.PF, 0x037F, 0, 0x1FB0, 2),
        (Vector.MF, 0x037E, 0x8081, 0x1FB0, 3),
        (Vector.XM, 0x037F, 0, 0x1F01, 2),
    ],
)
def test_x87_and_sse_are_initial_but_for_what_explains_the_exception(
    vector: int, fcw: int, fsw: int, mxcsr: int, bv: int
) -> None:
    scene = entered()
    scene.cpu.regs.xsave = bytes([0xAB]) * 24 + bytes(8) + bytes([0xAB]) * 480 + b"\3" + bytes(63)
    aex(scene.cpu, vector, Pfec.U)
    state = scene.cpu.regs.xsave
    assert int.from_bytes(state[0:2], "little") == fcw
    assert int.from_bytes(state[2:4], "little") == fsw
    assert int.from_bytes(state[24:28], "little") == mxcsr
    assert not any(state[4:24]) and not any(state[32:416])
    assert int.from_bytes(state[512:520], "little") == bv


def test_an_exit_checks_nothing_and_writes_through_the_pages_it_knows() -> None:
    scene = entered()
    for offset in (SSA, TCS):
        scene.page(offset).blocked = True
        scene.tables.unmap(scene.base + offset)
    scene.cpu.regs.rax = 77
    aex(scene.cpu, INTERRUPT)
    assert scene.gpr(0).rax == 77 and scene.peek("cssa") == 1


def test_without_opt_in_the_trap_flag_is_not_in_the_frame_and_back_outside() -> None:
    for opted_in in (False, True):
        scene = Border(flags=AttributesFlags.DEBUG)
        scene.poke(flags=int(TcsFlags.DBGOPTIN) if opted_in else 0)
        scene.cpu.regs.rflags = 0x202 | TF
        scene.enter()
        aex(scene.cpu, INTERRUPT)
        assert not scene.gpr(0).rflags & TF
        assert scene.cpu.regs.rflags & TF


# --- why it left --------------------------------------------------------------------------------

REPORTED = {0: 3, 1: 3, 3: 6, 5: 3, 6: 3, 16: 3, 17: 3, 19: 3}


@pytest.mark.parametrize("misc", [0, 1, 3])
@pytest.mark.parametrize("vector", [*range(22), 32, 0xFD, 255])
def test_exitinfo_reports_only_the_vectors_of_the_manuals_table(vector: int, misc: int) -> None:
    scene = entered(miscselect=misc, config={"miscselect": MiscSelect(3)})
    scene.poke_gpr(0, exitinfo=0xFFFF_FFFF)
    aex(scene.cpu, vector, Pfec.U, 0x1234_5678)
    kinds = dict(REPORTED)
    if misc & MiscSelect.EXINFO:
        kinds |= {Vector.GP: ExitType.HARDWARE, Vector.PF: ExitType.HARDWARE}
    if misc & MiscSelect.CPINFO:
        kinds[Vector.CP] = ExitType.HARDWARE
    kind = kinds.get(vector)
    wanted = 0 if kind is None else 1 << 31 | kind << 8 | vector
    assert scene.gpr(0).exitinfo == wanted


def test_exinfo_has_the_exact_address_and_cr2_only_the_page() -> None:
    scene = entered(miscselect=1)
    code = int(Pfec.P | Pfec.W | Pfec.U | Pfec.SGX) | 1 << 9
    aex(scene.cpu, Vector.PF, code, 0x7000_0000_1ABC)
    told = scene.exinfo(0)
    assert (told.maddr, told.errcd, told.reserved) == (0x7000_0000_1ABC, 0x8007, 0)
    assert scene.cpu.cr2 == 0x7000_0000_1000


def test_exinfo_of_a_protection_fault_has_no_address() -> None:
    scene = entered(miscselect=1)
    scene.cpu.cr2 = 5
    aex(scene.cpu, Vector.GP, 0, 0x1234)
    assert (scene.exinfo(0).maddr, scene.exinfo(0).errcd) == (0, 0)
    assert scene.cpu.cr2 == 5, "CR2 is for page faults"


def test_a_supervisors_page_fault_is_not_reported() -> None:
    scene = entered(miscselect=1)
    aex(scene.cpu, Vector.PF, Pfec.P, 0x1234)
    assert scene.gpr(0).exitinfo == 0 and scene.exinfo(0).maddr == 0


def test_exinfo_is_left_alone_without_miscselect() -> None:
    scene = entered()
    aex(scene.cpu, Vector.PF, Pfec.U, 0x1234)
    assert scene.exinfo(0).maddr == 0 and scene.cpu.cr2 == 0x1000


def test_a_page_fault_that_goes_to_a_hypervisor_leaves_cr2_alone() -> None:
    scene = entered(miscselect=1)
    scene.cpu.cr2 = 5
    aex(scene.cpu, Vector.PF, Pfec.U, 0x1234, vm_exit=True)
    assert scene.cpu.cr2 == 5 and scene.exinfo(0).maddr == 0x1234


@pytest.mark.parametrize(
    ("vector", "kept"),
    [(INTERRUPT, 0), (Vector.DB, 0), (Vector.BP, 0), (Vector.PF, RF), (Vector.UD, RF)],
)
def test_faults_push_the_resume_flag(vector: int, kept: int) -> None:
    scene = entered()
    aex(scene.cpu, vector, Pfec.U)
    assert scene.gpr(0).rflags & RF == kept


def test_deliver_takes_a_fault_where_the_processor_is() -> None:
    scene = Border(miscselect=1)
    assert not deliver(scene.cpu, PageFault(0x1ABC, Pfec.U))
    assert scene.cpu.cr2 == 0x1ABC, "outside an enclave CR2 is exact"
    scene.enter()
    assert deliver(scene.cpu, PageFault(0x2ABC, Pfec.U))
    assert scene.cpu.cr2 == 0x2000 and scene.exinfo(0).maddr == 0x2ABC
    scene.enter()
    assert deliver(scene.cpu, GeneralProtection())
    assert scene.gpr(1).exitinfo & 0xFF == Vector.GP


# --- and back -----------------------------------------------------------------------------------

u64 = st.integers(0, (1 << 64) - 1)
canonical = st.integers(0, (1 << 48) - 1).map(lambda a: a if a >> 47 == 0 else a | 0xFFFF << 48)
xfrms = st.sampled_from(
    [
        Xfrm.X87 | Xfrm.SSE,
        Xfrm.X87 | Xfrm.SSE | Xfrm.AVX,
        Xfrm.X87 | Xfrm.SSE | Xfrm.PKRU,
        Xfrm(0xE7),
        Xfrm(0x2E7),
    ]
)
OUTER = 0x2E7


@st.composite
def register_files(draw: st.DrawFn) -> Registers:
    regs = Registers()
    for name in GPRS:
        setattr(regs, name, draw(u64))
    regs.fs_base, regs.gs_base = draw(canonical), draw(canonical)
    regs.rip = draw(canonical)
    regs.rflags = draw(st.integers(0, (1 << 22) - 1)) & ~(TF | IF | IOPL | 1 << 17)
    return regs


@settings(max_examples=60, deadline=None)
@given(register_files(), register_files(), xfrms, st.integers(0, OUTER), st.integers(0, 99))
def test_resuming_brings_back_every_register_and_every_component(
    outside: Registers, within: Registers, xfrm: Xfrm, state_bv: int, seed: int
) -> None:
    scene = Border(xfrm=int(xfrm))
    cpu = scene.cpu
    for field in fields(outside):
        if field.name not in ("xcr0", "xsave", "rip"):
            setattr(cpu.regs, field.name, getattr(outside, field.name))
    cpu.regs.xcr0 = OUTER
    cpu.regs.xsave = state = scene.hw.xsave.plan(OUTER).save(_raw(seed, state_bv & OUTER))
    scene.enter()
    for name in (*GPRS, "fs_base", "gs_base", "rip", "rflags"):
        setattr(cpu.regs, name, getattr(within, name))

    aex(cpu, INTERRUPT)
    # Outside sees nothing of the enclave's vector registers, and its own beyond XFRM.
    plan = scene.hw.xsave.plan(int(xfrm))
    assert not any(cpu.regs.xsave[160:416])
    for number, offset, size in scene.hw.xsave.plan(OUTER).components:
        part = cpu.regs.xsave[offset : offset + size]
        assert part == (bytes(size) if xfrm >> number & 1 else state[offset : offset + size])
    assert (cpu.regs.rsp, cpu.regs.rbp) == (outside.rsp, outside.rbp)
    assert (cpu.regs.fs_base, cpu.regs.gs_base) == (outside.fs_base, outside.gs_base)
    assert scene.built.read(SSA + 512, 8) == (state_bv & int(xfrm) & OUTER).to_bytes(8, "little")
    assert plan.size <= PAGE_BYTES

    cpu.enclu.eresume(scene.rbx, AEP)
    for name in (*GPRS, "fs_base", "gs_base", "rip"):
        assert getattr(cpu.regs, name) == getattr(within, name), name
    assert cpu.regs.rflags & RESTORED == within.rflags & RESTORED
    assert cpu.regs.xsave == state and cpu.regs.xcr0 == xfrm
    assert scene.peek("cssa") == 0
    scene.hw.check_invariants()


def _raw(seed: int, state_bv: int) -> bytes:
    """Bytes of an XSAVE area of all of ``OUTER``; reserved bits are zero."""
    raw = bytearray(random.Random(seed).randbytes(2696))
    raw[26:28] = bytes(2)  # of MXCSR
    raw[512:576] = state_bv.to_bytes(8, "little") + bytes(56)
    return bytes(raw)


def test_the_frames_other_bytes_keep_what_they_held() -> None:
    scene = Border(xfrm=int(Xfrm(0x203)))
    scene.hw.store.write(scene.page(SSA), 0, b"\xee" * 3000)
    scene.enter()
    aex(scene.cpu, INTERRUPT)
    area = scene.built.read(SSA, 3000)
    assert area[416:512] == b"\xee" * 96, "XSAVE does not write the software's bytes"
    assert area[520:536] == bytes(16), "AEX clears the header's"
    assert area[536:2688] == b"\xee" * (2688 - 536), "nor what XFRM does not name"
    assert area[2696:3000] == b"\xee" * 304


def test_resuming_takes_interrupt_flag_only_from_the_privileged() -> None:
    for iopl in (0, IOPL):
        scene = entered()
        aex(scene.cpu, INTERRUPT)
        scene.poke_gpr(0, rflags=0x2)
        scene.cpu.regs.rflags = 0x202 | iopl
        scene.cpu.enclu.eresume(scene.rbx, AEP)
        assert bool(scene.cpu.regs.rflags & IF) == (iopl == 0)


def test_frames_are_a_stack() -> None:
    scene = Border()
    for depth in range(NSSA):
        scene.enter()
        assert scene.cpu.regs.rax == depth
        scene.cpu.regs.rdx = 100 + depth
        aex(scene.cpu, INTERRUPT)
    assert scene.run() == GP, "no frame is left"
    for depth in reversed(range(NSSA)):
        scene.cpu.enclu.eresume(scene.rbx, AEP)
        assert scene.cpu.regs.rdx == 100 + depth and scene.peek("cssa") == depth
        scene.cpu.enclu.eexit(AEP)
    assert ended(lambda: scene.cpu.enclu.eresume(scene.rbx, AEP)) == GP


def test_resuming_gives_the_new_aep_and_keeps_the_outsides_stack() -> None:
    scene = entered()
    aex(scene.cpu, INTERRUPT)
    scene.cpu.regs.rsp, scene.cpu.regs.rbp = 0x9000, 0x9100
    scene.cpu.enclu.eresume(scene.rbx, AEP + 16)
    aex(scene.cpu, INTERRUPT)
    assert (scene.cpu.regs.rip, scene.cpu.regs.rsp, scene.cpu.regs.rbp) == (
        AEP + 16,
        0x7000,
        0x7100,
    )


# --- AEX-Notify ---------------------------------------------------------------------------------


def notified(bit: int = 1) -> Border:
    scene = Border(flags=AttributesFlags.AEXNOTIFY)
    scene.poke(flags=int(TcsFlags.AEXNOTIFY))
    scene.enter()
    scene.poke_gpr(0, aexnotify=bit)
    scene.cpu.regs.rip, scene.cpu.regs.rdx = scene.base + 0x99, 42
    aex(scene.cpu, INTERRUPT)
    scene.cpu.regs.rip, scene.cpu.regs.rsp = ENCLU_AT, 0x8000
    return scene


def test_a_notified_resume_enters_afresh_on_the_next_frame() -> None:
    scene = notified()
    regs = scene.cpu.regs
    regs.rdx = 7
    scene.cpu.enclu.eresume(scene.rbx, AEP)
    assert (regs.rip, regs.rax, regs.rcx) == (scene.base + CODE + 0x10, 1, ENCLU_AT + 3)
    assert regs.rdx == 7, "nothing is restored"
    assert scene.peek("cssa") == 1 and scene.gpr(1).ursp == 0x8000
    # The handler gives the frame back, and returns by itself to where the exit was.
    scene.cpu.enclu.edeccssa()
    assert scene.peek("cssa") == 0
    regs.rdx = 8
    aex(scene.cpu, INTERRUPT)
    assert scene.gpr(0).rdx == 8 and scene.peek("cssa") == 1
    scene.hw.check_invariants()


@pytest.mark.parametrize("bit", [0, 2])
def test_a_frame_that_did_not_ask_is_resumed_as_ever(bit: int) -> None:
    scene = notified(bit)
    scene.cpu.enclu.eresume(scene.rbx, AEP)
    assert (scene.cpu.regs.rip, scene.cpu.regs.rdx) == (scene.base + 0x99, 42)
    assert scene.peek("cssa") == 0


def test_a_notified_resume_needs_one_more_frame_and_checks_it() -> None:
    scene = notified()
    scene.poke(nssa=1)
    before = scene.snapshot()
    assert ended(lambda: scene.cpu.enclu.eresume(scene.rbx, AEP)) == GP
    assert scene.snapshot() == before
    scene.poke(nssa=2)
    scene.page(SSA + PAGE_BYTES).blocked = True
    fault = UserPf(scene.base + SSA + PAGE_BYTES, "w")
    assert ended(lambda: scene.cpu.enclu.eresume(scene.rbx, AEP)) == fault


def test_edeccssa_refuses_with_the_manuals_outcome() -> None:
    scene = entered()
    assert ended(scene.cpu.enclu.edeccssa) == GP, "CSSA is 0"
    aex(scene.cpu, INTERRUPT)
    scene.enter()
    for name, page, value, wanted in (
        ("lock", scene.tcs, -1, GP),
        ("pending", scene.page(SSA), True, UserPf(scene.base + SSA, "w")),
        ("blocked", scene.page(SSA), True, UserPf(scene.base + SSA, "w")),
    ):
        usual = getattr(page, name)
        setattr(page, name, value)
        before = scene.snapshot()
        assert ended(scene.cpu.enclu.edeccssa) == wanted
        assert scene.snapshot() == before
        setattr(page, name, usual)
    scene.cpu.enclu.edeccssa()
    assert scene.peek("cssa") == 0


# --- interrupts and races -----------------------------------------------------------------------


def test_an_interrupt_outside_is_nothing_and_inside_an_exit() -> None:
    scene = Border()
    assert not interrupt(scene.cpu)
    scene.enter()
    assert interrupt(scene.cpu) and scene.cpu.inside is None
    assert not interrupt(scene.cpu)


def race(seed: int, meanwhile: str) -> tuple[Border, object, list[object]]:
    """Enter on one task while another does something to the enclave; return how both ended."""
    runtime = SeededRuntime(seed)
    results: list[object] = []
    entry: list[object] = []

    def main() -> Border:
        scene = Border(runtime=runtime)
        page, leaves = scene.page(SSA), scene.hw.leaves
        va = next(
            address
            for address in range(scene.built.secs + 40 * PAGE_BYTES, 1 << 40, PAGE_BYTES)
            if address not in scene.built.pages.values()
        )
        leaves.epa(int(PageType.VA), va)

        def other() -> None:
            if meanwhile == "interrupt":
                results.append(interrupt(scene.cpu))
            elif meanwhile == "remove":
                results.append(leaves.eremove(page.addr))
            else:
                leaves.eblock(page.addr)
                leaves.etrack(scene.built.secs)
                info = PageInfoArgs(0, bytearray(PAGE_BYTES), bytearray(128))
                results.append(leaves.ewb(info, page.addr, va))

        tasks = [
            runtime.spawn(lambda: entry.append(scene.run()), "entry"),
            runtime.spawn(other, "other"),
        ]
        for task in tasks:
            task.join()
        return scene

    return runtime.run(main), entry[0], results


def test_an_interrupt_waits_for_the_end_of_an_entry_in_flight() -> None:
    seen = set()
    for seed in range(24):
        scene, entry, (left,) = race(seed, "interrupt")
        assert entry is None
        assert (scene.cpu.inside is None) == left
        scene.hw.check_invariants()
        seen.add(left)
    assert seen == {True, False}


def test_a_page_that_an_entry_has_found_cannot_be_evicted_under_it() -> None:
    seen = set()
    for seed in range(24):
        scene, entry, (status,) = race(seed, "evict")
        if entry is None:
            assert status is Status.NOT_TRACKED and scene.page(SSA).valid
        else:
            # It came too late for the page, and has left no trace for the tracking.
            assert entry == UserPf(scene.base + SSA, "w")
            assert status in (Status.SUCCESS, Status.NOT_TRACKED)
        scene.hw.check_invariants()
        seen.add((entry is None, status))
    assert {(True, Status.NOT_TRACKED), (False, Status.SUCCESS)} <= seen


def test_a_page_that_an_entry_has_found_cannot_be_removed_under_it() -> None:
    seen = set()
    for seed in range(24):
        scene, entry, (status,) = race(seed, "remove")
        if entry is None:
            assert status is Status.ENCLAVE_ACT and scene.page(SSA).valid
        else:
            assert entry == UserPf(scene.base + SSA, "w") and status is Status.SUCCESS
        scene.hw.check_invariants()
        seen.add(status)
    assert seen == {Status.ENCLAVE_ACT, Status.SUCCESS}


# --- events -------------------------------------------------------------------------------------


def test_a_listener_hears_entries_exits_and_refusals() -> None:
    events: list[Event] = []
    scene = Border(tracer=events.append)
    events.clear()
    scene.enter()
    aex(scene.cpu, Vector.PF, Pfec.U, scene.base + DATA)
    scene.cpu.enclu.eresume(scene.rbx, AEP)
    interrupt(scene.cpu)
    assert ended(lambda: scene.cpu.enclu.eenter(RAM, AEP)) == UserPf(RAM)
    eid, at = scene.enclave.eid, scene.rbx
    assert [event.line() for event in events] == [
        f"sgx:eenter: cpu=1 page={at:#x} eid={eid} result=SGX_SUCCESS",
        f"sgx:aex: cpu=1 eid={eid} tcs={at:#x} vector=0xe",
        f"sgx:eresume: cpu=1 page={at:#x} eid={eid} result=SGX_SUCCESS",
        f"sgx:aex: cpu=1 eid={eid} tcs={at:#x} vector=-1",
        f"sgx:eenter: cpu=1 page={RAM:#x} eid=0 result=#PF({RAM:#x}, 0x8005)",
    ]


@pytest.mark.parametrize("readable", [False, True])
def test_after_a_machine_check_inside_the_enclave_is_entered_no_more_and_others_are(
    readable: bool,
) -> None:
    broken = Inhabited(2, readable=readable)
    other = broken.another()
    broken.enter(0)
    aex(broken.cpu(0), Vector.MC)
    for enter in (broken.enter, broken.resume):
        for thread in (0, 1):
            with pytest.raises(PageFault) as caught:
                enter(0, thread)
            assert caught.value.code & Pfec.SGX
    other.enter(0)
