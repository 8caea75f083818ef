"""Batches in subtrees of groups, by each implementation of the core: which group is next, and ends.

See ``test_paging_corners`` for the method.
"""

from __future__ import annotations

import gc
import sys
from itertools import chain
from typing import Any

import pytest
from tests.differential.test_optimised_paging import IMPLEMENTATIONS
from tests.differential.test_paging_corners import compare
from tests.model.test_random_programs import World
from tests.support.owners import FakeOwner

from softsgx import compiled
from softsgx.cgroup import EpcCgroup
from softsgx.defects import Defect
from softsgx.paging.core import EpcCore
from softsgx.paging.groups import Ungrouped
from softsgx.paging.reclaim import Batch
from softsgx.runtime import InlineRuntime

FORCED = pytest.mark.parametrize("force", [False, True])


def tree(world: World, *names: str) -> tuple[EpcCgroup, list[EpcCgroup]]:
    """Return a new group and children of it."""
    top = world.tree.root.mkdir("top")
    return top, [top.mkdir(name) for name in names]


def add(world: World, group: EpcCgroup, owner: FakeOwner, pages: int = 1) -> None:
    core = world.system.core
    for _ in range(pages):
        core.mark_reclaimable(core.alloc(owner, reclaim=False, group=group))


def evicted(log: list[str]) -> list[str]:
    """Return whose pages were written, and forget it."""
    found = [word.split(".")[0] for word in log if word.endswith(".write")]
    log.clear()
    return found


def test_groups_of_a_subtree_take_turns_whoever_walks() -> None:
    def action(world: World) -> object:
        core, log = world.system.core, list[str]()
        core._reclaimer._batch_pages = core._reclaimer._scan_pages = 1
        top, children = tree(world, "a", "b", "c")
        for child in children:
            add(world, child, FakeOwner(child.name, log), 3)
        turns = []
        for walker in (top, top, children[1], top, top, top):
            batch = core.reclaim(walker, force=True)
            turns.append((batch, evicted(log), top._position, walker._position))
        return turns

    turns = compare(action)
    assert [turn[1] for turn in turns] == [["a"], ["b"], ["b"], ["c"], ["a"], ["b"]]
    assert all(turn[0] == Batch(1, 1) for turn in turns)


def test_groups_without_pages_are_passed_over_in_one_call() -> None:
    def action(world: World) -> object:
        core, log = world.system.core, list[str]()
        top, children = tree(world, "a", "b", "c", "d")
        add(world, children[3], FakeOwner("d", log), 2)
        before = core.counters.batches
        batch = core.reclaim(top, force=True)
        return batch, evicted(log), core.counters.batches - before, top._position

    assert compare(action) == (Batch(2, 2), ["d", "d"], 4, 4)


def test_a_subtree_without_pages_ends_after_one_group() -> None:
    def action(world: World) -> object:
        core = world.system.core
        top, _children = tree(world, "a", "b")
        before = core.counters.batches
        batches = [core.reclaim(top), core.reclaim(group=top, force=False)]
        return batches, core.counters.batches - before, top._position

    assert compare(action) == ([Batch(0, 0)] * 2, 2, 2)


def test_a_batch_that_frees_no_page_of_those_it_has_scanned_is_the_last() -> None:
    def action(world: World) -> object:
        core, log = world.system.core, list[str]()
        top, children = tree(world, "a", "b")
        for child in children:
            add(world, child, FakeOwner(child.name, log, young=9))
        before = core.counters.young
        batches = [core.reclaim(top) for _ in range(3)]
        return batches, core.counters.young - before, evicted(log)

    assert compare(action) == ([Batch(1, 0)] * 3, 3, [])


@FORCED
def test_accessed_pages_leave_only_by_force(force: bool) -> None:
    def action(world: World) -> object:
        core, log = world.system.core, list[str]()
        top, _children = tree(world)
        add(world, top, FakeOwner("page", log, young=1))
        return core.reclaim(top, force=force), list(log)

    batch, log = compare(action)
    assert batch == Batch(1, int(force)) and ("page.age" in log) is not force


def test_a_group_that_was_made_or_removed_since_changes_the_walk() -> None:
    def action(world: World) -> object:
        core, log = world.system.core, list[str]()
        core._reclaimer._batch_pages = core._reclaimer._scan_pages = 1
        top, (first,) = tree(world, "a")
        add(world, first, FakeOwner("a", log), 4)
        turns = [core.reclaim(top, force=True), evicted(log)]
        second = top.mkdir("b")
        add(world, second, FakeOwner("b", log), 2)
        first.rmdir()
        for _ in range(5):
            turns += [core.reclaim(top, force=True), evicted(log)]
        return turns, first.usage_pages, len(top.all_children()), [g.name for g in top._order]

    turns, left, children, _order = compare(action)
    assert sorted(chain(*turns[1::2])) == ["a"] * 4 + ["b"] * 2
    assert not left and children == 1


def test_a_group_that_is_made_in_a_batch_is_seen_by_its_walk() -> None:
    def action(world: World) -> object:
        core, log = world.system.core, list[str]()
        top, (first,) = tree(world, "a")

        class Making(FakeOwner):
            def get(self) -> bool:
                late = top.mkdir("late")
                add(world, late, FakeOwner("late", log))
                return super().get()

        add(world, first, Making("a", log))
        core.reclaim(top, force=True)
        turns = [evicted(log)]
        for _ in range(3):
            core.reclaim(top, force=True)
            turns.append(evicted(log))
        return turns

    assert sorted(chain(*compare(action))) == ["a", "late"]


@FORCED
def test_the_root_is_meant_where_no_group_is_named(force: bool) -> None:
    def action(world: World) -> object:
        core = world.system.core
        batches = [core.reclaim(force=force), core.reclaim(None, force=force)]
        return batches, world.tree.root._position, core.counters.scanned

    (first, _second), position, scanned = compare(action)
    assert first.scanned and position == 1 and scanned >= first.scanned


def test_a_batch_is_work_in_progress_while_it_runs_and_takes_time() -> None:
    def action(world: World) -> object:
        core = world.system.core
        ksgxd, top = core._ksgxd, tree(world)[0]
        seen: list[object] = []

        class Looking(FakeOwner):
            def write(self) -> bool:
                seen.append((ksgxd.working.value, ksgxd.generation - generation))
                return True

        add(world, top, Looking("page"))
        generation, outcomes, before = ksgxd.generation, ksgxd.outcomes, core.reclaim_ns
        core.reclaim(top, force=True)
        took = core.reclaim_ns > before
        ended = ksgxd.working.value, ksgxd.generation - generation, ksgxd.outcomes - outcomes
        return seen, ended, took

    assert compare(action) == ([(1, 0)], (0, 2, 1), True)


def test_a_batch_that_raises_is_over_for_those_who_wait() -> None:
    def action(world: World) -> object:
        core = world.system.core
        ksgxd, top = core._ksgxd, tree(world)[0]

        class Raising(FakeOwner):
            def prepare(self) -> bool:
                raise ZeroDivisionError

        add(world, top, Raising("page"))
        generation, before = ksgxd.generation, core.reclaim_ns
        with pytest.raises(ZeroDivisionError):
            core.reclaim(top, force=True)
        return ksgxd.working.value, ksgxd.generation - generation, core.reclaim_ns > before

    assert compare(action) == (0, 1, True)


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_task_that_waits_for_the_end_of_a_batch_looks_again(optimised: Any) -> None:
    runtime = InlineRuntime()
    world = World(40, optimised=optimised, runtime=runtime)
    core = world.system.core
    woken: list[int] = []

    def wait() -> None:
        core._ksgxd.wait_for_batch(core._ksgxd.generation)
        woken.append(core._ksgxd.generation)

    empty = world.tree.root.mkdir("empty")
    waiter = runtime.spawn(wait, "waiter")
    runtime.run_pending()
    assert not woken
    core.reclaim(empty)
    waiter.join()
    assert woken == [core._ksgxd.generation]


def test_a_walk_that_starts_at_the_top_by_a_defect_stays_broken() -> None:
    def action(world: World) -> object:
        core, log = world.system.core, list[str]()
        core._reclaimer._batch_pages = core._reclaimer._scan_pages = 1
        top, children = tree(world, "a", "b")
        for child in children:
            add(world, child, FakeOwner(child.name, log), 3)
        world.tree.defects = frozenset({Defect.GROUP_WALK_STARTS_AT_TOP})
        turns = []
        for _ in range(3):
            core.reclaim(top, force=True)
            turns += evicted(log)
        world.tree.defects = frozenset()
        return turns

    assert compare(action) == ["a", "a", "a"]


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_group_of_another_class_walks_itself(optimised: Any) -> None:
    world = World(40, optimised=optimised)
    core, log = world.system.core, list[str]()
    group: Any = Ungrouped(world.system.runtime)
    owner = FakeOwner("page", log)
    page = core.alloc(owner, reclaim=False, group=group)
    group.lru.add(page)
    assert core.reclaim(group, force=True) == Batch(1, 1) and evicted(log) == ["page"]
    assert core.reclaim(group) == Batch(0, 0)


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_wrong_arguments_of_reclaim_are_refused(optimised: Any) -> None:
    core: Any = World(40, optimised=optimised).system.core
    batches = core.counters.batches
    for arguments, options in (
        ((core.root, True), {}),
        ((core.root,), {"group": core.root}),
        ((), {"forced": True}),
    ):
        with pytest.raises(TypeError):
            core.reclaim(*arguments, **options)
    assert core.counters.batches == batches


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_batches_keep_no_references(optimised: Any) -> None:
    world = World(40, optimised=optimised)
    core, top = world.system.core, tree(world, "a", "b")[0]
    objects = (top, core._ksgxd, core._ksgxd.working, core._reclaimer, top.lru, Batch)

    def counts() -> list[int]:
        gc.collect()
        return [sys.getrefcount(each) for each in objects]

    core.reclaim(top)
    before = counts()
    for _ in range(500):
        core.reclaim(top)
        with pytest.raises(TypeError):
            core.reclaim(top, forced=True)  # type: ignore[call-arg]
    assert all(abs(now - then) < 10 for now, then in zip(counts(), before, strict=True))


def test_a_batch_of_the_compiled_core_is_as_any_other() -> None:
    if compiled.speedups is None:
        pytest.skip(compiled.description)
    core = World(40, optimised="compiled").system.core
    batch = core.reclaim(force=True)
    assert type(core).reclaim is not EpcCore.reclaim
    assert type(batch) is Batch and batch.freed and batch == Batch(batch.scanned, batch.freed)
    assert hash(batch) == hash(Batch(batch.scanned, batch.freed)) and gc.is_tracked(batch)
    assert repr(batch) == f"Batch(scanned={batch.scanned}, freed={batch.freed})"
