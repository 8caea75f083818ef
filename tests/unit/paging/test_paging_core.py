"""The core: results of allocations, charges, poison, ksgxd.

Owners are fakes; a page's EPCM entry is never made valid except where EREMOVE is the point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from tests.support.hw import build_enclave, make_machine
from tests.support.owners import FakeOwner

from softsgx.arch import PAGE_BYTES, PageType
from softsgx.defects import Defect
from softsgx.paging import (
    EpcBusy,
    EpcCore,
    Group,
    Interrupted,
    Lru,
    NoEpc,
    Policy,
    SgxEpcPage,
)
from softsgx.paging.events import Leaked, Poisoned, Refused, Sanitized
from softsgx.paging.nodes import AtomicCount
from softsgx.runtime import InlineRuntime, Livelock, Runtime, SeededRuntime, Task
from softsgx.trace import Event

PAGES = 64


def make_core(runtime: Runtime | None = None, pages: int = PAGES, **more: object) -> EpcCore:
    runtime = InlineRuntime() if runtime is None else runtime
    machine = make_machine(epc_pages=pages, runtime=runtime)
    return EpcCore(machine, runtime, **{"dirty": (), **more})  # type: ignore[arg-type]


def fill(core: EpcCore, count: int | None = None, **owner: object) -> list[SgxEpcPage]:
    """Take free pages, all of them by default, and make them reclaimable."""
    pages = []
    for _ in range(core.free_pages if count is None else count):
        page = core.alloc(FakeOwner("", **owner), reclaim=False)  # type: ignore[arg-type]
        core.mark_reclaimable(page)
        pages.append(page)
    return pages


def alloc_like_a_fault(core: EpcCore, group: Group | None = None) -> SgxEpcPage:
    """Take a page without reclaiming, as often as it takes."""
    while True:
        try:
            return core.alloc(FakeOwner(""), reclaim=False, group=group)
        except EpcBusy as busy:
            core.wait_for_page(busy)


# --- what an allocation answers -------------------------------------------------------------------


def test_without_a_reclaimable_page_every_allocation_gets_no_memory() -> None:
    core = make_core()
    for _ in range(PAGES):
        core.alloc(None, reclaim=True)
    for reclaim in (True, False):
        with pytest.raises(NoEpc):
            core.alloc(None, reclaim=reclaim)
    assert core.counters.alloc_none == 2
    core.check_invariants()


def test_an_allocation_that_may_not_reclaim_gets_busy() -> None:
    core = make_core()
    fill(core)
    with pytest.raises(EpcBusy):
        core.alloc(None, reclaim=False)
    assert core.counters.batches == 0


def test_an_allocation_that_may_reclaim_gets_a_page_after_one_batch() -> None:
    core = make_core()
    fill(core)
    core.alloc(None, reclaim=True)
    assert core.counters.batches == 1
    core.check_invariants()


def test_a_pending_signal_ends_an_allocation_that_would_have_to_reclaim() -> None:
    core = make_core()
    fill(core)
    with pytest.raises(Interrupted):
        core.alloc(None, reclaim=True, signal_pending=lambda: True)
    assert core.counters.batches == 0


def test_a_task_with_a_pending_signal_gets_a_free_page() -> None:
    make_core().alloc(None, reclaim=True, signal_pending=lambda: True)


def test_pages_that_are_always_young_leave_in_the_end() -> None:
    core = make_core()
    fill(core, young=10**9)
    core.alloc(None, reclaim=True)
    assert core.counters.young > 0
    core.check_invariants()


def test_pages_without_backing_end_in_no_memory_not_in_a_hang() -> None:
    core = make_core()
    fill(core, prepares=False)
    with pytest.raises(NoEpc):
        core.alloc(None, reclaim=True)
    core.check_invariants()


def test_one_page_with_backing_is_found_behind_all_those_without() -> None:
    core = make_core()
    pages = fill(core, PAGES - 1, prepares=False)
    pages += fill(core)
    core.alloc(None, reclaim=True)
    assert core.counters.reclaimed == 1


def test_defect_l7_goes_on_while_every_page_is_young() -> None:
    runtime = SeededRuntime(0, step_limit=5000)
    core = make_core(runtime, defects=frozenset({Defect.DIRECT_RECLAIM_WITHOUT_END}))
    fill(core, young=10**9)
    with pytest.raises(Livelock):
        runtime.run(lambda: core.alloc(None, reclaim=True))


def test_a_signal_ends_even_defect_l7() -> None:
    core = make_core(defects=frozenset({Defect.DIRECT_RECLAIM_WITHOUT_END}))
    fill(core, young=10**9)
    signals = iter([False] * 50)
    with pytest.raises(Interrupted):
        core.alloc(None, reclaim=True, signal_pending=lambda: next(signals, True))


def test_pages_in_a_running_batch_are_waited_for_not_given_up() -> None:
    """A small EPC: one task's batch holds every page that there is."""
    for seed in range(30):
        runtime = SeededRuntime(seed)
        core = make_core(runtime, pages=2, policy=Policy(batch_pages=16))

        def main(core: EpcCore = core, runtime: SeededRuntime = runtime) -> None:
            fill(core)

            def want() -> None:
                core.alloc(None, reclaim=True)

            for task in [runtime.spawn(want, "want") for _ in range(2)]:
                task.join()

        runtime.run(main)
        core.check_invariants()
        assert core.free_pages == 0 and core.counters.held["reg"] == 2


class Places:
    """What tasks have reached; each may wait there for another one."""

    def __init__(self, runtime: Runtime) -> None:
        self.reached: list[str] = []
        self._runtime = runtime

    def wait_for(self, place: str) -> None:
        while place not in self.reached:
            self._runtime.yield_now()

    def stop_once(self, place: str, *, until: str) -> None:
        if place not in self.reached:
            self.reached.append(place)
            self.wait_for(until)


@pytest.mark.parametrize("isolated_again", [False, True])
@pytest.mark.parametrize("reclaim", [False, True])
def test_an_allocation_that_looks_while_a_batch_ends_does_not_give_up(
    reclaim: bool, isolated_again: bool
) -> None:
    """It looks for reclaimable pages before the batch puts them back, and for the batch after.

    If it looks once more, another batch has isolated them.
    """
    runtime = SeededRuntime(1)
    core = make_core(runtime, pages=2)
    places = Places(runtime)
    batches: list[Task] = []

    class Owner(FakeOwner):
        def age(self) -> bool:
            if len(batches) == 1:
                places.stop_once("isolated", until="looked")
                return False
            places.stop_once("isolated again", until="looked again")
            return True

    class Watched(Limited):
        def has_reclaimable(self) -> bool:
            if isolated_again and places.reached[2:] == ["counted out"]:
                spawn_batch("isolated again")
            answer = super().has_reclaimable()
            if places.reached == ["isolated"]:
                places.stop_once("looked", until="counted out")
            elif isolated_again:
                places.reached.append("looked again")
            return answer

    class Working(AtomicCount):
        def add(self, change: int) -> None:
            super().add(change)
            if change < 0:
                places.stop_once("counted out", until="allocated")

    group = Watched(Lru(runtime), 1)

    def run_batch() -> None:
        core.reclaim(group)

    def spawn_batch(place: str) -> None:
        batches.append(runtime.spawn(run_batch, "batch"))
        places.wait_for(place)

    def main() -> None:
        core.mark_reclaimable(core.alloc(Owner(""), reclaim=False, group=group))
        core._ksgxd.working = Working(runtime)
        spawn_batch("isolated")
        try:
            core.alloc(None, reclaim=reclaim, group=group)
        except EpcBusy:
            places.reached.append("busy")
        places.reached.append("allocated")
        for batch in batches:
            batch.join()

    runtime.run(main)
    assert ("busy" in places.reached) is not reclaim
    assert ("looked again" in places.reached) is isolated_again


# --- watermarks and ksgxd -------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [1024])
@pytest.mark.parametrize(
    ("free", "runs"), [(64, False), (63, False), (32, False), (31, True), (0, True)]
)
def test_ksgxd_wakes_below_the_low_watermark_and_stops_at_the_high_one(
    pages: int, free: int, runs: bool
) -> None:
    core = make_core(pages=pages)
    runtime = core.runtime
    assert isinstance(runtime, InlineRuntime)

    def main() -> None:
        core.start()
        runtime.run_pending()
        fill(core, pages - free)
        assert core.free_pages == free
        runtime.run_pending()
        if runs:
            assert 64 <= core.free_pages < 64 + 16
        else:
            assert core.free_pages == free and core.counters.batches == 0
        core.stop()

    runtime.run(main)
    core.check_invariants()


def test_ksgxd_is_not_woken_when_nothing_can_be_reclaimed() -> None:
    core = make_core(pages=1024)
    runtime = core.runtime
    assert isinstance(runtime, InlineRuntime)

    def main() -> None:
        core.start()
        runtime.run_pending()
        for _ in range(1024):
            core.alloc(None, reclaim=False)
        assert core.counters.wakeups == 0
        core.stop()

    runtime.run(main)


def test_a_busy_allocation_waits_until_a_retry_can_succeed() -> None:
    for seed in range(10):
        runtime = SeededRuntime(seed)
        core = make_core(runtime)

        def main(core: EpcCore = core) -> None:
            core.start()
            fill(core)
            for _ in range(20):
                alloc_like_a_fault(core)
            core.stop()

        runtime.run(main)
        core.check_invariants()


def test_when_ksgxd_can_evict_no_page_the_answer_is_no_memory() -> None:
    runtime = SeededRuntime(1, step_limit=100_000)
    core = make_core(runtime)

    def main() -> None:
        core.start()
        fill(core, prepares=False)
        with pytest.raises(NoEpc):
            alloc_like_a_fault(core)
        core.stop()

    runtime.run(main)


def test_without_ksgxd_a_waiting_task_does_its_work() -> None:
    core = make_core()
    fill(core)
    with pytest.raises(EpcBusy) as refused:
        core.alloc(None, reclaim=False)
    core.wait_for_page(refused.value)
    core.alloc(None, reclaim=False)


def test_ksgxd_can_be_stopped_and_started_again() -> None:
    core = make_core()

    def main() -> None:
        for _ in range(2):
            core.start()
            core.wait_sanitized()
            core.stop()

    assert isinstance(core.runtime, InlineRuntime)
    core.runtime.run(main)


def test_direct_reclaim_runs_only_below_the_low_watermark() -> None:
    core = make_core(pages=1024)
    fill(core, 1024 - 32)
    core.reclaim_direct()
    assert core.counters.batches == 0
    fill(core, 1)
    core.reclaim_direct()
    assert core.counters.batches == 1


# --- sanitizing -----------------------------------------------------------------------------------


def leftovers(runtime: Runtime, **more: object) -> tuple[EpcCore, list[Event]]:
    """A core on a machine whose EPC an earlier kernel has left full of two enclaves."""
    machine = make_machine(epc_pages=PAGES, runtime=runtime)
    for base in (0x10_0000, 0x20_0000):
        build_enclave(machine, base=base, init=False)
    events: list[Event] = []
    core = EpcCore(machine, runtime, tracer=events.append, **more)  # type: ignore[arg-type]
    return core, events


def test_every_page_is_dirty_first_and_free_after_two_passes() -> None:
    runtime = InlineRuntime()
    core, events = leftovers(runtime)
    assert core.free_pages == 0 and core.dirty_pages == PAGES
    core.check_invariants()

    def main() -> None:
        core.start()
        core.wait_sanitized()
        core.stop()

    runtime.run(main)
    assert core.free_pages == PAGES and core.dirty_pages == 0
    assert Sanitized(0) in events
    assert not list(core.hw.valid_pages())  # type: ignore[attr-defined]
    core.check_invariants()


def test_an_allocation_waits_while_pages_are_being_sanitized() -> None:
    for seed in range(5):
        runtime = SeededRuntime(seed)
        core, _events = leftovers(runtime)

        def main(core: EpcCore = core) -> None:
            core.start()
            core.alloc(None, reclaim=True)
            core.wait_sanitized()
            core.stop()

        runtime.run(main)
        core.check_invariants()


@pytest.mark.parametrize("seed", range(5))
def test_a_task_that_looks_while_sanitizing_ends_does_not_wait(seed: int) -> None:
    """It has read that pages are being sanitized; the last of them is sanitized before it waits."""
    runtime = SeededRuntime(seed)
    core, _events = leftovers(runtime)
    core.poison(core.hw.config.sections[0].page(1))  # so that a page is left
    looking = False

    class Stale:
        number = 0

        def add(self, change: int) -> None:
            self.number += change

        @property
        def value(self) -> int:
            number = self.number
            # A bound, since a task that looks with ksgxd's lock held keeps the end from coming.
            for _ in range(1000):
                if looking and self.number:
                    runtime.yield_now()
            return number

    def main() -> None:
        nonlocal looking
        core._ksgxd.working = Stale()  # type: ignore[assignment]
        core.start()
        looking = True
        core.wait_sanitized()
        looking = False
        core.stop()

    runtime.run(main)
    assert core.dirty_pages == 1


def stopped_while_sanitizing(defects: frozenset[Defect]) -> tuple[EpcCore, list[Event]]:
    runtime = InlineRuntime()
    core, events = leftovers(runtime, defects=defects)

    def main() -> None:
        core.start()
        runtime.yield_now()
        core.stop()

    runtime.run(main)
    assert 0 < core.dirty_pages < PAGES
    core.check_invariants()
    return core, events


def test_stopping_while_sanitizing_is_no_failure() -> None:
    core, events = stopped_while_sanitizing(frozenset())
    assert Sanitized(0) in events and core.counters.unsanitized == 0


def test_defect_b18_reports_a_stop_as_a_failure() -> None:
    core, _events = stopped_while_sanitizing(frozenset({Defect.STOPPED_SANITIZE_REPORTED}))
    assert core.counters.unsanitized == core.dirty_pages > 0


@pytest.mark.parametrize(
    ("defects", "count"), [((), PAGES), ((Defect.FREE_PAGES_COUNTED_TWICE,), 2 * PAGES)]
)
def test_pages_are_counted_free_once(defects: tuple[Defect, ...], count: int) -> None:
    runtime = InlineRuntime()
    core, _events = leftovers(runtime, defects=frozenset(defects))

    def main() -> None:
        core.start()
        core.wait_sanitized()
        core.stop()

    runtime.run(main)
    assert core.free_pages == count


@pytest.mark.parametrize(("index", "left"), [(40, 0), (1, 1)])
def test_a_poisoned_page_is_put_away_without_eremove(index: int, left: int) -> None:
    """Page 1 is the child of a SECS, which cannot be removed then."""
    runtime = InlineRuntime()
    core, events = leftovers(runtime)
    core.poison(core.hw.config.sections[0].page(index))

    def main() -> None:
        core.start()
        core.wait_sanitized()
        core.stop()

    runtime.run(main)
    assert core.free_pages == PAGES - 1 - left and core.poisoned_pages == 1
    assert Sanitized(left) in events and core.counters.unsanitized == left
    core.check_invariants()


def test_only_the_pages_named_dirty_are_sanitized() -> None:
    base = make_machine(epc_pages=1).config.sections[0]
    dirty = [base.base + at * PAGE_BYTES for at in (0, 5, 63)]
    core = make_core(dirty=dirty)
    assert core.free_pages == PAGES - 3 and core.dirty_pages == 3
    core.check_invariants()


# --- poison ---------------------------------------------------------------------------------------


def test_poison_outside_the_epc_is_not_ours() -> None:
    core = make_core()
    assert not core.poison(0x1000) and not core.is_epc(0x1000)


def test_a_poisoned_free_page_is_not_free_any_more() -> None:
    core = make_core()
    page = core.hw.config.sections[0].page(7)
    assert core.poison(page + 123) and core.poison(page)
    assert core.free_pages == PAGES - 1
    assert page not in {core.alloc(None, reclaim=True).addr for _ in range(PAGES - 1)}
    with pytest.raises(NoEpc):
        core.alloc(None, reclaim=True)
    core.check_invariants()


def test_a_poisoned_page_leaves_its_list_stays_with_its_owner_and_never_returns() -> None:
    core = make_core()
    pages = fill(core)
    core.poison(pages[0].addr)
    assert not pages[0].tracked
    core.check_invariants()
    for _ in range(PAGES):
        core.reclaim()
    owner = pages[0].owner
    assert isinstance(owner, FakeOwner) and owner.log == []
    core.free(pages[0])
    assert core.free_pages == PAGES - 1
    core.check_invariants()


def test_a_poisoned_page_is_not_listed_again() -> None:
    core = make_core()
    page = core.alloc(FakeOwner(""), reclaim=True)
    core.poison(page.addr)
    core.mark_reclaimable(page)
    assert not page.tracked


def test_defect_b12_evicts_a_poisoned_page() -> None:
    core = make_core(defects=frozenset({Defect.POISONED_PAGE_STAYS_ON_LRU}))
    (page,) = fill(core, 1)
    owner = page.owner
    core.poison(page.addr)
    core.reclaim()
    assert isinstance(owner, FakeOwner) and "write" in owner.log


def test_defect_l5_counts_poisoned_pages_free() -> None:
    core = make_core(defects=frozenset({Defect.POISONED_PAGES_COUNTED_FREE}))
    core.poison(core.hw.config.sections[0].page(7))
    page = core.alloc(None, reclaim=True)
    core.poison(page.addr)
    core.free(page)
    assert core.free_pages == PAGES
    with pytest.raises(AssertionError, match="free count"):
        core.check_invariants()


# --- freeing --------------------------------------------------------------------------------------


def test_a_page_that_eremove_refuses_is_leaked_counted_and_traced() -> None:
    runtime = InlineRuntime()
    machine = make_machine(runtime=runtime)
    events: list[Event] = []
    core = EpcCore(machine, runtime, dirty=(), tracer=events.append)
    page = core.alloc(None, reclaim=True, kind="secs")
    entry = machine.page_at(page.addr)
    assert entry is not None
    entry.fill(PageType.VA)
    with machine.leaf_locks() as another_leaf:
        assert another_leaf.shared(entry)  # EREMOVE ends with #GP
        assert not core.remove(page)
    assert core.counters.leaked == 1 and page.leaked
    assert [event for event in events if isinstance(event, Leaked)] == [
        Leaked(page.addr, "secs", "#GP(0)")
    ]
    core.check_invariants()


def test_removing_frees_what_eremove_has_freed() -> None:
    core = make_core()
    page = core.alloc(None, reclaim=True)
    core.leaves.epa(PageType.VA, page.addr)
    assert core.remove(page)
    assert core.free_pages == PAGES
    core.check_invariants()


def test_a_tracked_page_cannot_be_freed() -> None:
    core = make_core()
    (page,) = fill(core, 1)
    with pytest.raises(AssertionError, match="tracked"):
        core.free(page)


def test_unmarking_says_whether_a_batch_has_the_page() -> None:
    core = make_core()
    first, second = fill(core, 2)
    assert core.unmark_reclaimable(first) and core.unmark_reclaimable(first)
    isolated, _dying = core.root.lru.isolate(1)
    assert isolated == [second]
    assert not core.unmark_reclaimable(second)
    core.root.lru.put_back(second)
    assert core.unmark_reclaimable(second)


# --- groups ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class Limited:
    """A group with a limit below a root without one."""

    lru: Lru
    limit: int
    usage: int = 0
    on_failure: Callable[[], bool] = lambda: False
    parents: list[Limited] = field(default_factory=list)

    def try_charge(self) -> Group | None:
        if self.usage >= self.limit:
            return self
        self.usage += 1
        return None

    def uncharge(self, pages: int = 1) -> None:
        self.usage -= pages
        assert self.usage >= 0, "uncharged more than was charged"

    def walk(self) -> Iterator[Group]:
        while True:
            yield self

    def is_below(self, other: Group) -> bool:
        return other is self

    def describe(self) -> str:
        return f"a group of {self.limit} pages"

    def has_reclaimable(self) -> bool:
        return len(self.lru) > 0

    def reclaim_failed(self) -> bool:
        return self.on_failure()


def limited(core: EpcCore, limit: int) -> Limited:
    return Limited(Lru(core.runtime), limit)


def test_a_group_at_its_limit_gives_up_its_own_page_although_epc_is_free() -> None:
    core = make_core()
    group = limited(core, 2)
    outside = fill(core, 4)
    for _ in range(5):
        page = core.alloc(FakeOwner(""), reclaim=True, group=group)
        core.mark_reclaimable(page)
    assert 1 <= group.usage <= 2 and core.counters.reclaimed == 5 - group.usage
    assert all(page.tracked for page in outside)
    core.check_invariants()


def test_a_group_with_nothing_to_give_gets_no_memory() -> None:
    core = make_core()
    group = limited(core, 2)
    for _ in range(2):
        core.alloc(None, reclaim=True, group=group)
    for reclaim in (True, False):
        with pytest.raises(NoEpc):
            core.alloc(None, reclaim=reclaim, group=group)
    assert group.usage == 2 and core.free_pages == PAGES - 2


def test_a_last_resort_is_asked_before_no_memory() -> None:
    core = make_core()
    group = limited(core, 1)
    victims = [core.alloc(None, reclaim=True, group=group)]

    def kill() -> bool:
        if not victims:
            return False
        core.free(victims.pop())
        return True

    group.on_failure = kill
    core.alloc(None, reclaim=True, group=group)
    with pytest.raises(NoEpc):
        core.alloc(None, reclaim=True, group=group)


def test_ksgxd_reclaims_a_group_at_its_limit_for_tasks_that_may_not() -> None:
    core = make_core()
    group = limited(core, 2)

    def main() -> None:
        core.start()
        for _ in range(4):
            core.mark_reclaimable(alloc_like_a_fault(core, group))
        core.stop()

    assert isinstance(core.runtime, InlineRuntime)
    core.runtime.run(main)
    assert group.usage <= 2 and core.counters.reclaimed >= 2


def test_a_group_in_which_nothing_can_leave_does_not_refuse_others() -> None:
    """One waits for its group, in vain; the other for EPC, which there will be."""
    for seed in range(20):
        runtime = SeededRuntime(seed)
        core = make_core(runtime, pages=32)
        group = limited(core, 2)
        ended: list[str] = []

        def in_group(core: EpcCore = core, group: Group = group, said: list[str] = ended) -> None:
            with pytest.raises(NoEpc):
                alloc_like_a_fault(core, group)
            said.append("none")

        def outside(core: EpcCore = core, said: list[str] = ended) -> None:
            for _ in range(4):
                alloc_like_a_fault(core)
            said.append("got")

        def main(
            core: EpcCore = core, runtime: SeededRuntime = runtime, group: Group = group
        ) -> None:
            core.start()
            for _ in range(2):
                page = core.alloc(FakeOwner("", prepares=False), reclaim=False, group=group)
                core.mark_reclaimable(page)
            fill(core, young=3)
            for task in [runtime.spawn(in_group, "group"), runtime.spawn(outside, "outside")]:
                task.join()
            core.stop()

        runtime.run(main)
        assert sorted(ended) == ["got", "none"]


def test_a_failed_allocation_is_not_charged() -> None:
    core = make_core()
    group = limited(core, 10**9)
    for _ in range(PAGES):
        core.alloc(None, reclaim=True)
    with pytest.raises(NoEpc):
        core.alloc(None, reclaim=True, group=group)
    assert group.usage == 0


def test_eviction_and_freeing_uncharge() -> None:
    core = make_core()
    group = limited(core, PAGES)
    pages = []
    for _ in range(3):
        page = core.alloc(FakeOwner(""), reclaim=True, group=group)
        core.mark_reclaimable(page)
        pages.append(page)
    core.reclaim(group)
    assert group.usage == 3 - core.counters.reclaimed
    for page in pages:
        if page.tracked:
            assert core.unmark_reclaimable(page)
            core.free(page)
    assert group.usage == 0


# --- events ---------------------------------------------------------------------------------------


def test_refusals_and_poison_are_reported() -> None:
    runtime = InlineRuntime()
    machine = make_machine(epc_pages=1, runtime=runtime)
    events: list[Event] = []
    core = EpcCore(machine, runtime, dirty=(), tracer=events.append)
    page = core.alloc(None, reclaim=True)
    with pytest.raises(NoEpc):
        core.alloc(None, reclaim=True, kind="va")
    core.poison(page.addr)
    assert Refused("va", "none") in events and Poisoned(page.addr, False) in events
