"""Tracking, scenario by scenario: when EWB accepts a page, and what threads see until then.

Goal: the eighteen scenarios that a model without epochs, or without a TLB for each processor, gets
wrong.  Method: each is a test named by its sentence, with real entries, exits and accesses.

Source:
    SDM vol. 3D, "EPC and Management of EPC Pages"; "EWB", "ETRACK", "EBLOCK", Operation.
"""

from __future__ import annotations

from functools import partial

import pytest
from tests.support.inhabited import DATA, SECINFO_PAGE, Inhabited
from tests.support.paging import Pf, outcome, pattern

from softsgx.arch import PAGE_BYTES, PageType, Pfec, SecInfo, Status
from softsgx.hw import PageFault, PageInfoArgs

P, Q = DATA[0], DATA[1]
OK, NOT_BLOCKED, NOT_TRACKED = Status.SUCCESS, Status.PAGE_NOT_BLOCKED, Status.NOT_TRACKED
T1, T2 = 0, 1


@pytest.fixture
def e() -> Inhabited:
    """An enclave on three processors, nobody inside."""
    return Inhabited()


def sgx_fault(e: Inhabited, thread: int, offset: int) -> PageFault:
    """See a thread's read fault for an EPCM reason, at the exact address; return the fault."""
    with pytest.raises(PageFault) as caught:
        e.read(thread, offset)
    assert caught.value.address == e.base + offset
    assert caught.value.code & (Pfec.SGX | Pfec.P | Pfec.U) == Pfec.SGX | Pfec.P | Pfec.U
    return caught.value


def test_01_ewb_of_an_unblocked_page_gives_10(e: Inhabited) -> None:
    assert e.ewb(P) == NOT_BLOCKED


def test_02_a_blocked_page_without_etrack_gives_11_even_with_no_processor_inside(
    e: Inhabited,
) -> None:
    assert e.block(P) == OK
    assert e.ewb(P) == NOT_TRACKED


def test_03_block_and_track_suffice_with_no_processor_inside(e: Inhabited) -> None:
    assert (e.block(P), e.track(), e.ewb(P)) == (OK, OK, OK)
    assert not e.page(P).valid


def test_04_a_processor_inside_before_etrack_keeps_the_page_until_an_aex(e: Inhabited) -> None:
    e.enter(T1)
    assert (e.block(P), e.track(), e.ewb(P)) == (OK, OK, NOT_TRACKED)
    assert e.interrupt(T1)
    assert e.ewb(P) == OK


def test_04b_an_eexit_serves_as_well_as_an_aex(e: Inhabited) -> None:
    e.enter(T1)
    assert (e.block(P), e.track(), e.ewb(P)) == (OK, OK, NOT_TRACKED)
    e.exit(T1)
    assert e.ewb(P) == OK


def test_05_a_processor_that_enters_after_etrack_does_not_matter(e: Inhabited) -> None:
    e.enter(T1)
    assert (e.block(P), e.track()) == (OK, OK)
    e.enter(T2)
    assert e.ewb(P) == NOT_TRACKED
    assert e.interrupt(T1)
    assert e.ewb(P) == OK
    assert e.cpu(T2).inside is not None


def test_06_a_second_etrack_waits_for_those_from_before_the_first(e: Inhabited) -> None:
    e.enter(T1)
    assert e.track() == OK
    assert e.track() == Status.PREV_TRK_INCMPL
    e.exit(T1)
    assert e.track() == OK


def test_07_an_etrack_before_the_block_does_not_count(e: Inhabited) -> None:
    e.enter(T1)
    assert e.track() == OK
    assert e.interrupt(T1)
    assert e.block(P) == OK
    assert e.ewb(P) == NOT_TRACKED


def test_08_each_page_counts_from_its_own_block(e: Inhabited) -> None:
    e.enter(T1)
    assert (e.block(P), e.track(), e.block(Q)) == (OK, OK, OK)
    assert e.interrupt(T1)
    e.resume(T1)
    assert (e.ewb(P), e.ewb(Q)) == (OK, NOT_TRACKED)
    assert e.track() == OK
    assert e.ewb(Q) == NOT_TRACKED
    e.exit(T1)
    assert e.ewb(Q) == OK


def test_09_a_stale_translation_serves_until_the_next_exit(e: Inhabited) -> None:
    e.enter(T1)
    assert e.read(T1, P) == pattern(0)[:8]
    assert e.block(P) == OK
    assert e.read(T1, P) == pattern(0)[:8], "EBLOCK must not touch the TLB"
    sgx_fault_of_newcomer(e)
    e.exit(T1)
    e.enter(T1)
    sgx_fault(e, T1, P + 8)


def sgx_fault_of_newcomer(e: Inhabited) -> None:
    e.enter(T2)
    sgx_fault(e, T2, P)
    e.exit(T2)


def test_10_a_second_eblock_gives_3(e: Inhabited) -> None:
    assert (e.block(P), e.block(P)) == (OK, Status.BLKSTATE)


def test_11_secs_va_and_free_pages_cannot_be_blocked(e: Inhabited) -> None:
    ends = [outcome(partial(e.leaves.eblock, at)) for at in (e.built.secs, e.va, e.free())]
    assert ends == [Status.PG_IS_SECS, Status.NOTBLOCKABLE, Status.PG_INVLD]


def test_12_a_page_is_not_removed_while_a_processor_is_inside(e: Inhabited) -> None:
    e.enter(T1)
    assert e.remove(P) == Status.ENCLAVE_ACT
    assert e.track() == OK  # T1 now counts as one from before
    assert e.remove(P) == Status.ENCLAVE_ACT
    e.exit(T1)
    assert e.remove(P) == OK


def test_13_a_secs_with_a_resident_child_neither_leaves_nor_goes(e: Inhabited) -> None:

    info = PageInfoArgs(0, bytearray(PAGE_BYTES), bytearray(128))
    assert outcome(lambda: e.leaves.ewb(info, e.built.secs, e.slot())) == Status.CHILD_PRESENT
    assert outcome(lambda: e.leaves.eremove(e.built.secs)) == Status.CHILD_PRESENT


def test_14_a_whole_enclave_leaves_and_comes_back_elsewhere(e: Inhabited) -> None:
    e.enter(T1)
    e.write(T1, P, b"written before")
    e.exit(T1)
    offsets = [addr - e.base for addr in e.built.pages]
    for offset in offsets:
        assert e.block(offset) == OK
    assert e.track() == OK
    for offset in offsets:
        assert e.ewb(offset) == OK
    eid, old = e.enclave.eid, e.built.secs
    blob = e.evict_secs()
    # Somebody else takes the place, so that nothing can come back to where it was.
    e.leaves.epa(int(PageType.VA), old)
    e.built.secs = e.free()
    assert outcome(lambda: e.leaves.eldu(blob.args(), e.built.secs, blob.slot)) == OK
    assert e.enclave.eid == eid and e.built.secs != old
    for offset in reversed(offsets):
        assert e.eldu(offset) == OK
    e.enter(T1)
    assert e.read(T1, P, 14) == b"written before"
    assert e.read(T1, Q, PAGE_BYTES) == pattern(1)
    e.hw.check_invariants()


def test_15_an_occupied_slot_loses_the_older_page_permanently(e: Inhabited) -> None:
    slot = e.slot()
    assert (e.block(P), e.block(Q), e.track()) == (OK, OK, OK)
    assert e.ewb(P, slot) == OK
    assert e.ewb(Q, slot) == Status.VA_SLOT_OCCUPIED
    assert not e.page(Q).valid, "12 is information: the page was evicted"
    assert e.eldu(P) == Status.MAC_COMPARE_FAIL
    assert e.eldu(Q) == OK
    assert e.eldu(P) == Status.MAC_COMPARE_FAIL


def test_16_a_page_loads_once(e: Inhabited) -> None:
    e.evict(P)
    assert e.eldu(P) == OK
    assert e.eldu(P, e.free()) == Status.MAC_COMPARE_FAIL


@pytest.mark.parametrize("frame", [0, 1])
def test_17_a_blocked_tcs_or_ssa_page_refuses_entry(e: Inhabited, frame: int) -> None:
    tcs = e.tcs(T1)
    assert e.block(tcs) == OK
    assert outcome(lambda: e.enter(T1)) == user_fault(e, tcs)
    ssa = e.tcs(T2) + PAGE_BYTES * (1 + frame)
    if frame:  # the second frame is the one that the next entry uses after an exit
        e.enter(T2)
        assert e.interrupt(T2)
    assert e.block(ssa) == OK
    assert outcome(lambda: e.enter(T2)) == user_fault(e, ssa)
    assert e.cpu(T2).inside is None and e.enclave.threads_inside == 0


def user_fault(e: Inhabited, offset: int) -> Pf:
    return Pf(e.base + offset, user=True)


def test_18_a_restriction_is_not_accepted_before_tracking_is_done(e: Inhabited) -> None:
    read_only = PageType.REG << 8 | 1
    assert e.leaves.emodpr(SecInfo(flags=1), e.built.epc(P)) == OK
    e.enter(T1)
    e.enter(T2)
    want = read_only | 1 << 5
    assert e.accept(T1, P, want) == NOT_TRACKED
    assert e.track() == OK
    assert e.accept(T1, P, want) == NOT_TRACKED, "the caller itself came in before"
    assert e.interrupt(T1)
    e.resume(T1)
    assert e.accept(T1, P, want) == NOT_TRACKED, "so did somebody else"
    e.exit(T2)
    assert e.accept(T1, P, want) == OK
    assert not e.page(P).pr and e.page(P).rwx == 1
    assert e.page(SECINFO_PAGE).valid
