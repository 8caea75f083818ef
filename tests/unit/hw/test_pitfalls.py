"""Twenty ways to get SGX paging wrong, each with the test that fails for whoever does.

Goal: the mistakes that other models made, or that the manual's prose invites.  Method: one or a
few tests for each pitfall, in order, mostly with real entries and accesses.  The second one, which
flag a code is in, is ``test_paging_flags``; the last, not to trust an older model, is all of them.
"""

from __future__ import annotations

import hashlib
from functools import partial

import pytest
from tests.support.hw import Built, build_enclave, free_pages, make_machine, reg
from tests.support.inhabited import AEP, DATA, SECINFO_PAGE, Inhabited
from tests.support.paging import (
    BASE,
    GP,
    Bench,
    Pf,
    PlainPf,
    outcome,
    pattern,
)

from softsgx.arch import (
    PAGE_BYTES,
    Encls,
    GprSgx,
    MacHeader,
    PageType,
    Pcmd,
    Pfec,
    RdInfo,
    SecInfo,
    Status,
    Tcs,
)
from softsgx.hw import PageFault, PageInfoArgs
from softsgx.hw.leaves.aex import deliver
from softsgx.hw.secrets import PagingKey

P, Q = DATA[0], DATA[1]
OK, MAC_FAIL = Status.SUCCESS, Status.MAC_COMPARE_FAIL


@pytest.fixture
def e() -> Inhabited:
    return Inhabited()


# --- 1: EWB's code 12 --------------------------------------------------------------------------


def test_01_code_12_has_evicted_the_page_and_taken_the_slot(e: Inhabited) -> None:
    e.evict(P)
    slot = e.blobs[P].slot
    assert (e.block(Q), e.track()) == (OK, OK)
    assert e.ewb(Q, slot) == Status.VA_SLOT_OCCUPIED
    assert not e.page(Q).valid and e.blobs[Q].linaddr == e.base + Q
    assert e.ewb(Q, slot) == Pf(e.built.epc(Q)), "there is nothing to retry"
    assert (e.eldu(P), e.eldu(Q)) == (MAC_FAIL, OK)


def test_01_errors_write_nothing_success_writes_linaddr_too(e: Inhabited) -> None:
    info = PageInfoArgs(0, bytearray(b"x" * PAGE_BYTES), bytearray(b"y" * 128))
    ewb = partial(e.leaves.ewb, info, e.built.epc(P), e.slot())
    for step in (lambda: None, partial(e.block, P)):
        step()
        assert outcome(ewb) in (Status.PAGE_NOT_BLOCKED, Status.NOT_TRACKED)
        assert info == PageInfoArgs(0, bytearray(b"x" * PAGE_BYTES), bytearray(b"y" * 128))
    assert e.track() == OK
    assert outcome(ewb) == OK
    assert info.linaddr == e.base + P


# --- 3, 4, 5: TLB, order, two kinds of proof ---------------------------------------------------


def test_03_eblock_flushes_no_tlb_and_etrack_interrupts_no_processor(e: Inhabited) -> None:
    for thread in (0, 1):
        e.enter(thread)
        e.write(thread, P, bytes([thread] * 8))
        assert e.read(thread, P) == bytes([thread] * 8)
    assert (e.block(P), e.track()) == (OK, OK)
    e.write(0, P, b"still ok")
    assert e.read(1, P) == b"still ok"
    for thread in (0, 1):
        assert e.ewb(P) == Status.NOT_TRACKED
        assert e.interrupt(thread)
    assert e.ewb(P) == OK
    assert e.eldu(P) == OK
    e.resume(0)
    assert e.read(0, P) == b"still ok", "the last store through a stale entry came along"


def test_03_no_old_translation_reaches_an_evicted_page(e: Inhabited) -> None:
    e.enter(0)
    assert e.read(0, P) == pattern(0)[:8]
    assert (e.block(P), e.track()) == (OK, OK)
    e.interrupt(0)
    assert e.ewb(P) == OK
    e.resume(0)
    assert outcome(lambda: e.read(0, P)) == Pf(e.base + P, user=True)


def test_04_order_is_a_page_s_own(e: Inhabited) -> None:
    assert (e.block(P), e.track(), e.block(Q)) == (OK, OK, OK)
    assert (e.ewb(Q), e.ewb(P)) == (Status.NOT_TRACKED, OK)


def test_04_etrackc_counts_as_etrack(e: Inhabited) -> None:
    assert e.block(P) == OK
    assert outcome(partial(e.leaves.etrackc, e.built.epc(Q))) == OK
    assert e.ewb(P) == OK


def test_05_tracked_does_not_mean_removable_nor_the_reverse(e: Inhabited) -> None:
    assert (e.block(P), e.track()) == (OK, OK)
    e.enter(0)
    assert e.remove(P) == Status.ENCLAVE_ACT  # though EWB would take it
    assert e.ewb(P) == OK
    e.exit(0)
    assert e.block(Q) == OK
    assert e.ewb(Q) == Status.NOT_TRACKED  # though EREMOVE takes it
    assert e.remove(Q) == OK


def test_05_an_accepted_trim_page_goes_while_threads_run(e: Inhabited) -> None:
    e.enter(0)
    e.enter(1)
    trim = SecInfo.of(PageType.TRIM)
    assert outcome(partial(e.leaves.emodt, trim, e.built.epc(P))) == OK
    assert e.track() == OK
    for thread in (0, 1):
        e.interrupt(thread)
        e.resume(thread)
    assert e.remove(P) == Status.ENCLAVE_ACT
    assert e.accept(0, P, PageType.TRIM << 8 | 16) == OK
    assert e.remove(P) == OK
    e.hw.check_invariants()


# --- 6, 7, 8: SECS and VA pages, children, identities ------------------------------------------


def test_06_secs_and_va_pages_need_no_blocking() -> None:
    bench = Bench()
    for addr in (bench.secs(), bench.va()):
        blob = bench.evict(addr)
        assert bench.load(blob, bench.free()) == OK


@pytest.mark.parametrize("pending", [False, True])
def test_07_resident_children_count_pending_ones_too(pending: bool) -> None:
    bench = Bench()
    secs = bench.secs()
    bench.child(secs, pending=pending)
    info = PageInfoArgs(0, bytearray(PAGE_BYTES), bytearray(128))
    assert bench.leaves.ewb(info, secs, bench.slot()) == Status.CHILD_PRESENT
    assert bench.leaves.eremove(secs) == Status.CHILD_PRESENT


def test_07_removing_a_secs_orphans_its_evicted_children() -> None:
    bench = Bench()
    secs = bench.secs()
    blob = bench.evict(bench.child(secs))
    assert bench.leaves.eremove(secs) == OK
    blob.secs = bench.secs()
    assert bench.load(blob, bench.free()) == MAC_FAIL


def test_08_children_loaded_after_a_move_belong_to_the_new_secs_page(e: Inhabited) -> None:
    for offset in [addr - e.base for addr in e.built.pages]:
        e.evict(offset)
    eid = e.enclave.eid
    blob = e.evict_secs()
    e.leaves.epa(int(PageType.VA), e.built.secs)
    e.built.secs = e.free()
    assert e.leaves.eldu(blob.args(), e.built.secs, blob.slot) == OK
    assert e.eldu(P) == OK
    owner = e.page(P).secs
    assert owner is not None and owner.addr == e.built.secs
    assert e.enclave.eid == eid and e.enclave.context == e.built.secs
    e.evict(P)
    pcmd = Pcmd.unpack(e.blobs[P].pcmd)
    assert pcmd.enclave_id == eid


# --- 9, 10, 11: authentication -----------------------------------------------------------------


def test_09_blocked_is_not_saved(e: Inhabited) -> None:
    e.evict(P)
    assert Pcmd.unpack(e.blobs[P].pcmd).secinfo.flags == PageType.REG << 8 | 3
    assert e.eldu(P) == OK
    assert not e.page(P).blocked


def test_09_a_page_that_a_guest_had_blocked_comes_back_blocked_by_eldb(e: Inhabited) -> None:
    e.evict(P)
    assert e.eldu(P, leaf="eldb") == OK
    assert e.page(P).blocked
    assert e.block(P) == Status.BLKSTATE
    assert e.ewb(P) == Status.NOT_TRACKED, "it was blocked anew, in this epoch"
    assert e.track() == OK
    assert e.ewb(P) == OK


def test_10_the_eid_is_bound_after_the_header_was_zeroed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.leaves = type(bench.leaves)(bench.cpu)  # the readable leaves
    one, other = bench.secs(), bench.secs()
    headers: list[bytes] = []
    original = PagingKey.seal

    def spy(key: PagingKey, page: bytes, version: int, header: bytes) -> bytes:
        headers.append(header)
        return original(key, page, version, header)

    monkeypatch.setattr(PagingKey, "seal", spy)
    for secs in (one, other):
        bench.evict(bench.child(secs, linaddr=BASE))
    eids = [MacHeader.unpack(header).eid for header in headers]
    assert eids == [bench.enclave(one).eid, bench.enclave(other).eid]
    assert 0 not in eids and eids[0] != eids[1]


def test_11_a_failed_load_costs_nothing_and_a_good_one_the_slot() -> None:
    bench = Bench()
    secs = bench.secs()
    blob, there = bench.evict(bench.child(secs)), bench.free()
    version = bench.slot_value(blob.slot)
    wrong = blob.copy()
    wrong.linaddr ^= PAGE_BYTES
    for _ in range(3):
        assert bench.load(wrong, there) == MAC_FAIL
        assert bench.slot_value(blob.slot) == version and not bench.page(there).valid
    assert bench.load(blob, there) == OK
    assert bench.slot_value(blob.slot) == 0
    assert bench.load(blob, bench.free()) == MAC_FAIL


# --- 12, 13: versions and VA trees -------------------------------------------------------------


def test_12_versions_differ_across_va_pages_and_enclaves_and_are_never_0() -> None:
    bench = Bench()
    versions = []
    for _ in range(3):
        secs, va = bench.secs(), bench.va()
        for slot in range(0, 64, 8):
            addr = bench.child(secs)
            bench.evict(addr, va + slot)
            versions.append(bench.slot_value(va + slot))
            bench._next -= 1  # the page is free again
    assert 0 not in versions and len(set(versions)) == len(versions) == 24


def test_13_children_of_an_evicted_va_page_wait_for_it() -> None:
    bench = Bench()
    secs, root, va = bench.secs(), bench.va(), bench.va()
    blob = bench.evict(bench.child(secs), va + 16)
    tree = bench.evict(va, root)
    there = bench.free()
    assert bench.load(blob, there) == Pf(va + 16)
    back = bench.free()
    assert bench.load(tree, back) == OK
    blob.slot = back + 16
    assert bench.load(blob, there) == OK


def test_13_children_of_a_removed_va_page_are_lost() -> None:
    bench = Bench()
    secs, va = bench.secs(), bench.va()
    blob = bench.evict(bench.child(secs), va)
    assert bench.leaves.eremove(va) == OK
    bench.leaves.epa(3, va)
    assert bench.load(blob, bench.free()) == MAC_FAIL


def test_13_a_va_page_cannot_hold_its_own_version() -> None:
    bench = Bench()
    va = bench.va()
    info = PageInfoArgs(0, bytearray(PAGE_BYTES), bytearray(128))
    assert outcome(lambda: bench.leaves.ewb(info, va, va + 8)) == GP
    assert bench.page(va).valid


# --- 14, 15: faults ----------------------------------------------------------------------------


def test_14_an_address_outside_the_epc_is_pf_or_a_code_and_a_misaligned_one_is_gp() -> None:
    bench = Bench()
    for leaf in ("eblock", "etrack", "etrackc", "eremove"):
        run = getattr(bench.leaves, leaf)
        assert outcome(partial(run, 0x7000_0000)) == Pf(0x7000_0000)
        assert outcome(partial(run, 0x7000_0008)) == GP
    assert outcome(partial(bench.leaves.erdinfo, RdInfo(), 0x7000_0000)) == Status.PG_NONEPC
    assert outcome(partial(bench.leaves.etrack, bench.va())) != outcome(
        partial(bench.leaves.etrackc, bench.va())
    )


def test_15_without_a_mapping_the_fault_is_an_ordinary_one(e: Inhabited) -> None:
    e.evict(P)
    e.enter(0)
    assert outcome(lambda: e.read(0, P)) == Pf(e.base + P, user=True)
    e.tables.unmap(e.base + P)
    assert outcome(lambda: e.read(0, P)) == PlainPf(e.base + P)


def test_15_cr2_is_page_aligned_after_an_aex(e: Inhabited) -> None:
    assert e.block(P) == OK
    e.enter(0)
    with pytest.raises(PageFault) as caught:
        e.write(0, P + 0x123, b"x")
    assert caught.value.address == e.base + P + 0x123
    assert caught.value.code == Pfec.P | Pfec.W | Pfec.U | Pfec.SGX
    cpu = e.cpu(0)
    assert deliver(cpu, caught.value)
    assert cpu.inside is None
    assert cpu.cr2 == e.base + P


def test_15_outside_the_enclave_its_memory_is_ones_and_stores_vanish(e: Inhabited) -> None:
    assert e.read(0, P, 64) == b"\xff" * 64
    e.write(0, P, b"dropped")
    assert e.hw.ram_read(e.built.epc(P), 32) == b"\xff" * 32
    e.hw.ram_write(e.built.epc(P), b"dropped as well")
    e.enter(0)
    assert e.read(0, P, 64) == pattern(0)[:64]


def test_15_one_enclave_cannot_use_another_ones_page(e: Inhabited) -> None:
    other = e.another()
    e.tables.map(e.base + P, other.built.epc(P), 7)  # what a wicked kernel would do
    e.tables.map(e.base + Q, e.built.epc(P), 7)
    e.enter(0)
    for offset in (P, Q):
        assert outcome(partial(e.read, 0, offset)) == Pf(e.base + offset, user=True)


# --- 16, 17, 18, 19 ----------------------------------------------------------------------------


def cssa(e: Inhabited, thread: int) -> int:
    return Tcs.unpack(e.built.read(e.tcs(thread), PAGE_BYTES)).cssa


def frame(e: Inhabited, thread: int, number: int) -> GprSgx:
    at = e.tcs(thread) + (1 + number) * PAGE_BYTES + PAGE_BYTES - 184
    return GprSgx.unpack(e.built.read(at, 184))


def test_16_an_exit_fills_frame_cssa_and_a_resume_takes_the_one_below(e: Inhabited) -> None:
    e.enter(0)
    cpu = e.cpu(0)
    assert cpu.regs.rax == cssa(e, 0) == 0
    cpu.regs.r12, cpu.regs.rip = 0x1111, e.base + 0x123
    e.interrupt(0)
    assert cssa(e, 0) == 1
    assert (frame(e, 0, 0).r12, frame(e, 0, 0).rip) == (0x1111, e.base + 0x123)
    e.enter(0)
    assert cpu.regs.rax == cssa(e, 0) == 1
    cpu.regs.r12, cpu.regs.rip = 0x2222, e.base + 0x456
    e.interrupt(0)
    assert cssa(e, 0) == 2
    assert frame(e, 0, 1).r12 == 0x2222 and frame(e, 0, 0).r12 == 0x1111
    assert outcome(partial(e.enter, 0)) == GP  # NSSA frames are used up
    for expected in (0x2222, 0x1111):
        e.resume(0)
        assert cpu.regs.r12 == expected
        e.exit(0)
    assert cssa(e, 0) == 0
    assert outcome(partial(e.resume, 0)) == GP


def test_16_an_exit_by_eexit_keeps_rsp_and_an_aex_restores_it(e: Inhabited) -> None:
    cpu = e.cpu(0)
    cpu.regs.rsp, cpu.regs.rbp = 0x5000, 0x6000
    e.enter(0)
    cpu.regs.rsp, cpu.regs.rbp = 0x7777, 0x8888
    e.exit(0)
    assert (cpu.regs.rsp, cpu.regs.rbp) == (0x7777, 0x8888)
    cpu.regs.rsp, cpu.regs.rbp = 0x5000, 0x6000
    e.enter(0)
    cpu.regs.rsp, cpu.regs.rbp = 0x7777, 0x8888
    e.interrupt(0)
    assert (cpu.regs.rsp, cpu.regs.rbp, cpu.regs.rip) == (0x5000, 0x6000, AEP)


def test_17_the_caller_of_eaccept_must_have_left_but_a_new_page_needs_nothing(
    e: Inhabited,
) -> None:
    e.enter(0)
    new = 0x1_F000
    addr = e.free()
    e.leaves.eaug(PageInfoArgs(e.base + new, 0, 0, e.built.secs), addr)
    e.built.pages[e.base + new] = addr
    e.tables.map(e.base + new, addr, 7)
    assert e.accept(0, new, PageType.REG << 8 | 8 | 3) == OK
    e.write(0, new, b"fresh")
    assert outcome(partial(e.leaves.emodt, SecInfo.of(PageType.TRIM), addr)) == OK
    assert e.track() == OK
    want = PageType.TRIM << 8 | 16
    assert e.accept(0, new, want) == Status.NOT_TRACKED
    e.interrupt(0)
    e.resume(0)
    assert e.accept(0, new, want) == OK


def test_18_neither_place_nor_evictions_are_measured() -> None:
    digests = set()
    for base, evict in ((0x10_0000, False), (0x7000_0000_0000, True)):
        machine = make_machine()
        built = build_enclave(machine, [reg(b"same")], base=base, init=False)
        if evict:
            evict_and_load(built)
        digests.add(machine.measurements[built.enclave.eid].copy().hexdigest())
    assert len(digests) == 1


def evict_and_load(built: Built) -> None:
    """Evict and reload a page and the SECS of an enclave that is being built."""
    machine = built.machine
    va = next(free_pages(machine))
    machine.leaves.epa(3, va)
    addr = built.epc(0)
    assert machine.leaves.eblock(addr) == OK
    assert machine.leaves.etrack(built.secs) == OK
    saved = []
    for slot, (page, secs) in enumerate(((addr, built.secs), (built.secs, 0))):
        info = PageInfoArgs(0, bytearray(PAGE_BYTES), bytearray(128))
        assert machine.leaves.ewb(info, page, va + 8 * slot) == OK
        info.secs = secs
        saved.append((info, page, va + 8 * slot))
    for info, page, slot_at in reversed(saved):
        assert machine.leaves.eldu(info, page, slot_at) == OK


def test_18_an_evicted_half_built_enclave_can_be_finished() -> None:
    plain, evicted = (build_enclave(make_machine(), [reg(b"one")], init=False) for _ in range(2))
    evict_and_load(evicted)
    for built in (plain, evicted):
        machine = built.machine
        addr = next(free_pages(machine))
        info = PageInfoArgs(
            built.base + PAGE_BYTES, pattern(5), SecInfo.of(PageType.REG, 3), built.secs
        )
        machine.leaves.eadd(info, addr)
        machine.leaves.eextend(built.secs, addr)
    digests = [b.machine.measurements[b.enclave.eid].copy().digest() for b in (plain, evicted)]
    assert digests[0] == digests[1] != hashlib.sha256().digest()


def test_19_numbers_are_what_they_look_like() -> None:
    assert (Encls.ELDBC, Encls.EUPDATESVN, Status.NOT_TRACKED) == (18, 24, 11)
    assert int(Status.UNMASKED_EVENT) == 128
    assert SECINFO_PAGE == 0x4000
