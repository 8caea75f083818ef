"""Loads in one step: what random programs seldom meet, in each implementation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.differential.test_optimised_paging import (
    IMPLEMENTATIONS,
    Implementation,
    evicted_beside_its_va_page,
)
from tests.model.test_random_programs import World

from softsgx.arch import PageType
from softsgx.cgroup import EpcCgroup
from softsgx.paging import Claim, FaultResult, FlatBacking, LinuxPolicy
from softsgx.paging.optimised import PlainSwap

pytestmark = pytest.mark.parametrize("optimised", IMPLEMENTATIONS)


class Thread:
    """A task with a claim."""

    def __init__(self, world: World) -> None:
        process = world.actor.process
        self.mm, self.group, self.claim = process.mm, process.group, Claim()


def data_pages(world: World) -> list[Any]:
    """The data pages of the first enclave."""
    pages = world.system.driver.enclaves[0].pages.values()
    return [page for page in pages if page.kind is PageType.REG]


def evict(world: World, *pages: Any) -> None:
    for page in pages:
        assert page.epc is not None and world.system.core.evict(page.epc)


def fault(world: World, page: Any, task: Any = None) -> None:
    mm = world.actor.process.mm
    assert mm.fault(page.linaddr, 1, task) is FaultResult.NOPAGE
    assert page.epc is not None


def test_a_fault_keeps_the_va_page_that_it_needs(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    page, va_page = evicted_beside_its_va_page(world)
    fault(world, page)
    assert va_page.eviction is None and va_page.epc is not None


@pytest.mark.parametrize("loads_left", [0, 2])
def test_a_fault_of_the_holder_keeps_its_page_unless_its_loads_are_used_up(
    optimised: Implementation, loads_left: int
) -> None:
    world = World(80, optimised=optimised)
    page, thread, core = data_pages(world)[0], Thread(world), world.system.core
    evict(world, page)
    core.claims.holder = thread.claim
    thread.claim.loads_left = loads_left
    fault(world, page, thread)
    assert page.epc.kept == bool(loads_left)
    assert core.claims.holder is (thread.claim if loads_left else None)
    if loads_left:
        assert thread.claim.loads_left == loads_left - 1
        core.claims.release(thread.claim)


def test_a_fault_waits_for_the_lock_of_its_enclave(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    page, process = data_pages(world)[0], world.actor.process
    evict(world, page)
    with page.enclave.lock, pytest.raises(AssertionError, match="taken twice"):
        process.mm.fault(page.linaddr, 1)
    assert page.epc is None and not process.mm.mmap_lock.has_writer
    fault(world, page)


def test_a_fault_takes_no_page_that_was_poisoned(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    page, core = data_pages(world)[0], world.system.core
    evict(world, page)
    first = core._pool.nodes[0].freed[0]
    core.poison(first.addr)
    fault(world, page)
    assert page.epc is not first and not page.epc.poisoned
    world.check()


def test_a_fault_has_used_its_va_page(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    page = data_pages(world)[0]
    evict(world, page)
    va_page = page.entry.slot.page
    va_page.accessed = False
    fault(world, page)
    assert va_page.accessed


def test_a_fault_that_leaves_few_pages_wakes_ksgxd(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    page, core = data_pages(world)[0], world.system.core
    evict(world, page)
    core._ksgxd.asleep = True
    while core.free_pages > core._low:
        core.alloc(None, reclaim=False)
    assert core.counters.wakeups == 0
    core.free(core.alloc(None, reclaim=False))
    before = core.counters.wakeups
    fault(world, page)
    assert core.counters.wakeups == before + 1


def many_pages(optimised: Implementation, *, room: bool) -> World:
    """A world with an enclave whose pages were evicted in batches, from two VA pages."""
    policy = LinuxPolicy(batch_pages=16, scan_pages=16)
    world = World(700, optimised=optimised, policy=policy, data_pages=600)
    core, enclave = world.system.core, world.system.driver.enclaves[0]
    if room and optimised:
        backing: Any = enclave.swap._backing
        backing.sealed.make_room(700)
    while sum(page.epc is not None for page in enclave.pages.values()) > 20:
        assert core.reclaim(force=True).scanned
        enclave.swap.va.check_invariants()
    return world


def test_a_fault_loads_the_page_of_its_own_chunk(optimised: Implementation) -> None:
    """The chunk of the latest fault is known, where a page of the same place is evicted, too."""
    world = World(700, optimised=optimised, data_pages=400)
    pages = {page.index: page for page in data_pages(world)}
    places = [128 + 128 * chunk + place for chunk in range(2) for place in (3, 4, 5)]
    evict(world, *map(pages.__getitem__, places))
    for index in (260, 131, 259, 132, 261, 133):
        fault(world, pages[index])
        places.remove(index)
        assert [at for at, page in pages.items() if page.epc is None] == places


def test_a_batch_uses_slots_of_several_va_pages(optimised: Implementation) -> None:
    world = many_pages(optimised, room=True)
    enclave = world.system.driver.enclaves[0]
    va_pages = enclave.swap.va.pages()
    assert [va_page.epc is None or va_page.epc.tracked for va_page in va_pages] == [False, True]
    world.check()


@pytest.mark.parametrize("kind", [PageType.TCS, PageType.REG])
def test_a_page_with_other_flags_is_loaded_at_once(
    optimised: Implementation, kind: PageType, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(80, optimised=optimised)
    enclave = world.system.driver.enclaves[0]
    pages = [page for page in enclave.pages.values() if page.kind is kind]
    evict(world, *pages)
    monkeypatch.setattr(PlainSwap, "_load_by_leaf", None)
    for page in pages:
        fault(world, page)
    if optimised:
        backing: Any = enclave.swap._backing
        assert isinstance(backing, FlatBacking) and not backing.unusual


def test_the_places_of_many_pages_are_freed(optimised: Implementation) -> None:
    world = many_pages(optimised, room=False)
    enclave = world.system.driver.enclaves[0]
    backing, va = enclave.swap._backing, enclave.swap.va
    assert len(va) == 2
    va.check_invariants()
    assert [va_page.epc is None or va_page.epc.tracked for va_page in va.pages()] == [False, True]
    if isinstance(backing, FlatBacking):
        assert len(backing.sealed._blocks) > 2
    for page in enclave.pages.values():
        if page.epc is None:
            entry: Any = page.entry
            va_page = entry.slot.page
            fault(world, page)
            assert va.pages()[0] is va_page, "its slot is not the next that is taken"
    va.check_invariants()
    assert backing.pages() == 0
    if isinstance(backing, FlatBacking):
        assert len(backing.sealed._blocks) == 1
    world.check()


def test_the_latest_loads_of_a_thread_are_recorded(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    pages, thread, claims = data_pages(world)[-3:], Thread(world), world.system.core.claims
    claims.pages = 2
    evict(world, *pages)
    thread.claim.prerequisites[pages[0]] = pages[0]
    for page in pages:
        fault(world, page, thread)
        assert not thread.claim.prerequisites
    assert list(thread.claim.loads.items()) == [(page, page.epc) for page in pages[1:]]
    assert claims.holder is None
    evict(world, pages[1])
    fault(world, pages[1], thread)
    assert list(thread.claim.loads) == [pages[2], pages[1]] and claims.holder is thread.claim
    claims.release(thread.claim)


def test_a_fault_withdraws_the_verdicts(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    page, ksgxd = data_pages(world)[0], world.system.core._ksgxd
    evict(world, page)
    ksgxd._gave_up = True
    ksgxd._oom_verdicts[world.tree.root] = 1
    fault(world, page)
    assert not ksgxd._gave_up and not ksgxd._oom_verdicts


def test_a_fault_in_a_full_group_waits_for_a_page(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    page, group = data_pages(world)[0], world.group
    evict(world, page)
    group.max_pages = group.usage_pages
    mm, task = world.actor.process.mm, world.actor.process
    outcomes = world.system.core._ksgxd.outcomes
    assert mm.fault(page.linaddr, 1, task) is FaultResult.RETRY
    assert group.events == 1 and world.system.core._ksgxd.outcomes > outcomes
    assert world.system.core.counters.alloc_busy == 1
    fault(world, page, task)


def test_a_fault_of_a_task_on_another_node_takes_its_pages_there(
    optimised: Implementation,
) -> None:
    world = World(80, optimised=optimised)
    page, driver = data_pages(world)[0], world.system.driver
    asked: list[object] = []

    def node_of(task: object) -> int:
        asked.append(task)
        return 0

    driver._node_of = node_of
    evict(world, page)
    fault(world, page)
    assert asked == [world.actor.process]


def test_a_fault_charges_the_group_that_its_task_has_then(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    page, process = data_pages(world)[0], world.actor.process
    for group in (world.group.mkdir("moved"), world.group):
        process.group = group
        evict(world, page)
        fault(world, page)
        assert page.epc is not None and page.epc.group is group


def test_a_fault_charges_the_group_that_the_driver_is_told(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    page, driver, other = data_pages(world)[0], world.system.driver, world.group.mkdir("other")
    asked: list[object] = []

    def group_of(task: object) -> EpcCgroup:
        asked.append(task)
        return other

    driver._group_of = group_of
    evict(world, page)
    fault(world, page)
    assert asked == [world.actor.process] and page.epc is not None and page.epc.group is other


def test_the_time_of_a_fault_is_counted(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    page, counts = data_pages(world)[0], world.system.driver.enclaves[0].counts
    evict(world, page)
    counts.fault_ns = 0
    fault(world, page)
    assert counts.fault_ns > 0 and counts.faults == {"major": 1}


def test_a_fault_while_the_page_is_changed_waits(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    page, enclave = data_pages(world)[0], world.system.driver.enclaves[0]
    evict(world, page)
    enclave.modified.add(page)
    mm = world.actor.process.mm
    enclave.changed = cast(Any, SimpleNamespace(wait=enclave.modified.clear))
    assert mm.fault(page.linaddr, 1) is FaultResult.RETRY
    fault(world, page)


def test_an_access_that_the_mapping_forbids_is_refused(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    page, mm = data_pages(world)[0], world.actor.process.mm
    evict(world, page)
    vma = mm.find(page.linaddr)
    assert vma is not None
    assert mm.fault(page.linaddr, 7 & ~vma.prot or 8) is FaultResult.SEGV
    assert page.epc is None
