"""The corners of paging, in each implementation: refusals, locks held, lost power, odd groups.

Method: the same call on the same state, which random programs meet seldom or never, by each
implementation.  Results and the state of ``test_optimised_paging`` must be equal, and a test that
knows the right result compares it with that, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from tests.differential.test_optimised_paging import same, worlds_of
from tests.model.test_random_programs import World
from tests.support.owners import FakeOwner

from softsgx.arch import PageType
from softsgx.cgroup import EpcCgroup
from softsgx.paging import (
    BackingError,
    EpcBusy,
    FlatBacking,
    LoadFailed,
    Policy,
    Reclaimable,
)
from softsgx.paging.nodes import Node

RESULTS = (AssertionError, EpcBusy, LoadFailed, BackingError, MemoryError, ZeroDivisionError)


def compare(action: Callable[[World], object], epc_pages: int = 80, **options: Any) -> Any:
    """Let each implementation act; return what all return: a value, or the type of an error."""
    worlds, results = worlds_of(epc_pages, **options), []
    for world in worlds:
        # Buffers and room in the backing are made by the first eviction.
        (page,) = evicted(world, last=True)
        load(world, page, group=world.group)
        try:
            results.append(action(world))
        except RESULTS as error:
            results.append(type(error))
    same(worlds, "after it")
    assert all(result == results[-1] for result in results), results
    return results[-1]


def pages_of(world: World, number: int = 0) -> list[Any]:
    """Return the ordinary pages of an enclave."""
    enclave = world.system.driver.enclaves[number]
    return [page for page in enclave.pages.values() if page.kind is PageType.REG]


def evicted(world: World, count: int = 1, *, last: bool = False) -> list[Any]:
    """Evict the first pages of the first enclave, or the last ones; return them."""
    pages = pages_of(world)[-count:] if last else pages_of(world)[:count]
    for page in pages:
        if page.epc is not None:
            assert world.system.core.evict(page.epc) and page.entry is not None
    return pages


def load(world: World, page: Any, **options: Any) -> Any:
    """Load a page into its enclave, as a fault does."""
    epc = page.swap.load(page.entry, page, **options)
    page.epc, page.entry = epc, None
    world.system.core.mark_reclaimable(epc)
    return epc


def isolated(world: World, count: int = 1, *, first: int = 0) -> list[Any]:
    """Take pages of the first enclave off their list, as a batch does."""
    pages = pages_of(world)[first : first + count]
    for page in pages:
        assert page.epc.lru.isolate_page(page.epc)
    return pages


def all_free_pages(world: World) -> list[Any]:
    """Allocate every free page: those that are freed then are the ones that a load takes."""
    core = world.system.core
    return [core.alloc(None, reclaim=False) for _ in range(core.free_pages)]


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [(), ("jobs",), ("jobs/a",), ("jobs", "jobs/a"), ("",)])
@pytest.mark.parametrize("room", [1, 2])
def test_a_charge_that_reaches_limits_requests_reclaim_of_each_limited_group(
    limits: tuple[str, ...], room: int
) -> None:
    def action(world: World) -> list[str]:
        (first, second), requested = evicted(world, 2), list[str]()
        child = world.tree.make("jobs/a")
        load(world, first, group=child)
        for path in limits:
            group = world.tree.find(path)
            group.max_pages = group.usage_pages + room
        world.tree.reclaim_ahead = lambda group: requested.append(
            group.describe().split()[1].rstrip(",")
        )
        load(world, second, group=child)
        return requested

    requested = compare(action, 100)
    paths = [f"/{path}" for path in sorted(limits, reverse=True)]
    assert requested == (paths if room == 1 else [])


class Counting(EpcCgroup):
    """A group of another class, which C code asks."""

    __slots__ = ("log",)

    def try_charge(self) -> EpcCgroup | None:
        self.log = [*getattr(self, "log", []), "charge"]
        return super().try_charge()

    def uncharge(self, pages: int = 1) -> None:
        self.log = [*self.log, "uncharge"]
        super().uncharge(pages)


def test_a_group_of_another_class_is_asked_itself() -> None:
    def action(world: World) -> list[str]:
        (page,) = evicted(world)
        group = Counting(world.tree, "counting", world.tree.root)
        world.tree.root.children["counting"] = group
        epc = load(world, page, group=group)
        assert group.own_pages == 1 and world.system.core.evict(epc)
        return group.log

    assert compare(action) == ["charge", "uncharge"]


def test_a_removed_group_goes_with_its_last_page() -> None:
    def action(world: World) -> list[int]:
        pages = evicted(world, 2)
        child = world.tree.make("jobs/a")
        for page in pages:
            load(world, page, group=child)
        child.rmdir()
        left = []
        for page in pages:
            left.append(len(world.group.all_children()))
            assert world.system.core.evict(page.epc)
        return [*left, len(world.group.all_children())]

    assert compare(action) == [1, 1, 0]


def test_no_more_pages_are_uncharged_than_charged() -> None:
    def action(world: World) -> None:
        (page,) = isolated(world)
        assert page.prepare() and page.block() and page.write()
        world.group.own_pages = 0
        for epc in world.system.core._pool.records.values():
            if epc.owner is page:
                epc.tracked = False
                world.system.core.free(epc)

    assert compare(action) is AssertionError


# --- the core -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["tracked", "leaked", "free", "group"])
def test_a_page_that_is_not_to_be_freed_is_refused(wrong: str) -> None:
    def action(world: World) -> None:
        core = world.system.core
        page = core.alloc(None, reclaim=False)
        if wrong == "group":
            page.group = None
        else:
            setattr(page, wrong, True)
        core.free(page)

    worlds = worlds_of(40)
    for world in worlds:
        with pytest.raises(AssertionError):
            action(world)


@pytest.mark.parametrize("wrong", ["tracked", "group"])
def test_a_page_that_cannot_be_a_candidate_is_refused(wrong: str) -> None:
    for world in worlds_of(40):
        page = world.system.core.alloc(None, reclaim=False)
        if wrong == "group":
            page.group = None
        else:
            page.tracked = True
        with pytest.raises(AssertionError):
            world.system.core.mark_reclaimable(page)


def test_loads_wake_ksgxd_below_the_watermark_while_it_sleeps_and_can_reclaim() -> None:
    def action(world: World) -> list[tuple[int, int]]:
        core, seen = world.system.core, list[tuple[int, int]]()
        runtime: Any = world.system.runtime
        core.start()
        runtime.run_pending()
        pages = evicted(world, 4)
        runtime.run_pending()
        taken = all_free_pages(world)
        for _ in range(core._low + 2):
            core.free(taken.pop())
        for page in pages:
            load(world, page)
            seen.append((core.free_pages - core._low, core.counters.wakeups))
        core._ksgxd.asleep, before = False, core.counters.wakeups
        (page,) = evicted(world)
        load(world, page)
        assert core.counters.wakeups == before, "ksgxd is awake"
        core._ksgxd.asleep = True
        for one in taken:
            core.free(one)
        core.stop()
        return seen

    seen = compare(action)
    assert [left for left, _wakeups in seen] == [1, 0, -1, -2]
    (at, two), (below, three) = seen[1], seen[2]
    assert at == 0 and two == seen[0][1] and below == -1 and three == two + 1


def test_ksgxd_is_not_woken_where_no_page_can_be_reclaimed() -> None:
    def action(world: World) -> int:
        core = world.system.core
        runtime: Any = world.system.runtime
        core.start()
        runtime.run_pending()
        (page,) = evicted(world)
        for group in (world.tree.root, world.group):
            for epc in list(group.lru):
                assert group.lru.isolate_page(epc)
        core.free(all_free_pages(world).pop())
        assert core.free_pages < core._low and core._ksgxd.asleep
        before = core.counters.wakeups
        page.swap.load(page.entry, page, group=world.group)
        core._ksgxd._stopping = True
        return core.counters.wakeups - before

    assert compare(action) == 0


def test_a_load_takes_no_page_that_was_poisoned_while_it_was_free() -> None:
    def action(world: World) -> object:
        (page,), taken = evicted(world), all_free_pages(world)[:3]
        for one in taken:
            world.system.core.free(one)
        world.system.core.poison(taken[0].addr)
        epc = load(world, page)
        return epc is taken[1], [one.addr for one in taken], world.system.core.poisoned_pages

    assert compare(action)[0]


def test_a_refused_load_says_what_its_thread_waits_for() -> None:
    def action(world: World) -> object:
        (page,), core, ksgxd = evicted(world), world.system.core, world.system.core._ksgxd
        ksgxd.generation, ksgxd.outcomes = 70, 50
        page.entry.slot.page.accessed = False
        world.group.max_pages = world.group.usage_pages
        with pytest.raises(EpcBusy) as refused:
            load(world, page, group=world.group)
        busy, world.group.max_pages = refused.value, None
        group = busy.group and busy.group.describe().split()[1]
        return busy.outcomes, group, busy.pause, ksgxd.generation, dict(core.counters.held)

    assert compare(action)[0] == 50


@pytest.mark.parametrize("node", [0, 1, 7])
def test_a_load_asks_for_a_page_of_its_node_first(node: int) -> None:
    def action(world: World) -> object:
        (page, another, *_more), pool = evicted(world, 3), world.system.core._pool
        usual = pool.first(0)
        assert len(usual.freed) > 2
        near = Node(node, world.system.runtime, pool.records)
        for _ in range(2):
            near.freed.append(usual.freed.popleft())
        pool._orders.update(dict.fromkeys((0, 1, 7), (usual, near)))
        pool._orders[node] = near, usual
        pool.latest = None
        expected = near.freed[0].addr, usual.freed[0].addr
        loads = (page, node), (another, 1 - node % 2)
        addrs = tuple(load(world, each, cpu_node=number).addr for each, number in loads)
        return addrs == expected, addrs

    assert compare(action)[0]


@pytest.mark.parametrize("leaves", [True, False])
@pytest.mark.parametrize("inside", [0, 1])
@pytest.mark.parametrize("stale", [True, False])
def test_each_try_of_ewb_comes_after_what_makes_it_succeed(
    inside: int, leaves: bool, stale: bool
) -> None:
    """ETRACK before the second, the kick before the third; a processor may stay nevertheless."""

    def action(world: World) -> object:
        system, page = world.system, pages_of(world)[0]
        swap, counters, log = page.swap, system.core.counters, list[int]()
        secs = system.machine.pages[swap.secs.addr].enclave
        assert secs is not None and not secs.prev_count
        first = next(iter(swap.va.pages()))
        if stale:  # the slot that is taken has the version of a page that was dropped
            free = first.free & -first.free
            first.stale |= free
            system.machine.pages[first.epc.addr].versions[free.bit_length() - 1] = 8

        def kick() -> None:
            log.append(secs.prev_count)
            secs.prev_count = secs.prev_count and not leaves

        before, swap._kick, secs.cur_count = swap.ewbs, kick, inside
        done = system.core.evict(page.epc)
        tries = counters.ewb_first, counters.ewb_second, counters.ewb_third, counters.ewb_failed
        secs.prev_count = secs.cur_count = 0
        return done, log, swap.ewbs - before, tries, first.stale

    done, log, ewbs, *_rest = compare(action)
    assert done is (leaves or not inside)
    assert (log, ewbs) == (([1], 3) if inside else ([], 2))


def test_a_pcmd_that_differs_in_the_enclave_alone_is_kept_for_its_page() -> None:
    def action(world: World) -> object:
        backing = pages_of(world)[0].swap._backing
        if isinstance(backing, FlatBacking):
            usual, unusual = backing.usual, backing.unusual
            assert usual is not None
            unusual.update({at: unusual.get(at, usual) for at, _sealed in backing.sealed.items()})
            backing.usual = usual[0], usual[1] + 1
        return [page.entry is not None for page in evicted(world, 4)]

    assert compare(action) == [True] * 4


def test_a_freed_page_is_a_new_generation_and_ends_waits() -> None:
    def action(world: World) -> object:
        core, told = world.system.core, list[str]()
        ksgxd: Any = core._ksgxd
        page = core.alloc(None, reclaim=False)
        real, ksgxd._progress = ksgxd._progress, SimpleNamespace(notify_all=lambda: told.append(""))
        before, ksgxd._gave_up, ksgxd._waiters = (ksgxd.generation, ksgxd.outcomes), True, 2
        core.free(page)
        ksgxd._progress = real
        changes = ksgxd.generation - before[0], ksgxd.outcomes - before[1]
        return changes, len(told), ksgxd._waiters, ksgxd._gave_up

    assert compare(action) == ((1, 1), 1, 0, False)


def test_pages_are_freed_in_order_and_kinds_are_counted() -> None:
    def action(world: World) -> object:
        core = world.system.core
        taken = [core.alloc(None, reclaim=False, kind=kind) for kind in ("reg", "va", "secs")]
        for page in taken:
            core.free(page)
        (node,) = core._pool.nodes.values()
        return [page.addr for page in node.freed], dict(core.counters.held)

    compare(action)


# --- batches --------------------------------------------------------------------------------------


def fakes(world: World, owners: Iterable[FakeOwner]) -> list[Any]:
    """Return EPC pages of the root group with these owners, off their list."""
    core, pages = world.system.core, []
    for owner in owners:
        page = core.alloc(owner, reclaim=False)
        core.mark_reclaimable(page)
        assert core.root.lru.isolate_page(page)
        pages.append(page)
    return pages


@pytest.mark.parametrize("force", [False, True])
def test_each_phase_of_a_batch_skips_what_cannot_go_on(force: bool) -> None:
    def action(world: World) -> object:
        core, log = world.system.core, list[str]()
        reclaimer: Any = core._reclaimer
        lru: Any = core.root.lru
        owners = [
            FakeOwner("young", log, young=1),
            FakeOwner("unprepared", log, prepares=False),
            FakeOwner("unblocked", log, blocks=False),
            FakeOwner("unwritten", log, writes=False),
            FakeOwner("poisoned", log),
            FakeOwner("kept", log),
            FakeOwner("gone", log),
        ]
        skipped: list[str] = []
        skip = reclaimer._skip

        def noted(lru: Any, page: Any, owner: Any, stage: str) -> None:
            skipped.append(f"{owner.name}: {stage}")
            skip(lru, page, owner, stage)

        reclaimer._skip = noted
        pages = fakes(world, owners)
        pages[4].poisoned = pages[5].kept = True
        victims = reclaimer._prepare(lru, pages, force=force)
        blocked = reclaimer._block(lru, victims)
        freed = reclaimer._write(lru, blocked)
        pages[5].kept = pages[4].poisoned = False
        left = [page.owner and page.owner.name for page in pages]
        return log, skipped, len(victims), len(blocked), freed, left, len(lru)

    log, skipped, victims, blocked, freed, _left, _listed = compare(action)
    assert (victims, blocked, freed) == (3 + force, 2 + force, 1 + force)
    assert skipped == [
        "unprepared: prepare",
        "poisoned: poisoned",
        "kept: kept",
        "unblocked: block",
        "unwritten: write",
    ]
    assert ("young.age" in log) is not force


class Chosen(Policy):
    """Evicts pages by name of their owner; fails for one."""

    def old(self, owner: Reclaimable) -> bool:
        assert isinstance(owner, FakeOwner)
        if owner.name == "wrong":
            raise ZeroDivisionError
        return owner.name == "old"


@pytest.mark.parametrize("names", [("old", "young", "old"), ("old", "wrong", "old")])
def test_a_policy_says_which_pages_are_old(names: tuple[str, ...]) -> None:
    def action(world: World) -> object:
        core, log = world.system.core, list[str]()
        core._reclaimer._policy = Chosen()
        pages = fakes(world, [FakeOwner(name, log) for name in names])
        log.clear()
        victims: Any = core._reclaimer._prepare(core.root.lru, pages, force=False)
        return log, [victim.owner.name for victim in victims]

    expected = ["old.prepare", "young.put", "old.prepare"], ["old", "old"]
    assert compare(action) == (expected if "young" in names else ZeroDivisionError)


@pytest.mark.parametrize("method", ["age", "prepare", "block", "write"])
def test_an_error_of_an_owner_ends_a_batch(method: str) -> None:
    def failing() -> bool:
        raise ZeroDivisionError

    def action(world: World) -> object:
        core, owners = world.system.core, [FakeOwner("a"), FakeOwner("b")]
        pages = fakes(world, owners)
        setattr(owners[0], method, failing)
        reclaimer, lru = core._reclaimer, core.root.lru
        victims = reclaimer._prepare(lru, pages, force=method != "age")
        return reclaimer._write(lru, reclaimer._block(lru, victims))

    assert compare(action) is ZeroDivisionError


@pytest.mark.parametrize("phase", ["_prepare", "_block", "_write"])
@pytest.mark.parametrize("wrong", ["no owner", "listed", "elsewhere", "untracked"])
def test_a_page_in_a_batch_has_an_owner_and_is_off_its_list(phase: str, wrong: str) -> None:
    pages: list[Any] = []

    def action(world: World) -> tuple[object, ...]:
        core = world.system.core
        (page,) = fakes(world, [FakeOwner("young", young=1)])
        pages.append(page)
        match wrong:
            case "no owner":
                page.owner = None
            case "listed":
                core.root.lru.put_back(page)
            case "elsewhere":
                page.lru = world.group.lru
            case _:
                page.tracked = False
        options = {"force": False} if phase == "_prepare" else {}
        getattr(core._reclaimer, phase)(core.root.lru, [page], **options)
        return page.tracked, page.lru is None

    results: list[tuple[object, ...]] = []
    for world in worlds_of(40):
        try:
            results.append(action(world))
        except AssertionError:
            results.append((AssertionError, pages[-1].tracked, pages[-1].free))
    assert len(set(results)) == 1, results
    refused = wrong == "no owner" or (phase, wrong) in {
        ("_prepare", "elsewhere"),
        ("_prepare", "untracked"),
        ("_write", "listed"),
        ("_write", "untracked"),
    }
    if refused:
        assert results[0] == (AssertionError, wrong != "untracked", False)
