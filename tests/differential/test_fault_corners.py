"""The corners of faults and evictions, in each implementation; see ``test_paging_corners``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import ExitStack
from copy import copy
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
from tests.differential.test_optimised_paging import IMPLEMENTATIONS
from tests.differential.test_paging_corners import (
    all_free_pages,
    compare,
    evicted,
    isolated,
    load,
    pages_of,
)
from tests.model.test_random_programs import World
from tests.support.hw import RepeatingRuntime

from softsgx import compiled
from softsgx.arch import PAGE_BYTES, PageType
from softsgx.driver import fault, optimised
from softsgx.paging import Claim, FaultResult, Policy, Prefetching
from softsgx.runtime.failures import Deadlock

STEPS = ("prepare", "block", "write")


def handle(world: World, page: Any, task: object = None) -> tuple[FaultResult, bool]:
    """Handle a fault by the function of the implementation; say whether it has to be waited for."""
    process = world.actor.process
    functions: dict[object, Any] = {
        "compiled": compiled.speedups and compiled.speedups.handle,
        True: optimised.handle,
        False: fault.handle,
    }
    vma = process.mm.find(page.linaddr)
    act = functions[world.optimised]
    result, wait = act(page.enclave, process.mm, vma, page.linaddr, task)
    return result, wait is not None


# --- pages ----------------------------------------------------------------------------------------


def test_the_last_reference_destroys_an_enclave_and_a_destroyed_one_gives_none() -> None:
    def action(world: World) -> object:
        (page,) = isolated(world)
        enclave, seen = page.enclave, []
        seen.append((page.get(), enclave.references))
        page.put()
        seen.append((True, enclave.references))
        page.epc.lru.put_back(page.epc)
        page.put()
        world.actor.drop(world.actor.shares[0])
        seen.append((page.get(), enclave.references))
        return seen

    seen = compare(action)
    assert seen[0][1] == seen[1][1] + 1 and seen[2] == (False, 0)


def test_an_enclave_goes_with_the_last_page_in_a_batch() -> None:
    def action(world: World) -> object:
        page, seen = pages_of(world)[0], list[object]()
        enclave = page.enclave
        assert page.get() and page.get()
        world.actor.drop(world.actor.shares[0])
        for _ in range(2):
            seen.append((enclave.references, world.system.core.free_pages))
            page.put()
        return [*seen, enclave.references, world.system.core.free_pages]

    (first, free), (last, _free), none, freed = compare(action)
    assert (first, last, none) == (2, 1, 0) and freed > free


@pytest.mark.parametrize("method", ["age", "block"])
@pytest.mark.parametrize("writers", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_page_waits_for_address_spaces_that_are_changed(
    optimised: Any, method: str, writers: tuple[int, ...]
) -> None:
    world = World(80, runtime=RepeatingRuntime(seed=7), optimised=optimised)
    process, page = world.actor.process, pages_of(world)[0]
    spaces = process, process.fork()
    for space in spaces:
        assert space.mm.fault(page.linaddr, 1, space) is FaultResult.NOPAGE
    assert page.epc.lru.isolate_page(page.epc)
    assert method == "age" or page.prepare()
    with ExitStack() as held:
        for number in writers:
            held.enter_context(spaces[number].mm.mmap_lock.writing())
        with pytest.raises(Deadlock):
            getattr(page, method)()


def test_pages_of_a_killed_enclave_are_old() -> None:
    def action(world: World) -> bool:
        page = pages_of(world)[0]
        process = world.actor.process
        assert process.mm.fault(page.linaddr, 1, process) is FaultResult.NOPAGE
        process.ptes.translate(page.linaddr, 1, user=True)
        page.enclave.dead = True
        old = page.age()
        page.enclave.dead = False
        return bool(old) and not page.age()

    assert compare(action) is True


@pytest.mark.parametrize("users", [0, 1])
def test_an_address_space_without_users_is_left_out(users: int) -> None:
    def action(world: World) -> object:
        process, page = world.actor.process, pages_of(world)[0]
        assert process.mm.fault(page.linaddr, 1, process) is FaultResult.NOPAGE
        process.ptes.translate(page.linaddr, 1, user=True)
        before, process.mm.users = process.mm.users, users
        old = page.age()
        assert page.epc.lru.isolate_page(page.epc)
        done = page.prepare() and page.block()
        mapped = process.ptes.entry(page.linaddr) is not None
        process.mm.users = before
        assert page.write()
        return old, done, mapped

    assert compare(action) == (not users, True, not users)


@pytest.mark.parametrize("offset", [0, 1, 0x7F8, PAGE_BYTES - 1])
def test_a_fault_anywhere_in_a_page_maps_the_page(offset: int) -> None:
    def action(world: World) -> object:
        process, (page,) = world.actor.process, evicted(world)
        result = process.mm.fault(page.linaddr + offset, 1, process)
        entry = process.ptes.entry(page.linaddr)
        return result, entry is not None and entry[0] == page.epc.addr

    assert compare(action) == (FaultResult.NOPAGE, True)


def test_the_end_of_a_mapping_is_not_part_of_it() -> None:
    def action(world: World) -> object:
        process, page = world.actor.process, pages_of(world)[0]
        mm, seen = process.mm, list[bool]()
        assert mm.fault(page.linaddr, 1, process) is FaultResult.NOPAGE
        # The last mapping that was found: that of another enclave in front of the page, or behind.
        for start, end in ((-1, 0), (1, 2)):
            process.ptes.translate(page.linaddr, 1, user=True)
            other: Any = copy(mm.find(page.linaddr))
            other.start = page.linaddr + start * PAGE_BYTES
            other.end, other.enclave = page.linaddr + end * PAGE_BYTES, None
            mm.found = other
            seen.append(bool(page.age()))
        return seen

    assert compare(action) == [False, False]


@pytest.mark.parametrize("method", STEPS)
def test_a_page_waits_for_the_lock_of_its_enclave(method: str) -> None:
    def action(world: World) -> object:
        (page,) = isolated(world)
        for step in STEPS[: STEPS.index(method)]:
            assert getattr(page, step)()
        with page.enclave.lock, pytest.raises(AssertionError, match="taken twice"):
            getattr(page, method)()
        return [getattr(page, step)() for step in STEPS[STEPS.index(method) :]], page.epc is None

    assert compare(action)[1]


def test_a_page_that_is_written_wakes_those_that_wait_for_it() -> None:
    def action(world: World) -> object:
        (page,) = isolated(world)
        enclave, told = page.enclave, list[bool]()
        assert page.prepare() and page.block()
        enclave.waiting = 1
        notify = SimpleNamespace(notify_all=lambda: told.append(enclave.lock.held()))
        real, enclave.changed = enclave.changed, notify
        written = page.write()
        enclave.changed, enclave.waiting = real, 0
        return written, told, page.epc is None

    assert compare(action) == (True, [True], True)


@pytest.mark.parametrize("power", ["prepared", "blocked", "isolated"])
def test_pages_are_lost_when_power_is(power: str) -> None:
    def action(world: World) -> object:
        pages, seen = isolated(world, 3), []
        for page in pages:
            step = "isolated"
            for method in STEPS:
                if step == power and page is pages[1]:
                    world.system.machine.power_transition()
                seen.append(bool(getattr(page, method)()))
                step = {"prepare": "prepared", "block": "blocked", "write": ""}[method]
        return seen, [page.epc is None for page in pages]

    compare(action)


def test_a_page_that_an_earlier_try_has_blocked_is_blocked() -> None:
    def action(world: World) -> object:
        (page,) = isolated(world)
        assert page.prepare()
        world.system.machine.leaves.eblock(page.epc.addr)
        return page.block(), page.epc.blocked, page.write()

    assert compare(action) == (True, True, True)


def test_a_page_that_eblock_refuses_is_not_written() -> None:
    def action(world: World) -> object:
        (page,) = isolated(world)
        assert page.prepare()
        entry = world.system.machine.pages[page.epc.addr]
        entry.lock = -1  # another leaf has it
        done = page.block()
        entry.lock = 0
        page.epc.lru.put_back(page.epc)
        page.put()
        return done, page.epc.blocked, page.being_reclaimed, page.reservation is None

    assert compare(action) == (False, False, False, True)


def test_only_a_fault_of_eblock_leaves_a_page_to_the_readable_method() -> None:
    def action(world: World) -> int:
        (page,) = isolated(world)
        assert page.prepare()
        core, calls = world.system.core, list[int]()
        leaves = core.leaves

        def eblock(addr: int) -> None:
            calls.append(addr)
            raise ZeroDivisionError

        core.leaves = page.swap._leaves = cast(Any, SimpleNamespace(eblock=eblock))
        with pytest.raises(ZeroDivisionError):
            page.block()
        core.leaves = page.swap._leaves = leaves
        assert page.block() and page.write()
        return len(calls)

    assert compare(action) == 1


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["being_reclaimed", "being_modified"])
def test_a_fault_waits_for_a_page_that_is_marked(mark: str) -> None:
    def action(world: World) -> object:
        (page,) = evicted(world)
        setattr(page, mark, True)
        result = handle(world, page)
        setattr(page, mark, False)
        return result, page.entry is not None

    assert compare(action)[1]


def test_a_fault_waits_for_the_lock_of_the_enclave() -> None:
    def action(world: World) -> object:
        (page,) = evicted(world)
        with page.enclave.lock:
            return handle(world, page)

    assert compare(action) is AssertionError, "taken twice by one task"


@pytest.mark.parametrize("error", [MemoryError, ZeroDivisionError])
def test_a_fault_ends_with_an_error_of_the_page_tables(error: type[Exception]) -> None:
    def action(world: World) -> object:
        (page,) = evicted(world)
        ptes: Any = world.actor.process.mm.ptes

        def install(*_arguments: object) -> None:
            raise error

        real, ptes.install = ptes.install, install
        try:
            return handle(world, page), page.epc is not None, page.touched
        finally:
            ptes.install = real

    result = compare(action)
    if error is ZeroDivisionError:
        assert result is error
    else:
        assert result == ((FaultResult.SIGBUS, False), True, False)


def test_faults_without_a_task_and_twice_are_counted() -> None:
    def action(world: World) -> object:
        pages, seen = evicted(world, 3), []
        for page in [*pages, pages[0]]:
            if page.epc is not None:
                assert world.system.core.evict(page.epc)
            page.touched = page is pages[1]
            seen.append((handle(world, page), page.epc.group and page.epc.group.path))
        counts = pages[0].enclave.counts
        return seen, dict(counts.faults), counts.touched, counts.reloads

    compare(action)


@pytest.mark.parametrize("prot", range(8))
@pytest.mark.parametrize("most", [0, 1, 3, 5])
def test_a_fault_needs_rights_of_page_and_mapping(prot: int, most: int) -> None:
    def action(world: World) -> object:
        (page,) = evicted(world)
        vma = world.actor.process.mm.find(page.linaddr)
        assert vma is not None
        page.max_prot, before = most, vma.prot
        vma.prot = prot
        result = handle(world, page)
        vma.prot = before
        return result

    (result, _wait) = compare(action)
    assert result is (FaultResult.SIGBUS if prot & ~most else FaultResult.NOPAGE)


def test_a_tcs_is_loaded_as_one() -> None:
    def action(world: World) -> object:
        enclave = world.system.driver.enclaves[0]
        page = next(page for page in enclave.pages.values() if page.kind is PageType.TCS)
        assert page.epc is not None and world.system.core.evict(page.epc)
        result = handle(world, page)
        return result, page.epc.kind

    assert compare(action)[1] == "tcs"


# --- claims ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 3])
def test_loads_are_recorded_for_their_thread(most: int) -> None:
    def action(world: World) -> list[object]:
        core, claim, seen = world.system.core, Claim(), list[object]()
        core.claims.pages = most
        pages = evicted(world, 3)
        claim.prerequisites[pages[0]] = pages_of(world)[-1].epc
        for page in [*pages, pages[1]]:
            if page.entry is None:
                assert core.evict(page.epc)
            load(world, page, claim=claim)
            loads: Any = claim.loads.items()
            recorded = [(owner.index, epc.addr) for owner, epc in loads]
            seen.append((recorded, len(claim.prerequisites), core.claims.holder is claim))
        core.claims.release(claim)
        return seen

    seen = compare(action)
    assert len(seen[2][0]) == min(most, 3) and not seen[0][1]
    assert seen[3][2] is (most > 1), "the thread has loaded a page again: it thrashes"


def test_a_load_that_is_forgotten_gives_its_page_back() -> None:
    def action(world: World) -> list[int]:
        core, claim = world.system.core, Claim()
        core.claims.pages = 1
        pages = evicted(world, 3)
        before = [sys.getrefcount(page) for page in pages]
        for each in range(9):
            page = pages[each % 3]
            if page.entry is None:
                assert core.evict(page.epc)
            load(world, page, claim=claim)
        core.claims.release(claim)
        for page in pages:
            assert core.evict(page.epc)
        page = None
        after = [sys.getrefcount(page) for page in pages]
        return [new - old for new, old in zip(after, before, strict=True)]

    assert compare(action) == [0, 0, 0]


def test_a_load_without_owner_is_recorded_for_no_thread() -> None:
    def action(world: World) -> int:
        (page,), claim = evicted(world), Claim()
        page.epc = page.swap.load(page.entry, None, claim=claim)
        page.entry, page.epc.owner = None, page
        world.system.core.mark_reclaimable(page.epc)
        return len(claim.loads)

    assert compare(action) == 0


@pytest.mark.parametrize("whose", ["own", "other's"])
@pytest.mark.parametrize("loads_left", [0, 1, 5])
def test_a_load_respects_the_turn_of_a_thread(whose: str, loads_left: int) -> None:
    def action(world: World) -> object:
        (page,), core, claim = evicted(world), world.system.core, Claim()
        holder = core.claims.holder = claim if whose == "own" else Claim()
        holder.loads_left = loads_left
        core.free(all_free_pages(world).pop())
        try:
            load(world, page, claim=claim, kind="tcs")
        finally:
            seen = core.claims.holder is holder, holder.loads_left, len(claim.loads)
            core.claims.release(holder)
        return seen

    compare(action)


class WithClaim:
    """A process that has a claim, as threads of native programs do."""

    def __init__(self, process: object) -> None:
        self._process, self.claim = process, Claim()

    def __getattr__(self, name: str) -> object:
        return getattr(self._process, name)


def test_a_fault_is_recorded_for_its_thread() -> None:
    def action(world: World) -> object:
        task = WithClaim(world.actor.process)
        for page in evicted(world, 2):
            handle(world, page, task)
        owners: Any = task.claim.loads
        return [owner.index for owner in owners]

    assert len(compare(action)) == 2


@pytest.mark.parametrize("window", [1, 2, 30])
def test_pages_that_are_loaded_ahead_are_younger_than_the_one_asked_for(window: int) -> None:
    def action(world: World) -> object:
        core, pages = world.system.core, pages_of(world)
        core.policy = Prefetching(window_pages=window)
        evicted(world, len(pages))
        result = handle(world, pages[0])
        return result, [page.epc is not None for page in pages]

    assert compare(action)[1][1]


class Noting(Policy):
    """Loads nothing ahead, and notes what it was asked."""

    asked: ClassVar[list[tuple[int, int]]] = []

    def neighbours(self, index: int, pages: int) -> Iterable[int]:
        self.asked.append((index, pages))
        return ()


def test_a_policy_is_told_index_and_size() -> None:
    def action(world: World) -> object:
        world.system.core.policy = Noting()
        (page,) = evicted(world)
        Noting.asked.clear()
        handle(world, page)
        return Noting.asked[0], page.index, page.enclave.size // PAGE_BYTES

    asked, index, pages = compare(action)
    assert asked == (index, pages)
