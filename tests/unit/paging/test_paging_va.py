"""VA pages: how many an enclave gets, which slots it takes, and how they leave and come back.

Enclaves here have real VA pages; upper levels are filled by many enclaves of one page each.
"""

from __future__ import annotations

import pytest
from tests.support.epc import ToyEnclave
from tests.support.hw import make_machine

from softsgx.arch import VA_SLOTS
from softsgx.defects import Defect
from softsgx.paging import EpcCore, LoadFailed, Policy
from softsgx.runtime import InlineRuntime


def bench(pages: int, *defects: Defect, policy: Policy | None = None) -> EpcCore:
    runtime = InlineRuntime()
    machine = make_machine(epc_pages=pages, runtime=runtime)
    return EpcCore(machine, runtime, dirty=(), defects=frozenset(defects), policy=policy)


def enclave(core: EpcCore, pages: int = 0, *, number: int = 1, size: int = 1024) -> ToyEnclave:
    encl = ToyEnclave(core, core.hw, number=number, size_pages=size)  # type: ignore[arg-type]
    for index in range(pages):
        encl.add(index)
    return encl


def evict_all(core: EpcCore) -> None:
    """Run batches by force until one frees nothing."""
    while core.reclaim(force=True).freed:
        pass


@pytest.mark.parametrize("added", [0, 510, 511, 512, 1023, 1024])
def test_an_enclave_has_a_va_page_for_every_512_pages_the_secs_included(added: int) -> None:
    core = bench(1200)
    encl = enclave(core)
    for _ in range(added):
        encl.swap.grow()
    assert len(encl.swap.va) == 1 + added // VA_SLOTS
    encl.swap.check_invariants()


def grown_at_the_boundary(*defects: Defect) -> int:
    """Add and remove one page 10 times where the number of pages is a multiple of 512."""
    core = bench(600, *defects)
    encl = enclave(core)
    for _ in range(VA_SLOTS - 1):
        encl.swap.grow()
    for _ in range(10):
        encl.swap.grow()
        encl.swap.shrink()
    return len(encl.swap.va)


def test_adding_and_removing_at_the_boundary_costs_one_va_page() -> None:
    assert grown_at_the_boundary() == 2


def test_defect_l4_makes_a_va_page_each_time() -> None:
    assert grown_at_the_boundary(Defect.VA_PAGE_EVERY_512_PAGES) == 11


def test_slots_are_taken_from_the_lowest() -> None:
    core = bench(64)
    encl = enclave(core, 8)
    evict_all(core)
    slots = [page.entry.slot for page in encl.pages.values() if page.entry is not None]
    assert [slot.number for slot in slots if slot is not None] == list(range(8))


def test_full_va_pages_stand_behind_those_with_room() -> None:
    core = bench(700, policy=Policy(evict_va=False))
    encl = enclave(core, 600)
    evict_all(core)
    first, second = encl.swap.va.pages()
    assert first.free_slots == 2 * VA_SLOTS - 601 and second.free_slots == 0
    encl.touch(0)
    encl.swap.check_invariants()


def test_a_va_page_with_the_last_room_stays_while_pages_need_it() -> None:
    core = bench(64)
    encl = enclave(core, 4)
    (va_page,) = encl.swap.va.pages()
    assert not encl.swap.va.can_evict(va_page)
    evict_all(core)
    assert encl.swap.va.can_evict(va_page)


def test_a_single_va_page_is_not_evicted_for_another_one() -> None:
    core = bench(64)
    enclave(core, 4)
    evict_all(core)
    assert core.counters.va_out == 0 and core.counters.held["va"] == 1


def test_va_pages_stay_when_the_policy_says_so() -> None:
    core = bench(64, policy=Policy(evict_va=False))
    enclaves = [enclave(core, 2, number=number) for number in range(1, 9)]
    evict_all(core)
    assert core.counters.va_out == 0 and core.counters.held["va"] == 8
    for encl in enclaves:
        encl.check()


def test_va_pages_of_idle_enclaves_leave_and_come_back_parent_first() -> None:
    core = bench(64)
    enclaves = [enclave(core, 2, number=number) for number in range(1, 9)]
    evict_all(core)
    assert core.counters.va_out == 8 and core.counters.held["va"] == 1
    assert core.free_pages == 63
    core.check_invariants()
    for encl in enclaves:
        encl.check()
        encl.check_invariants()
    assert core.counters.va_in == 8
    for encl in enclaves:
        encl.close()
    core.check_invariants()
    assert core.free_pages == 64


def test_full_va_pages_leave_while_their_enclave_runs() -> None:
    core = bench(64)
    encl = enclave(core, 1020)
    other = enclave(core, 2, number=2)
    for index in range(0, 1020, 7):
        encl.touch(index)
        encl.check_invariants()
    core.check_invariants()
    assert core.counters.va_out > 0
    encl.check()
    other.check()


def test_an_enclave_dies_with_its_va_pages_evicted() -> None:
    core = bench(64)
    enclaves = [enclave(core, 2, number=number) for number in range(1, 5)]
    evict_all(core)
    for encl in enclaves:
        encl.close()
        core.check_invariants()
    assert core.free_pages == 64


def test_a_slot_above_that_a_dead_enclave_left_is_used_again() -> None:
    core = bench(64)
    enclaves = [enclave(core, 2, number=number) for number in range(1, 5)]
    evict_all(core)
    enclaves[0].close()
    again = enclave(core, 2, number=9)
    evict_all(core)
    for encl in (*enclaves[1:], again):
        encl.check()


def test_a_va_page_in_use_stays_although_it_was_prepared() -> None:
    core = bench(64)
    first, second = enclave(core, 2), enclave(core, 2, number=2)
    evict_all(core)
    for encl in (first, second):
        encl.check()
    evict_all(core)  # the pages, not the VA pages, which were just used
    (va_page,) = first.swap.va.pages()
    if va_page.epc is None:
        with first.lock:
            first.swap.va.make_resident(va_page)
    epc = va_page.epc
    assert epc is not None
    core.unmark_reclaimable(epc)
    assert va_page.prepare() and not va_page.usable
    first.touch(0)
    assert va_page.usable and not va_page.write()
    first.check()
    core.va.check_invariants()
    first.check_invariants()


@pytest.mark.slow
def test_two_levels_of_va_pages_leave_and_come_back() -> None:
    """More than 1024 enclaves fill two level-2 pages, of which then one leaves for level 3."""
    core = bench(96, policy=Policy(batch_pages=16))
    enclaves = [enclave(core, 1, number=number, size=2) for number in range(1, 1101)]
    evict_all(core)
    levels = core.va.levels()
    assert len(levels[2]) == 3 and len(levels[3]) == 1
    assert any(page.epc is None for page in levels[2].pages())
    core.check_invariants()
    for encl in enclaves[::50]:
        encl.check()
        encl.check_invariants()
    core.check_invariants()
    for encl in enclaves:
        encl.close()
    core.check_invariants()
    assert core.free_pages == 96 and all(len(level) == 0 for level in core.va.levels().values())


def test_a_page_without_a_promise_is_our_mistake() -> None:
    core = bench(64)
    encl = enclave(core, 2)
    encl.swap.va.room = 0
    encl.swap.va._pages.clear()
    with pytest.raises(AssertionError, match="grow"):
        encl.swap.va.alloc_slot()


def test_a_va_page_that_vanished_with_the_power_loads_nothing() -> None:
    core = bench(64)
    enclaves = [enclave(core, 2, number=number) for number in range(1, 4)]
    evict_all(core)
    core.hw.power_transition()  # type: ignore[attr-defined]
    for encl in enclaves:
        with pytest.raises(LoadFailed):
            encl.touch(0)
    for encl in enclaves:
        encl.close()
    assert core.free_pages == 64
    core.check_invariants()


@pytest.mark.parametrize("closed_first", [True, False])
def test_va_pages_leave_again_after_a_loss_of_power(closed_first: bool) -> None:
    """The upper VA page that all share was in the EPC, and is no VA page any more."""
    core = bench(64)
    old = [enclave(core, 3, number=number) for number in range(1, 5)]
    evict_all(core)
    assert core.counters.va_out == 4
    core.hw.power_transition()  # type: ignore[attr-defined]
    if closed_first:
        for encl in old:
            encl.close()
    fresh = [enclave(core, 3, number=number) for number in range(5, 9)]
    for _round in range(3):
        evict_all(core)
        for encl in fresh:
            encl.check()
    evict_all(core)
    assert core.counters.held["va"] == 1, "VA pages stay in the EPC"
    core.check_invariants()
    if not closed_first:
        for encl in old:
            with pytest.raises(LoadFailed):
                encl.touch(0)
            encl.close()
    for encl in fresh:
        encl.check()
        encl.close()
    core.check_invariants()
    assert core.free_pages == core.epc_pages and core.counters.leaked == 0
