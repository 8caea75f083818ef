"""Enclave threads and the operating system at once: entries, accepts, and the page beneath them.

Goal: an entry and the removal of a page of its enclave never both succeed; of two changes of one
page only one happens; whoever finds a page held ends as the table says.  Method: one side is
stopped in its middle (at its point, where it holds its locks) while the other runs.

Source:
    SDM vol. 3D, "Concurrency and Leaf Functions": rows of EENTER, ERESUME, EDECCSSA, EACCEPT,
    EACCEPTCOPY, EMODPE, and lock A.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
from tests.support.inhabited import DATA, SECINFO_PAGE, Inhabited
from tests.support.paging import GP, outcome, pattern

from softsgx.arch import PAGE_BYTES, PageType, RdInfo, SecInfo, Status
from softsgx.hw import PageInfoArgs

P, Q = DATA[0], DATA[1]
OK, CONFLICT = Status.SUCCESS, Status.EPC_PAGE_CONFLICT
NEW = 0x1_F000  # offset of a page that EAUG adds
OTHER_SECINFO = SECINFO_PAGE + 64

Run = Callable[[], object]


def at_point(e: Inhabited, holder: Run, *others: Run) -> tuple[object, list[object]]:
    """Run ``others`` at the holder's point; return how all end."""
    ends: list[object] = []

    def stop(where: str) -> None:
        e.hw.point = lambda where: None
        ends.extend(outcome(other) for other in others)

    assert e.readable, "the optimised leaves have no points"
    e.hw.point = stop
    holder_ends = outcome(holder)
    assert len(ends) == len(others), "the holder never reached its point"
    return holder_ends, ends


# --- one page, two changes: lock A -------------------------------------------------------------


class Changes:
    """Two threads inside and one page whose state several leaves may change now."""

    def __init__(self, state: str) -> None:
        self.e = e = Inhabited(threads=2, readable=True)
        e.enter(0)
        e.enter(1)
        if state == "pending":
            addr = e.free()
            e.leaves.eaug(PageInfoArgs(e.base + NEW, 0, 0, e.built.secs), addr)
            e.built.pages[e.base + NEW] = addr
            e.tables.map(e.base + NEW, addr, 7)
            self.offset, accepted = NEW, PageType.REG << 8 | 8 | 3
        else:
            assert e.leaves.emodpr(SecInfo(flags=1), e.built.epc(P)) == OK
            assert e.track() == OK
            for thread in (0, 1):
                e.interrupt(thread)
                e.resume(thread)
            self.offset, accepted = P, PageType.REG << 8 | 32 | 1
        e.write(0, SECINFO_PAGE, SecInfo(flags=accepted).pack())
        e.write(0, OTHER_SECINFO, SecInfo.of(PageType.REG, 3).pack())

    def run(self, leaf: str, thread: int) -> Run:
        e, at = self.e, self.e.base + self.offset
        cpu, epc = e.cpu(thread), e.built.epc(self.offset)
        match leaf:
            case "eaccept":
                return partial(cpu.enclu.eaccept, e.base + SECINFO_PAGE, at)
            case "eacceptcopy":
                return partial(cpu.enclu.eacceptcopy, e.base + OTHER_SECINFO, at, e.base + Q)
            case "emodpe":
                return partial(cpu.enclu.emodpe, e.base + OTHER_SECINFO, at)
            case "emodpr":
                return partial(e.leaves.emodpr, SecInfo(flags=1), epc)
            case _:
                assert leaf == "emodt"
                return partial(e.leaves.emodt, SecInfo.of(PageType.TRIM), epc)


BASE_LOCK = {"eaccept": "S", "eacceptcopy": "C", "emodpe": "C", "emodpr": "S", "emodt": "X"}
IN_STATE = {
    "restricted": (["eaccept", "emodpe", "emodpr", "emodt"],) * 2,
    "pending": (["eaccept", "eacceptcopy"], ["eaccept", "eacceptcopy", "emodpr", "emodt"]),
}


def conflict(holder: str, other: str) -> object:
    """How the table says that the second change of a page ends."""
    if other == "emodpr":
        return GP if BASE_LOCK[holder] == "X" else CONFLICT
    return CONFLICT if other == "emodt" else GP


@pytest.mark.parametrize(
    ("state", "holder", "other"),
    [(state, *pair) for state, leaves in IN_STATE.items() for pair in product(*leaves)],
)
def test_of_two_changes_of_a_page_the_second_is_refused(
    state: str, holder: str, other: str
) -> None:
    changes = Changes(state)
    ends, others = at_point(changes.e, changes.run(holder, 0), changes.run(other, 1))
    assert ends in (OK, None)
    assert others == [conflict(holder, other)]
    page = changes.e.page(changes.offset)
    assert (page.lock, page.modification_lock) == (0, False)


@pytest.mark.parametrize(
    ("holder", "refusal"), [("eaccept", GP), ("eacceptcopy", Status.ENCLAVE_ACT)]
)
def test_a_pending_page_does_not_go_while_it_is_accepted(holder: str, refusal: object) -> None:
    changes = Changes("pending")
    e = changes.e
    assert at_point(e, changes.run(holder, 0), partial(e.remove, NEW)) == (OK, [refusal])
    assert e.page(NEW).valid and not e.page(NEW).pending


def test_a_page_blocked_in_the_middle_of_an_eacceptcopy_is_not_accepted() -> None:
    changes = Changes("pending")
    e = changes.e
    ends, others = at_point(e, changes.run("eacceptcopy", 0), partial(e.block, NEW))
    assert (ends, others) == (Status.PAGE_ATTRIBUTES_MISMATCH, [OK])
    assert e.page(NEW).pending
    assert e.built.read(NEW, PAGE_BYTES) == bytes(PAGE_BYTES)


def test_eacceptcopy_brings_the_copy_even_if_the_page_is_looked_at_meanwhile() -> None:
    changes = Changes("pending")
    e = changes.e
    look = partial(e.leaves.erdinfo, RdInfo(), e.built.epc(NEW))
    assert at_point(e, changes.run("eacceptcopy", 0), look) == (OK, [OK])
    assert e.read(0, NEW, PAGE_BYTES) == pattern(1)


# --- entries -----------------------------------------------------------------------------------


def ready(entry: str) -> tuple[Inhabited, Run]:
    """Return an enclave and an entry that would succeed on thread 0's TCS."""
    e = Inhabited(readable=True)
    if entry == "eresume":
        e.enter(0)
        e.interrupt(0)
    return e, partial(e.resume if entry == "eresume" else e.enter, 0)


ENTRIES = pytest.mark.parametrize("entry", ["eenter", "eresume"])


@ENTRIES
def test_a_tcs_is_not_taken_away_in_the_middle_of_an_entry(entry: str) -> None:
    e, enter = ready(entry)
    tcs = e.tcs(0)
    assert e.block(tcs) == OK
    assert e.track() == OK
    e.page(tcs).blocked = False  # evictable, but for being found unblocked
    trim = partial(e.leaves.emodt, SecInfo.of(PageType.TRIM), e.built.epc(tcs))
    ends, others = at_point(e, enter, partial(e.remove, tcs), partial(e.ewb, tcs), trim)
    assert ends is None and e.cpu(0).inside is not None
    assert others == [GP, GP, CONFLICT]


@ENTRIES
def test_a_tcs_can_be_looked_at_in_the_middle_of_an_entry(entry: str) -> None:
    e, enter = ready(entry)
    look = partial(e.leaves.erdinfo, RdInfo(), e.built.epc(e.tcs(0)))
    assert at_point(e, enter, look, partial(e.block, e.tcs(0))) == (None, [OK, OK])


@ENTRIES
@pytest.mark.parametrize("leaf", ["eremove", "ewb", "emodt"])
def test_a_tcs_that_is_being_taken_away_is_not_entered(entry: str, leaf: str) -> None:
    e, enter = ready(entry)
    tcs = e.tcs(0)
    if leaf == "ewb":
        assert e.block(tcs) == OK
        assert e.track() == OK
    run: dict[str, Run] = {
        "eremove": partial(e.remove, tcs),
        "ewb": partial(e.ewb, tcs),
        "emodt": partial(e.leaves.emodt, SecInfo.of(PageType.TRIM), e.built.epc(tcs)),
    }
    assert at_point(e, run[leaf], enter) == (OK, [GP])
    assert e.cpu(0).inside is None and e.enclave.threads_inside == 0


@ENTRIES
@pytest.mark.parametrize("what", ["data", "ssa"])
@pytest.mark.parametrize("first", ["entry", "eremove"])
def test_entry_and_removal_of_a_page_never_both_succeed(entry: str, what: str, first: str) -> None:
    e, enter = ready(entry)
    offset = P if what == "data" else e.tcs(0) + PAGE_BYTES
    remove = partial(e.remove, offset)
    if first == "entry":
        at_point(e, enter, remove)
    else:
        at_point(e, remove, enter)
    inside, there = e.cpu(0).inside is not None, e.page(offset).valid
    assert inside == there, "a thread is inside an enclave that lost a page, or nobody got his way"
    assert e.enclave.threads_inside == inside
    e.hw.check_invariants()


@ENTRIES
def test_an_ssa_page_never_leaves_under_a_thread_that_was_entering(entry: str) -> None:
    e, enter = ready(entry)
    ssa = e.tcs(0) + PAGE_BYTES
    _, others = at_point(e, enter, partial(e.block, ssa), e.track, partial(e.ewb, ssa))
    inside, there = e.cpu(0).inside is not None, e.page(ssa).valid
    assert inside <= there, "the frame of a thread that is inside was evicted"
    if inside:
        assert others[-1] == Status.NOT_TRACKED
        e.interrupt(0)
        assert e.ewb(ssa) in (OK, Status.NOT_TRACKED)


@ENTRIES
def test_an_entry_in_the_middle_of_an_ewb_sees_all_or_nothing_of_it(entry: str) -> None:
    e, enter = ready(entry)
    ssa = e.tcs(0) + PAGE_BYTES
    assert (e.block(ssa), e.track()) == (OK, OK)
    ends, _ = at_point(e, partial(e.ewb, ssa), enter)
    assert ends == OK
    assert e.cpu(0).inside is None


def test_one_tcs_is_entered_by_one_thread() -> None:
    e = Inhabited(readable=True)
    ends, others = at_point(e, partial(e.enter, 0), partial(e.enter, 1, 0))
    assert sorted([ends, others[0]], key=str) == sorted([None, GP], key=str)
    assert e.enclave.threads_inside == 1


def test_an_etrack_in_the_middle_of_an_entry_counts_the_entrant_or_comes_before_it() -> None:
    e = Inhabited(readable=True)
    assert e.block(P) == OK
    assert at_point(e, partial(e.enter, 0), e.track) == (None, [OK])
    assert e.ewb(P) in (OK, Status.NOT_TRACKED)
    assert e.track() in (OK, Status.PREV_TRK_INCMPL)
    e.exit(0)
    e.hw.check_invariants()
    assert e.enclave.threads_inside == 0
    assert e.track() == OK
    assert e.page(P).valid is False or e.ewb(P) == OK


def test_an_exit_in_the_middle_of_an_etrack_is_counted_once() -> None:
    for leave in ("exit", "interrupt"):
        e = Inhabited(readable=True)
        e.enter(0)
        e.enter(1)
        assert at_point(e, e.track, partial(getattr(e, leave), 0))[0] == OK
        e.hw.check_invariants()
        e.exit(1)
        e.hw.check_invariants()
        assert e.enclave.threads_inside == 0
