"""Swapping with objects that C code does not know, or that change under it, in each implementation.

See ``test_paging_corners`` for the method.  ``FLAT`` are the implementations with flat backing.
"""

from __future__ import annotations

import random
import time
import weakref
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from tests.differential.test_leaf_corners import BEFORE, step
from tests.differential.test_optimised_leaves import VA, Half
from tests.differential.test_optimised_paging import IMPLEMENTATIONS
from tests.differential.test_paging_corners import compare, evicted, isolated, load, pages_of
from tests.differential.test_swap_corners import evict_together
from tests.model.test_random_programs import World
from tests.support.hw import RepeatingRuntime

from softsgx import compiled
from softsgx.arch import VA_SLOTS
from softsgx.driver import FaultResult
from softsgx.paging import EpcBusy
from softsgx.paging.entries import SwapEntry
from softsgx.paging.flat import FlatFile
from softsgx.paging.nodes import Node
from softsgx.paging.sealed import BLOCK_PAGES
from softsgx.runtime import InlineRuntime
from softsgx.sim.stories.system import build, plan_for

FLAT = IMPLEMENTATIONS[:-1]


def world_of(optimised: Any, epc_pages: int = 80) -> World:
    return World(epc_pages, runtime=RepeatingRuntime(seed=7), optimised=optimised)


# --- evictions ------------------------------------------------------------------------------------


def test_backing_that_is_fetched_late_is_not_reserved_with_the_slot() -> None:
    def action(world: World) -> object:
        (page,) = isolated(world)
        page.swap._late_backing = True
        assert page.prepare() and page.block()
        seen = page.reservation.pinned is None
        done = page.write()
        page.swap._late_backing = False
        return seen, done, page.epc is None

    assert compare(action) == (True, True, True)


def test_numbers_that_were_cleared_are_not_used_again() -> None:
    def action(world: World) -> object:
        first, second = pages_of(world)[:2]
        swap, seen = first.swap, list[object]()
        for page in (first, second):
            assert world.system.core.evict(page.epc)
            (chunk,) = map(weakref.ref, swap.entries._numbers.chunks.values())
            seen.append(page.entry is None)
            swap.entries.clear()
            seen.extend((page.entry is None, chunk() is None))
        return seen

    assert compare(action) == [False, True, True] * 2


class NotingFile(FlatFile):
    """A file of another class, which C code asks."""

    __slots__ = ()
    log: ClassVar[list[str]] = []

    def reserve(self, index: int, *, announced: bool = True) -> Any:
        self.log.append("reserve")
        return super().reserve(index, announced=announced)

    def keep(self, pinned: Any, page: Any) -> None:
        self.log.append("keep")
        super().keep(pinned, page)

    def kept(self, index: int) -> Any:
        self.log.append("kept")
        return super().kept(index)

    def forget(self, index: int) -> None:
        self.log.append("forget")
        super().forget(index)


@pytest.mark.parametrize("optimised", FLAT)
def test_a_file_of_another_class_is_asked_itself(optimised: Any) -> None:
    world = world_of(optimised)
    (page,) = evicted(world)
    load(world, page, group=world.group)
    NotingFile.log = []
    page.swap._file.__class__ = NotingFile
    assert page.epc.lru.isolate_page(page.epc)
    assert page.prepare() and page.block() and page.write()
    load(world, page, group=world.group)
    page.swap._file.__class__ = FlatFile
    assert list(dict.fromkeys(NotingFile.log)) == ["reserve", "keep", "kept", "forget"]


def test_a_write_tells_where_the_page_is() -> None:
    def action(world: World) -> object:
        first, second = isolated(world, 2)
        seen: list[object] = []
        for page in (first, second):
            assert page.prepare() and page.block()
            reservation, page.reservation = page.reservation, None
            entry = page.swap.write(page.epc, reservation)
            seen.append((entry.index, entry.index == page.index, entry.slot is reservation.slot))
            page.being_reclaimed, page.epc, page.entry = False, None, entry
        return seen

    assert [(same, slot) for _index, same, slot in compare(action)] == [(True, True)] * 2


@pytest.mark.parametrize("why", ["locked", "misaligned"])
def test_an_eblock_that_fails_leaves_the_page_where_it_is(why: str) -> None:
    def action(world: World) -> object:
        (page,) = isolated(world)
        addr = page.epc.addr
        entry = world.system.machine.pages[addr]
        assert page.prepare()
        if why == "locked":
            entry.lock = -1
        else:
            page.epc.addr = addr | 8
        done = page.block()
        entry.lock, page.epc.addr = 0, addr
        seen = done, page.reservation is None, page.being_reclaimed, page.epc.blocked
        page.epc.lru.put_back(page.epc)
        page.put()
        return seen

    assert compare(action) == (False, True, False, False)


@pytest.mark.parametrize("optimised", FLAT)
def test_a_page_is_kept_though_the_room_for_it_is_gone(optimised: Any) -> None:
    world = world_of(optimised)
    (page,) = evicted(world)
    load(world, page, group=world.group)
    assert page.epc.lru.isolate_page(page.epc)
    assert page.prepare() and page.block()
    sealed = page.swap._backing.sealed
    while sealed.free:
        sealed.free.pop()
    assert page.write() and len(sealed._blocks) == 2
    assert load(world, page, group=world.group) is page.epc


@pytest.mark.parametrize("room", [0, 1])
@pytest.mark.parametrize("optimised", FLAT)
def test_a_reservation_makes_room_where_others_have_reserved_all(optimised: Any, room: int) -> None:
    world = world_of(optimised)
    (page,) = evicted(world)
    load(world, page, group=world.group)
    sealed = page.swap._backing.sealed
    while len(sealed.free) > 1 + room:
        sealed.free.pop()
    first, second = isolated(world, 2)
    assert first.prepare() and second.prepare()
    assert (len(sealed._blocks), len(sealed.free)) == ((2, BLOCK_PAGES + 1), (1, 2))[room]
    for each in (first, second):
        assert each.block() and each.write()


def test_the_clock_of_a_fault_is_that_of_the_runtime() -> None:
    times = iter(range(10, 1000, 5))
    spent = []
    for optimised in FLAT:
        for clock_ns in (time.monotonic_ns, lambda: next(times)):
            runtime = InlineRuntime(clock_ns=clock_ns)
            world = World(80, runtime=runtime, optimised=optimised)
            (page,), process = evicted(world), world.actor.process
            before, began = page.enclave.counts.fault_ns, time.monotonic_ns()
            assert process.mm.fault(page.linaddr, 1, process) is FaultResult.NOPAGE
            most = time.monotonic_ns() - began
            spent.append((page.enclave.counts.fault_ns - before, most))
    for real, made in zip(spent[::2], spent[1::2], strict=True):
        assert 0 < real[0] <= real[1] and made[0] == 5


# --- loads ----------------------------------------------------------------------------------------


class Idle:
    """A task that is not true."""

    def __bool__(self) -> bool:
        return False


@pytest.mark.parametrize("task", [None, Idle()])
def test_a_fault_of_no_task_is_one_of_the_owner(task: Any) -> None:
    def action(world: World) -> object:
        (page,), process = evicted(world), world.actor.process
        result = process.mm.fault(page.linaddr, 1, task)
        return result, page.epc.group is world.group

    assert compare(action) == (FaultResult.NOPAGE, True)


def test_a_page_that_is_lost_is_never_loaded() -> None:
    def action(world: World) -> object:
        (page,), process, core = evicted(world), world.actor.process, world.system.core
        kept, free = page.entry, core.free_pages
        page.entry = SwapEntry(page.index, None)
        seen = [process.mm.fault(page.linaddr, 1, process), page.enclave.refusal]
        seen += [core.free_pages - free, dict(page.enclave.counts.faults)]
        page.entry, page.enclave.refusal = kept, ""
        return seen

    assert compare(action)[:3] == [FaultResult.SIGBUS, "lost", 0]


@pytest.mark.parametrize("pages", [BLOCK_PAGES - 1, BLOCK_PAGES, 2 * BLOCK_PAGES + 3])
@pytest.mark.parametrize("optimised", FLAT)
def test_blocks_of_ciphertext_are_freed_with_the_last_page(optimised: Any, pages: int) -> None:
    world = world_of(optimised, pages + 100)
    build(world.actor.process, plan_for(pages), base=1 << 32)
    enclave = world.system.driver.enclaves[-1]
    every: list[Any] = list(enclave.pages.values())
    resident = [page for page in every if page.epc is not None and page.epc.lru is not None]
    backing: Any = enclave.swap._backing
    sealed = backing.sealed
    places = -(-len(resident) // BLOCK_PAGES)
    for at in range(0, len(resident), 16):
        evict_together(world, resident[at : at + 16])
    assert len(sealed._blocks) == places and len(sealed) in (len(resident), len(resident) + 1)
    for page in every:
        if page.entry is not None:
            load(world, page, group=world.group)
    assert len(sealed._blocks) == 1 and not len(sealed)
    assert sorted(sealed.free) == list(range(BLOCK_PAGES))


@pytest.mark.parametrize("optimised", FLAT)
def test_pages_of_many_chunks_come_and_go_in_any_order(optimised: Any) -> None:
    world, rng = world_of(optimised, 700), random.Random(1)
    build(world.actor.process, plan_for(600), base=1 << 32)
    enclave = world.system.driver.enclaves[-1]
    every: list[Any] = [page for page in enclave.pages.values() if page.epc and page.epc.lru]
    backing: Any = enclave.swap._backing
    rng.shuffle(every)
    for at in range(0, len(every), 16):
        evict_together(world, every[at : at + 16])
    assert enclave.swap.secs is None, "the SECS leaves with the last page"
    groups = {page.index // 32 for page in every} | {enclave.swap._pages // 32}
    assert backing.pcmd_pages == len(groups) > 16
    rng.shuffle(every)
    for page in every[:300]:
        load(world, page, group=world.group)
    gone = {page.index: page for page in every if page.entry is not None}
    assert backing.pcmd_pages == len({index // 32 for index in gone})
    assert [index for index, _sealed in backing.sealed.items()] == sorted(gone)
    # C code holds none of the chunks once they are cleared.
    numbers = (enclave.swap.entries._numbers, backing.sealed._places, backing.sharers)
    chunks = [weakref.ref(chunk) for each in numbers for chunk in each.chunks.values()]
    assert len(chunks) > 10
    for each in numbers:
        each.clear()
    assert not any(chunk() for chunk in chunks)


def test_a_load_without_a_free_page_has_used_its_va_page() -> None:
    def action(world: World) -> object:
        core = world.system.core
        (page,) = evicted(world)
        taken = [core.alloc(None, reclaim=False) for _ in range(core.free_pages)]
        va_page = page.entry.slot.page
        va_page.accessed, busy = False, core.counters.alloc_busy
        seen: list[object] = []
        for group in (None, world.group):
            try:
                page.swap.load(page.entry, page, group=group)
            except EpcBusy as error:
                seen.append((error.outcomes, error.group is core.root, error.pause))
        seen += [va_page.accessed, core.counters.alloc_busy - busy, core._ksgxd.asleep]
        seen.append([group.describe() for group in core._ksgxd._requests])
        seen.append([world.tree.root.events_local, world.group.events])
        core._ksgxd._requests.clear()
        for epc in taken:
            core.free(epc)
        return seen

    _first, _second, accessed, refused, *_rest = compare(action)
    assert accessed is True and refused == 2


def test_a_load_that_waited_in_vain_is_refused_once() -> None:
    def action(world: World) -> object:
        core = world.system.core
        (page,) = evicted(world)
        taken = [core.alloc(None, reclaim=False) for _ in range(core.free_pages)]
        core._ksgxd._oom_verdicts[core.root] = 1
        seen: list[str] = []
        for _ in range(2):
            try:
                page.swap.load(page.entry, page)
            except Exception as error:
                seen.append(type(error).__name__)
        core._ksgxd._requests.clear()
        core._ksgxd._oom_verdicts.clear()
        for epc in taken:
            core.free(epc)
        return seen, core.counters.alloc_none, core.counters.alloc_busy

    assert compare(action)[0] == ["NoEpc", "EpcBusy"]


def test_a_load_takes_a_page_of_another_node_where_the_first_has_none() -> None:
    def action(world: World) -> object:
        core = world.system.core
        (page,) = evicted(world)
        freed = core._pool.first(0).freed
        kept = [freed.popleft() for _ in range(len(freed))]  # pages that were never used are left
        epc = load(world, page, group=world.group)
        for each in kept:
            freed.append(each)
        return epc.addr, core.counters.held["reg"]

    compare(action)


# --- leaves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [False, True])
def test_a_slot_that_cannot_be_read_is_an_error(fast: bool) -> None:
    half = Half(fast=fast)
    for leaf in BEFORE["try_ewb"]:
        half.run(step(leaf, 0))
    half.page(VA).slots = []
    with pytest.raises(IndexError):
        half.run(step("try_ewb", 0))


@pytest.mark.parametrize("leaf", ["eblock", "try_ewb", "try_eldu"])
def test_a_leaf_that_is_replaced_is_called(leaf: str) -> None:
    def action(world: World) -> object:
        (page,), calls = isolated(world), list[str]()
        leaves: Any = world.system.core.leaves
        real = getattr(leaves, leaf)

        def noting(*operands: Any) -> Any:
            calls.append(leaf)
            return real(*operands)

        setattr(leaves, leaf, noting)
        assert page.prepare() and page.block() and page.write()
        load(world, page, group=world.group)
        setattr(leaves, leaf, real)
        return bool(calls) or world.optimised is False

    assert compare(action) is True


@pytest.mark.parametrize("optimised", FLAT)
def test_a_leaf_that_is_replaced_by_a_builtin_is_called(optimised: Any) -> None:
    world = world_of(optimised)
    (page,) = evicted(world)
    leaves: Any = world.system.core.leaves
    calls: list[object] = []
    leaves.try_eldu = calls.append
    with pytest.raises(TypeError, match=r"append\(\) takes exactly one argument \(6 given\)"):
        load(world, page)


@pytest.mark.parametrize("optimised", FLAT)
def test_pages_of_zeros_share_their_bytes_when_they_are_loaded(optimised: Any) -> None:
    world = world_of(optimised)
    machine = world.system.machine
    pages = pages_of(world)[:2]
    for page in pages:
        entry = machine.page_at(page.epc.addr)
        assert entry is not None
        machine.store.fill(entry, bytes(4096))
    evicted(world, 2)
    store: Any = machine.store
    first, second = (store._pages[load(world, page, group=world.group).addr] for page in pages)
    assert first is second and first == bytes(4096)


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(("batch", "scan"), [(1, 1), (2, 2), (2, 5), (3, 6), (5, 2), (16, 40)])
def test_a_batch_takes_as_many_pages_as_it_may(batch: int, scan: int, force: bool) -> None:
    def action(world: World) -> object:
        core, process, points = world.system.core, world.actor.process, list[str]()
        reclaimer: Any = core._reclaimer
        reclaimer._batch_pages, reclaimer._scan_pages = batch, scan
        reclaimer._point = points.append
        pages = pages_of(world)
        for page in pages[:2]:
            assert process.mm.fault(page.linaddr, 1, process) is FaultResult.NOPAGE
            process.ptes.translate(page.linaddr, 1, user=True)
        lru = pages[0].epc.lru
        done = reclaimer.batch(lru, force=force)
        counters = core.counters
        seen = done.scanned, done.freed, counters.batches, counters.scanned, counters.reclaimed
        steps.append(points)
        return seen, len(lru)

    steps: list[list[str]] = []
    (scanned, freed, *_counters), _left = compare(action)
    assert freed <= batch and scanned <= max(batch, scan) and (freed or not force)
    assert steps[-1][-2:] == ["reclaim: block", "reclaim: write"]
    if compiled.speedups is not None:  # where tasks do not interleave, a point does nothing
        assert steps[0] == []


def test_pages_of_dying_owners_count_as_scanned() -> None:
    def action(world: World) -> object:
        core = world.system.core
        lru = pages_of(world)[0].epc.lru
        epcs = [core.alloc(None, reclaim=False, group=world.group) for _ in range(3)]
        others = list(lru)
        lru.pages.remove_all(others)
        for epc in epcs:
            epc.owner = SimpleNamespace(get=lambda: False)
            lru.add(epc)
        for epc in others:
            lru.pages.append(epc)
        done = core._reclaimer.batch(lru, force=True)
        for epc in epcs:
            core.free(epc)
        return done.scanned, done.freed, core.counters.dying

    scanned, freed, dying = compare(action)
    assert dying == 3 and freed == scanned - 3


@pytest.mark.parametrize("step", ["free", "mark_reclaimable"])
def test_a_verdict_ends_when_a_page_is_free_or_can_be_evicted(step: str) -> None:
    def action(world: World) -> object:
        core, owner = world.system.core, pages_of(world)[0]
        epc, ksgxd = core.alloc(owner, reclaim=False, group=world.group), core._ksgxd
        ksgxd._oom_verdicts[core.root], ksgxd._gave_up, ksgxd._waiters = 1, True, 1
        getattr(core, step)(epc)
        seen = len(ksgxd._oom_verdicts), ksgxd._gave_up, ksgxd._waiters
        ksgxd._waiters = 0
        if step != "free":
            assert core.unmark_reclaimable(epc)
            core.free(epc)
        return seen

    assert compare(action) == (0, False, 0 if step == "free" else 1)


def test_a_freed_page_goes_back_to_its_node() -> None:
    def action(world: World) -> object:
        core = world.system.core
        pool, epc = core._pool, core.alloc(None, reclaim=False)
        usual = pool.nodes
        far = Node(1, world.system.runtime, pool.records)
        pool.nodes, epc.node = {**usual, 1: far}, 1
        core.free(epc)
        seen = [each.addr == epc.addr for each in far.freed]
        pool.nodes, epc.node = usual, 0
        usual[0].freed.append(far.freed.popleft())
        return seen

    assert compare(action) == [True]


@pytest.mark.parametrize("waiting", [0, 1])
def test_the_end_of_a_fault_tells_a_task_that_waits_to_change_mappings(waiting: int) -> None:
    def action(world: World) -> object:
        (page,), process = evicted(world), world.actor.process
        lock, told = process.mm.mmap_lock, list[int]()
        real, readers = lock._changed, lock._readers
        lock._changed = SimpleNamespace(notify_all=lambda: told.append(lock._readers))
        lock._waiting = waiting
        result = process.mm.fault(page.linaddr, 1, process)
        lock._waiting, lock._changed = 0, real
        # Python code without interleaving tasks does not take the lock, so that none waits for it.
        right = told == ([] if world.optimised is True else [0] * waiting)
        return result, right, lock._readers - readers

    assert compare(action) == (FaultResult.NOPAGE, True, 0)


def test_a_page_that_is_loaded_again_was_touched_once() -> None:
    def action(world: World) -> object:
        (page,), process = evicted(world), world.actor.process
        page.touched, before = False, page.enclave.counts.touched
        for _ in range(2):
            assert process.mm.fault(page.linaddr, 1, process) is FaultResult.NOPAGE
            assert world.system.core.evict(page.epc)
        load(world, page, group=world.group)
        return page.touched, page.enclave.counts.touched - before

    assert compare(action) == (True, 1)


def test_a_fault_finds_versions_in_every_va_page() -> None:
    pages = VA_SLOTS + 40

    def action(world: World) -> object:
        process, plan = world.actor.process, plan_for(pages)
        process.mmap(build(process, plan, base=1 << 32), 1 << 32, plan.size, 1)
        enclave = world.system.driver.enclaves[-1]
        every: list[Any] = list(enclave.pages.values())
        resident = [page for page in every if page.epc is not None and page.epc.lru is not None]
        for at in range(0, len(resident), 16):
            evict_together(world, resident[at : at + 16])
        some = [page for page in every if page.entry is not None][:: VA_SLOTS // 8]
        slots = [(page.entry.slot.page.index, page.entry.slot.number) for page in some]
        results = [process.mm.fault(page.linaddr, 1, process) for page in some]
        return set(results), len({va_page for va_page, _number in slots}), slots

    assert compare(action, pages + 150)[:2] == ({FaultResult.NOPAGE}, 2)
