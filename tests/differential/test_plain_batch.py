"""Batches that leave together, and loads in one step, against the readable path.

Method: the worlds of ``test_optimised_paging`` with policies whose batches are plain, and enclaves
of several batches.  Seeded programs, between whose steps a batch meets what makes it stop being
plain in the middle: a page whose EPCM entry is locked, a slot with a stale version, a processor
that is inside and what may happen while it is interrupted, pages that were accessed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import permutations
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.differential.test_optimised_paging import same, worlds_of
from tests.model.test_random_programs import World

from softsgx.driver import Enclave
from softsgx.driver.plain_batch import evict_together
from softsgx.paging import FaultResult, Fifo, FlatBacking, LinuxPolicy, Policy, SgxEpcPage
from softsgx.paging.plain_load import load_at
from softsgx.paging.reclaim import Batch
from softsgx.runtime import Task

STEPS = (
    *["visit"] * 6,
    *["reclaim"] * 6,
    *["fault"] * 6,
    "store",
    "load",
    "augment",
    "remove",
    "restrict",
    "launch",
    "drop",
    "limit",
    "poison used",
)
HAZARDS = ("locked", "blocked", "kept", "stale", "inside", "accessed", "waiting", "tracked")


class Batches:
    """One world whose pages are accessed and evicted."""

    def __init__(self, world: World) -> None:
        self.world = world

    def drop_unusable(self) -> None:
        """Close enclaves with a poisoned page that is blocked: it can neither be used nor leave."""
        actor = self.world.actor
        for share in list(actor.shares):
            pages = [page.epc for page in share.made.enclave.pages.values()]
            if any(page is not None and page.poisoned and page.blocked for page in pages):
                actor.drop(share)
        if not actor.shares:
            self.world.launch()

    def oldest(self) -> list[SgxEpcPage]:
        core = self.world.system.core
        batch = core.policy.batch(core.epc_pages)
        return list(self.world.group.lru)[:batch]

    def do(self, kind: str, number: int, value: int) -> object:
        world = self.world
        if kind == "fault":
            return self.fault(number)
        if kind in HAZARDS:
            with self.hazard(kind, number, value):
                batch = world.system.core.reclaim(world.group, force=bool(value % 3))
            self.drop_unusable()
            return batch
        world.do(kind, number, value)
        return None

    def fault(self, number: int) -> object:
        """Fault on a page as the processor does, and repeat it once."""
        process = self.world.actor.process
        enclaves = [enclave for enclave in self.world.system.driver.enclaves if enclave.created]
        enclave = enclaves[number % len(enclaves)]
        pages = list(enclave.pages.values())
        page = pages[number // 8 % len(pages)]
        results = [process.mm.fault(page.linaddr + 8, 1, process)]
        if results[0] is FaultResult.RETRY:
            results.append(process.mm.fault(page.linaddr + 8, 1, process))
        return results, enclave.refusal

    @contextmanager
    def hazard(self, kind: str, number: int, value: int) -> Iterator[None]:
        """What a batch meets."""
        world, pages = self.world, self.oldest()
        if not pages:
            yield
            return
        page = pages[number % len(pages)]
        entry, owner = world.system.epcm(page.addr), page.owner
        undo: Callable[[], object] = int
        match kind:
            case "locked":
                entry.lock = 1
                undo = partial(setattr, entry, "lock", 0)
            case "blocked" if entry.valid and entry.secs is not None:
                entry.blocked = True
                undo = partial(_unblock, entry, page)
            case "kept":
                page.kept = True
                undo = partial(setattr, page, "kept", False)
            case "stale":
                self.make_stale(number)
            case "inside":
                undo = self.enter(number, value)
            case "accessed":
                self.access(pages, value)
            case "waiting":
                enclave = getattr(owner, "enclave", None)
                if enclave is not None:
                    enclave.waiting += 1
                    undo = partial(setattr, enclave, "waiting", enclave.waiting - 1)
            case "tracked" if entry.valid and entry.secs is not None:
                world.system.core.leaves.etrack(entry.secs.addr)
        try:
            yield
        finally:
            undo()

    def make_stale(self, number: int) -> None:
        """Give a free slot the version of a page that was dropped."""
        for enclave in self.world.system.driver.enclaves:
            for va_page in enclave.swap.va.pages() if enclave.created else ():
                free = [slot for slot in range(8) if va_page.free >> slot & 1]
                if va_page.epc is not None and va_page.usable and free:
                    slot = free[number % len(free)]
                    if self.world.system.epcm(va_page.epc.addr).valid:
                        self.world.system.epcm(va_page.epc.addr).versions[slot] = 8
                        va_page.stale |= 1 << slot

    def enter(self, number: int, value: int) -> Callable[[], None]:
        """A processor is inside each enclave; it leaves when it is interrupted."""
        undos: list[Callable[[], None]] = []
        for enclave in self.world.system.driver.enclaves:
            if not enclave.created or enclave.swap.secs is None:
                continue
            secs = self.world.system.epcm(enclave.swap.secs.addr)
            if not secs.valid:
                continue
            secs.owner.cur_count += 1
            undos.append(self.kicked(enclave, secs.owner, number, value))

        def undo() -> None:
            for each in undos:
                each()

        return undo

    def kicked(
        self, enclave: Enclave, resident: Any, number: int, value: int
    ) -> Callable[[], None]:
        swap = enclave.swap
        kick = swap._kick

        def interrupt() -> None:
            kick()
            if resident.prev_count:
                resident.prev_count -= 1
            marked = [page for page in enclave.pages.values() if page.being_reclaimed]
            page = marked[number % len(marked)]
            match value % 4:
                case 1 if page.epc is not None and self.world.room():
                    self.world.system.core.poison(page.epc.addr)
                    self.world.poisoned += 1
                case 2:
                    enclave.waiting += 1
                case _:
                    pass

        swap._kick = interrupt

        def undo() -> None:
            swap._kick = kick
            enclave.waiting = 0
            if resident.cur_count:
                resident.cur_count -= 1
            elif resident.prev_count:
                resident.prev_count -= 1

        return undo

    def access(self, pages: list[SgxEpcPage], value: int) -> None:
        """Set accessed bits of some of the pages."""
        process = self.world.actor.process
        for number, page in enumerate(pages):
            linaddr = getattr(page.owner, "linaddr", None)
            if linaddr is not None and process.ptes.entry(linaddr) and value >> number & 1:
                process.ptes._accessed.add(linaddr)


def _unblock(entry: Any, page: SgxEpcPage) -> None:
    """Undo a block of which the core does not know."""
    entry.blocked = entry.blocked and page.blocked


def run(seed: int, kind: type[Policy], steps: int = 40) -> None:
    rng = random.Random(seed)
    batch, epc_pages = rng.randrange(2, 7), rng.choice((64, 96, 112))
    worlds = worlds_of(
        epc_pages,
        policy=kind(batch_pages=batch, scan_pages=batch),
        data_pages=rng.choice((8, 20, 40)),
        limited=True,
    )
    sides = [Batches(world) for world in worlds]
    same(worlds, "start")
    for number in range(steps):
        step = rng.choice(STEPS + HAZARDS), rng.getrandbits(20), rng.getrandbits(20)
        results = [side.do(*step) for side in sides]
        for world in worlds:
            world.check()
        where = seed, number, step
        assert all(result == results[-1] for result in results), where
        same(worlds, where)
    for world in worlds:
        world.finish()


@pytest.mark.parametrize("kind", [LinuxPolicy, Fifo])
@pytest.mark.parametrize("seed", range(12))
def test_plain_batches_do_what_readable_ones_do(seed: int, kind: type[Policy]) -> None:
    run(seed, kind)


def test_the_programs_have_plain_batches_and_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            seen[name] += result is not None
            return result

        return call

    together = counted("batch", evict_together)
    monkeypatch.setattr("softsgx.driver.plain_batch.evict_together", together)
    monkeypatch.setattr("softsgx.driver.optimised.load_at", counted("load", load_at))
    for seed in range(4):
        run(seed, LinuxPolicy)
    assert seen["batch"] > 20 and seen["load"] > 20, seen


@pytest.mark.parametrize("kind", [LinuxPolicy, Fifo])
@pytest.mark.parametrize("scan", [2, 8])
@pytest.mark.parametrize("limit", [None, 3])
def test_batches_scan_and_reserve_as_much_as_readable_ones(
    kind: type[Policy], scan: int, limit: int | None
) -> None:
    """Pages that were accessed, a policy that scans more, backing that is full."""
    policy = kind(batch_pages=2, scan_pages=scan)
    worlds = worlds_of(80, policy=policy, data_pages=12, backing_limit=limit)
    for step in range(6):
        results = []
        for world in worlds:
            side = Batches(world)
            for number in (8, 16, 24):
                side.fault(number)
            side.access(list(world.group.lru)[:4], 0b101 + step)
            for enclave in world.system.driver.enclaves:
                for va_page in enclave.swap.va.pages():
                    va_page.accessed = False
            world.system.core.slowpath.backing_error = "none yet"
            results.append(
                (
                    world.system.core.reclaim(world.group),
                    world.system.core.slowpath.backing_error,
                )
            )
            world.check()
        assert all(result == results[-1] for result in results), (step, results)
        same(worlds, step)


def both(batch: int = 4) -> list[World]:
    """Worlds with batches of a number of pages; there is room for all of them in the backing."""
    worlds = worlds_of(96, policy=Fifo(batch_pages=batch, scan_pages=batch), data_pages=12)
    for world in worlds:
        for enclave in world.system.driver.enclaves:
            backing: Any = enclave.swap._backing
            if isinstance(backing, FlatBacking):
                backing.sealed.make_room(64)
    return worlds


def mapped(world: World, first: int = 3) -> list[Any]:
    """The pages of the first enclave from one of its two mappings on, used in this order."""
    process, enclave = world.actor.process, world.system.driver.enclaves[0]
    pages: list[Any] = [page for page in enclave.pages.values() if page.index >= first]
    lru = world.group.lru
    for page in pages:
        assert process.mm.fault(page.linaddr, 1, process) is FaultResult.NOPAGE
        lru.mark_accessed(page.epc)
    for page in enclave.pages.values():
        if page.index < first and page.epc is not None:
            world.group.lru.mark_accessed(page.epc)
    return pages


def test_a_batch_unmaps_its_pages_in_every_address_space() -> None:
    worlds = both()
    for world in worlds:
        child = world.actor.process.fork()
        pages = mapped(world)
        for page in pages:
            assert child.mm.fault(page.linaddr, 1, child) is FaultResult.NOPAGE
        assert world.system.core.reclaim(world.group).freed == 4
        for page in pages[:4]:
            assert page.epc is None
            assert not any(space.ptes.entry(page.linaddr) for space in (world.actor.process, child))
    same(worlds, "evicted")


def test_a_batch_leaves_entries_of_another_enclave_alone() -> None:
    worlds = both()
    for world in worlds:
        world.launch()
        pages = mapped(world)
        process, other = world.actor.process, world.system.driver.enclaves[1]
        for page in other.pages.values():
            if page.epc is not None:
                world.group.lru.mark_accessed(page.epc)
        vma = process.mm.find(pages[0].linaddr)
        assert vma is not None
        enclave, vma.enclave = vma.enclave, other  # as if a page of it were mapped there
        assert world.system.core.reclaim(world.group).freed == 4
        assert process.ptes.entry(pages[0].linaddr) is not None
        vma.enclave = enclave
        process.ptes.zap_pages([page.linaddr for page in pages[:4]])
    same(worlds, "evicted")


def test_a_poisoned_page_of_a_list_does_not_leave() -> None:
    worlds = both()
    for world in worlds:
        pages = mapped(world)
        pages[2].epc.poisoned = True  # a machine check that has not taken it off its list yet
        assert world.system.core.reclaim(world.group).freed == 3
        assert pages[2].epc is not None and not pages[2].epc.tracked
    same(worlds, "evicted")


@pytest.mark.parametrize("which", range(4))
def test_a_page_that_is_poisoned_while_processors_are_interrupted_stays(which: int) -> None:
    worlds = both()
    for world in worlds:
        pages, core = mapped(world), world.system.core
        enclave = world.system.driver.enclaves[0]
        swap = enclave.swap
        assert swap.secs is not None
        resident, kick = world.system.epcm(swap.secs.addr).owner, swap._kick
        resident.cur_count += 1

        def interrupt(pages: list[Any] = pages, core: Any = core, resident: Any = resident) -> None:
            core.poison(pages[which].epc.addr)
            resident.prev_count = 0

        swap._kick = interrupt
        freed = core.reclaim(world.group).freed
        swap._kick = kick
        assert [page.epc is None for page in pages[1:4]] == [at != which for at in (1, 2, 3)]
        assert freed == 4 - (which > 0) and core.counters.kicks == 1
        assert not any(page.being_reclaimed or page.reservation for page in pages)
    same(worlds, which)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_batch_keeps_the_flags_of_each_page(order: tuple[int, ...]) -> None:
    """The first of them is a TCS."""
    worlds = both(3)
    for world in worlds:
        world.system.core.reclaim(world.group)  # what most pages have is known
        process = world.actor.process
        pages = mapped(world, 0)
        for at in (*order, *range(3, len(pages))):
            world.group.lru.mark_accessed(pages[at].epc)
        assert world.system.core.reclaim(world.group).freed == 3
        assert [page.epc for page in pages[:3]] == [None] * 3
    same(worlds, "evicted")
    for world in worlds:
        process, enclave = world.actor.process, world.system.driver.enclaves[0]
        for page in enclave.pages.values():
            assert process.mm.fault(page.linaddr, 1, process) is FaultResult.NOPAGE
    same(worlds, "loaded")


@pytest.mark.parametrize("since", ["before", "the interrupt"])
def test_those_who_wait_for_a_page_are_told_of_a_batch(since: str) -> None:
    told = []
    worlds = both()
    for world in worlds:
        mapped(world)
        enclave = world.system.driver.enclaves[0]
        swap, changed = enclave.swap, enclave.changed
        assert swap.secs is not None
        resident, kick = world.system.epcm(swap.secs.addr).owner, swap._kick
        calls: list[int] = []
        enclave.changed = cast(Any, SimpleNamespace(notify_all=partial(calls.append, 1)))
        enclave.waiting = int(since == "before")
        resident.cur_count += 1

        def interrupt(resident: Any = resident, enclave: Any = enclave) -> None:
            resident.prev_count, enclave.waiting = 0, 1

        swap._kick = interrupt
        assert world.system.core.reclaim(world.group).freed == 4
        swap._kick, enclave.waiting, enclave.changed = kick, 0, changed
        told.append(len(calls))
    assert told == [4] * len(worlds), "a task that waits is told of each page"
    same(worlds, "told")


def until_handled(fault: Callable[[], FaultResult], results: list[FaultResult]) -> None:
    """Repeat a fault while it asks for that."""
    while not results or results[-1] is FaultResult.RETRY:
        results.append(fault())


def test_a_task_that_waits_since_the_interrupt_for_its_page_goes_on() -> None:
    """The optimised classes do not hold the enclave's lock during an EWB.

    Only the inline runtime has them, and there other tasks run where an EWB interrupts processors.
    """
    results = []
    worlds = worlds_of(96, policy=Fifo(batch_pages=1, scan_pages=1), data_pages=12)
    for world in worlds:
        (page, *_), runtime, process = mapped(world), world.system.runtime, world.actor.process
        enclave = page.enclave
        swap, ended, tasks = enclave.swap, list[FaultResult](), list[Task]()
        assert swap.secs is not None
        resident, kick = world.system.epcm(swap.secs.addr).owner, swap._kick
        resident.cur_count += 1
        fault = partial(process.mm.fault, page.linaddr, 1, process)

        def interrupt(
            resident: Any = resident,
            fault: Any = fault,
            ended: Any = ended,
            tasks: Any = tasks,
            runtime: Any = runtime,
        ) -> None:
            resident.prev_count = 0
            tasks.append(runtime.spawn(partial(until_handled, fault, ended), "fault"))
            runtime.yield_now()

        swap._kick = interrupt
        assert world.system.core.reclaim(world.group).freed == 1
        swap._kick = kick
        tasks[0].join()
        results.append((ended[-1], page.epc is not None, enclave.waiting))
    assert results == [(FaultResult.NOPAGE, True, 0)] * len(worlds)


class EveryOther(LinuxPolicy):
    """A policy that decides itself which pages are old."""

    def old(self, owner: Any) -> bool:
        return bool(owner.index % 2)


def test_a_policy_is_asked_for_each_page() -> None:
    worlds = worlds_of(96, policy=EveryOther(batch_pages=4, scan_pages=4), data_pages=12)
    for world in worlds:
        mapped(world)
        assert world.system.core.reclaim(world.group) == Batch(4, 2)
    same(worlds, "evicted")
