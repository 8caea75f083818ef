"""The fast paths of paging against the readable ones, on the same histories.

Method: two systems with the same secrets, one with readable classes and backing pages, one with the
optimised classes and a flat backing, execute the same random programs, in small EPCs and under all
that may happen to them (``tests/model``): reclaim, poison, limits, full backing, loss of power, a
kill.  After each step everything that paging can have changed must be equal: EPCM entries, VA
slots, bytes in the EPC and in the backing, LRU order, free lists, records, charges, counters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.model.programs import STEPS
from tests.model.test_random_programs import SMALL, WORLD, World
from tests.support.hw import RepeatingRuntime
from tests.support.owners import FakeOwner

from softsgx import compiled
from softsgx.arch import PAGE_BYTES, PageType, Pcmd, SecInfo
from softsgx.driver.optimised import CompiledPage, PlainPage
from softsgx.driver.page import EnclavePage
from softsgx.paging import (
    Backing,
    BackingError,
    Claim,
    Counters,
    EpcBusy,
    FaultResult,
    FlatBacking,
    LoadFailed,
    MemoryBacking,
    Prefetching,
    SgxEpcPage,
    SwapEntry,
)
from softsgx.paging.flat import FlatFile, open_swap_file
from softsgx.paging.optimised import CompiledCore, CompiledSwap, PlainCore, PlainSwap
from softsgx.paging.swapfile import PCMDS_PER_PAGE, SwapFile, enclave_layout
from softsgx.paging.va_page import VaPage, VaSlot
from softsgx.runtime import InlineRuntime

Implementation = bool | Literal["compiled"]
"""Compiled, optimised in Python, or readable."""
IMPLEMENTATIONS: list[Implementation] = [True, False]
if compiled.speedups is not None:
    IMPLEMENTATIONS.insert(0, "compiled")

_PCMD_BYTES = PAGE_BYTES // PCMDS_PER_PAGE


def epcm(world: World) -> list[object]:
    """EPCM entries and contents of the EPC."""
    hw = world.system.machine
    seen: list[object] = []
    for addr in sorted(hw.pages):
        page = hw.pages[addr]
        content: Any = None
        if page.valid and page.pt is PageType.VA:
            content = list(page.versions)
        elif page.valid and page.pt is PageType.SECS:
            enclave = page.owner
            content = enclave.children, enclave.epoch, enclave.cur_count, enclave.prev_count
        elif page.valid:
            content = page.bepoch, hw.store.read(page, 0, PAGE_BYTES)
        seen.append((repr(page), page.lock, content))
    return seen


def record(page: SgxEpcPage) -> object:
    """The core's record of an EPC page."""
    group = page.group
    return repr(page), group and group.describe(), page.lru is not None


def swapped(entry: SwapEntry | None) -> object:
    """Where an evicted page is."""
    return entry and (entry.index, placed(entry.slot))


def placed(slot: VaSlot | None) -> object:
    """Which slot it is."""
    return slot and (slot.page.index, slot.number)


def backed(backing: Backing, pages: int) -> object:
    """The number of backing pages, and bytes of each evicted page."""
    if isinstance(backing, FlatBacking):
        usual, unusual = backing.usual, backing.unusual
        return backing.pages(), {
            index: (sealed, *(unusual.get(index) or usual or ()))
            for index, sealed in backing.sealed.items()
        }
    layout, found = enclave_layout(pages), {}
    for index in range(pages + 1):
        content, pcmd = layout(index)
        try:
            data = bytes(backing.pin(content, create=False).data)
        except BackingError:
            continue
        at = index % PCMDS_PER_PAGE * _PCMD_BYTES
        sealed = Pcmd.unpack(bytes(backing.pin(pcmd, create=False).data[at : at + _PCMD_BYTES]))
        found[index] = data + sealed.mac, sealed.secinfo.flags, sealed.enclave_id
    return backing.pages(), found


def state(world: World) -> dict[str, object]:
    """Everything that paging can have changed."""
    system, core = world.system, world.system.core
    pool = core._pool
    groups = [world.tree.root, world.group]
    seen: dict[str, object] = {
        "epcm": epcm(world),
        "counters": core.counters.as_dict(),
        "records": [record(pool.records[addr]) for addr in sorted(pool.records)],
        "free": [[page.addr for page in node.freed] for node in pool.nodes.values()],
        "free pages": core.free_pages,
        "lru": [[page.addr for page in group.lru] for group in groups],
        "groups": [
            (g.usage_pages, g.own_pages, g.peak_pages, g.events, g.events_local) for g in groups
        ],
        "ksgxd": (core._ksgxd.generation, core._ksgxd.outcomes, core._ksgxd.asleep),
        "claims": (core.claims.holder is None, core.claims.short_in is None),
        "kept": [page.addr for page in pool.records.values() if page.kept],
    }
    for number, enclave in enumerate(system.driver.enclaves):
        if not enclave.created:
            continue
        swap, counts = enclave.swap, enclave.counts
        seen[f"enclave {number}"] = (
            enclave.dead,
            enclave.referenced and enclave.references,
            replace(counts, fault_ns=0),
            enclave.refusal,
            [mm.users for mm in (entry.mm for entry in enclave.mms)],
        )
        seen[f"swap {number}"] = (
            swap.children,
            swap.peak_children,
            swap.ewbs,
            swap.etracks,
            swap.secs and swap.secs.addr,
            swapped(swap.secs_entry),
        )
        seen[f"va {number}"] = (
            (swap.va.promised, swap.va.used, swap.va.room),
            [
                (
                    (page.index, page.epc and page.epc.addr, page.free, page.stale, page.pins),
                    (page.accessed, page.lost, placed(page.parent)),
                )
                for page in swap.va.pages()
            ],
        )
        seen[f"pages {number}"] = [
            (
                (page.index, page.epc and page.epc.addr, swapped(page.entry)),
                (page.busy, page.reservation is None),
            )
            for page in enclave.pages.values()
        ]
        if not world.fail_every:
            seen[f"backing {number}"] = backed(swap._backing, enclave.size // PAGE_BYTES)
    return seen


def worlds_of(epc_pages: int, **options: Any) -> list[World]:
    """Worlds that differ in nothing but the implementation, the readable one last."""
    return [
        World(epc_pages, runtime=RepeatingRuntime(seed=7), optimised=optimised, **options)
        for optimised in IMPLEMENTATIONS
    ]


def same(worlds: list[World], where: object) -> None:
    """Compare each with the readable one."""
    *others, readable = (state(world) for world in worlds)
    for fast in others:
        assert fast.keys() == readable.keys(), where
        for name, value in fast.items():
            assert value == readable[name], (name, where)


programs = st.lists(
    st.tuples(
        st.sampled_from(STEPS + WORLD + ("visit",) * 12 + ("reclaim", "evict") * 3), SMALL, SMALL
    ),
    max_size=25,
)


def run_all(worlds: list[World], program: list[tuple[str, int, int]]) -> None:
    same(worlds, "start")
    for step in program:
        for world in worlds:
            world.do(*step)
            world.check()
        same(worlds, step)
    for world in worlds:
        world.finish()
    *others, readable = (world.system.core.counters.as_dict() for world in worlds)
    assert all(fast == readable for fast in others)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(epc_pages=st.sampled_from((25, 32, 40, 80)), program=programs)
def test_fast_and_readable_paging_do_the_same(
    epc_pages: int, program: list[tuple[str, int, int]]
) -> None:
    run_all(worlds_of(epc_pages), program)


@settings(max_examples=25, deadline=None)
@given(epc_pages=st.sampled_from((25, 40)), program=programs)
def test_fast_and_readable_paging_do_the_same_under_limits(
    epc_pages: int, program: list[tuple[str, int, int]]
) -> None:
    run_all(worlds_of(epc_pages, limited=True), program)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(limit=st.integers(2, 12), program=programs)
def test_fast_and_readable_paging_do_the_same_when_backing_is_full(
    limit: int, program: list[tuple[str, int, int]]
) -> None:
    run_all(worlds_of(32, backing_limit=limit), program)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(fail_every=st.integers(1, 7), program=programs)
def test_fast_and_readable_paging_do_the_same_when_backing_fails(
    fail_every: int, program: list[tuple[str, int, int]]
) -> None:
    run_all(worlds_of(32, fail_every=fail_every), program)


def test_the_fast_paths_are_those_that_run() -> None:
    *others, readable = worlds_of(40)
    wanted = [(PlainCore, PlainSwap, PlainPage)]
    if compiled.speedups is not None:
        wanted.insert(0, (CompiledCore, CompiledSwap, CompiledPage))
    for world, kinds in zip(others, wanted, strict=True):
        enclave = world.system.driver.enclaves[0]
        found = world.system.core, enclave.swap, next(iter(enclave.pages.values()))
        assert all(type(one) is kind for one, kind in zip(found, kinds, strict=True))
    enclave = readable.system.driver.enclaves[0]
    found = readable.system.core, enclave.swap, next(iter(enclave.pages.values()))
    assert not any(isinstance(one, PlainCore | PlainSwap | PlainPage) for one in found)


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_page_that_was_poisoned_while_it_was_free_is_not_allocated(
    optimised: Implementation,
) -> None:
    core = World(40, optimised=optimised).system.core
    pages = [core.alloc(None, reclaim=False) for _ in range(2)]
    for page in pages:
        core.free(page)
    core.poison(pages[0].addr)
    assert core.alloc(None, reclaim=False) is pages[1]
    core.check_invariants()


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_turn_ends_when_its_thread_has_loaded_all_that_an_instruction_needs(
    optimised: Implementation,
) -> None:
    core = World(40, optimised=optimised).system.core
    core.free(core.alloc(None, reclaim=False))
    claim = core.claims.holder = Claim()
    claim.loads_left = 0
    core.alloc(None, reclaim=False, claim=claim)
    assert core.claims.holder is None


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_refused_charge_is_counted(optimised: Implementation) -> None:
    world = World(40, optimised=optimised)
    core = world.system.core
    core.free(core.alloc(None, reclaim=False))
    world.group.max_pages = world.group.usage_pages
    with pytest.raises(EpcBusy):
        core.alloc(None, reclaim=False, group=world.group)
    assert core.counters.alloc_busy == 1 and world.group.events == 1
    core.check_invariants()


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_freed_page_has_no_marks(optimised: Implementation) -> None:
    core = World(40, optimised=optimised).system.core
    page = core.alloc(None, reclaim=False)
    page.kept = page.blocked = True
    core.free(page)
    assert not page.kept and not page.blocked and page.group is None


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_an_allocation_below_the_low_watermark_wakes_ksgxd(optimised: Implementation) -> None:
    runtime = InlineRuntime()
    core = World(40, optimised=optimised, runtime=runtime).system.core
    core.start()
    runtime.run_pending()
    pages = [core.alloc(None, reclaim=False) for _ in range(core.free_pages)]
    for page in pages:
        core.free(page)
    runtime.run_pending()
    before = core.counters.wakeups
    for _ in pages:
        core.alloc(None, reclaim=False)
    assert core.counters.wakeups > before
    core.stop()


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_new_candidate_withdraws_the_verdict_that_no_page_can_be_evicted(
    optimised: Implementation,
) -> None:
    core = World(40, optimised=optimised).system.core
    page, poisoned = (core.alloc(FakeOwner(""), reclaim=False) for _ in range(2))
    core.poison(poisoned.addr)
    core._ksgxd._oom_verdicts[core.root] = 1
    core.mark_reclaimable(poisoned)
    assert not poisoned.tracked and core._ksgxd._oom_verdicts[core.root]
    core.mark_reclaimable(page)
    assert page.tracked and not core._ksgxd.take_oom_verdict(core.root)


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_page_that_is_poisoned_in_a_batch_is_not_written(optimised: Implementation) -> None:
    world = World(40, optimised=optimised)
    pages = world.system.driver.enclaves[0].pages.values()
    page, epc = next((page, page.epc) for page in pages if page.epc and page.epc.lru)
    lru = epc.lru
    assert lru is not None and lru.isolate_page(epc)
    assert page.prepare() and page.block()
    world.system.core.poison(epc.addr)
    assert not page.write()
    assert page.epc is epc and page.entry is None and not page.being_reclaimed
    assert epc.blocked, "EBLOCK cannot be undone"
    lru.put_back(epc)
    page.put()
    world.check()


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
@pytest.mark.parametrize("why", ["poisoned", "kept"])
def test_a_page_that_must_stay_is_no_victim(optimised: Implementation, why: str) -> None:
    world = World(40, optimised=optimised)
    core = world.system.core
    pages = world.system.driver.enclaves[0].pages.values()
    page, epc = next((page, page.epc) for page in pages if page.epc and page.epc.lru)
    lru = epc.lru
    assert lru is not None and lru.isolate_page(epc)
    if why == "kept":
        epc.kept = True
    else:
        core.poison(epc.addr)
    assert core._reclaimer._prepare(lru, [epc], force=True) == []
    assert page.reservation is None and not page.being_reclaimed
    assert epc.tracked is (epc in lru) is (why == "kept")
    assert core.counters.kept == (why == "kept")
    epc.kept = False
    world.check()


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
@pytest.mark.parametrize("which", [0, 1])
def test_a_page_is_young_when_any_address_space_has_used_it(
    optimised: Implementation, which: int
) -> None:
    world = World(80, optimised=optimised)
    process = world.actor.process
    spaces = process, process.fork()
    enclave = world.system.driver.enclaves[0]
    page = next(page for page in enclave.pages.values() if page.kind is PageType.REG)
    for space in spaces:
        assert space.mm.fault(page.linaddr, 1, space) is FaultResult.NOPAGE
    page.age()
    assert page.age(), "no address space has used it"
    spaces[which].ptes.translate(page.linaddr, 1, user=True)
    assert not page.age()
    assert page.age(), "its accessed bit was not cleared"


def evicted_beside_its_va_page(world: World) -> tuple[EnclavePage, VaPage]:
    """Evict the first enclave; a batch is about to evict the VA page of the returned page."""
    world.launch()  # a second VA page makes the first worth an upper one
    system = world.system
    enclave = system.driver.enclaves[0]
    system.evict(enclave)
    page = next(page for page in enclave.pages.values() if page.kind is PageType.REG)
    assert page.entry is not None and page.entry.slot is not None
    va_page = page.entry.slot.page
    tree, swap = system.core.va, enclave.swap
    with enclave.lock:
        swap.load_secs()
        swap.children += 1  # as if another page were resident
        swap.va.make_resident(va_page)
        with tree.lock:
            slot = tree.alloc_upper_slot(1)
            assert slot is not None
            va_page.eviction = tree.file.reserve(va_page.index), slot
        swap.va.eviction_begun(va_page)
    return page, va_page


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_load_keeps_the_va_page_that_it_needs(optimised: Implementation) -> None:
    page, va_page = evicted_beside_its_va_page(World(80, optimised=optimised))
    swap = page.swap
    with page.enclave.lock:
        swap.peak_children = 0
        assert page.entry is not None
        swap.load(page.entry, page)
    assert va_page.eviction is None and va_page.epc is not None
    assert swap.peak_children == swap.children


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_entries_of_another_enclave_at_the_same_address_are_left_alone(
    optimised: Implementation,
) -> None:
    world = World(80, optimised=optimised)
    world.launch()
    enclave, other = world.system.driver.enclaves
    process = world.actor.process
    page = next(page for page in enclave.pages.values() if page.kind is PageType.REG)
    assert process.mm.fault(page.linaddr, 1, process) is FaultResult.NOPAGE
    process.ptes.translate(page.linaddr, 1, user=True)
    vma = process.mm.find(page.linaddr)
    assert vma is not None and page.epc is not None and page.epc.lru is not None
    vma.enclave = other  # as if a page of it were mapped there
    assert page.age(), "the bit is that of another enclave"
    assert page.epc.lru.isolate_page(page.epc)
    assert page.prepare() and page.block()
    assert process.ptes.entry(page.linaddr) is not None
    vma.enclave = enclave
    assert not page.age(), "the bit was cleared"


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_load_without_a_free_page_has_used_its_va_page(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    core, swap = world.system.core, world.system.driver.enclaves[0].swap
    page = next(iter(world.system.driver.enclaves[0].pages.values()))
    assert page.epc is not None and core.evict(page.epc) and page.entry is not None
    (va_page,) = swap.va.pages()
    for _ in range(core.free_pages):
        core.alloc(None, reclaim=False)
    va_page.accessed = False
    with pytest.raises(EpcBusy):
        swap.load(page.entry, page)
    assert va_page.accessed


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_batch_unmaps_a_page_in_every_address_space(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    world.launch()
    enclave, other = world.system.driver.enclaves
    spaces = world.actor.process, world.actor.process.fork()
    page = next(page for page in enclave.pages.values() if page.kind is PageType.REG)
    for space in spaces:
        assert space.mm.fault(page.linaddr, 1, space) is FaultResult.NOPAGE
        assert space.mm.find(other.base) is not space.mm.find(page.linaddr)
        space.mm.find(other.base)  # the last result is of another mapping
    assert page.epc is not None and page.epc.lru is not None
    assert page.epc.lru.isolate_page(page.epc) and page.prepare() and page.block()
    assert not any(space.ptes.entry(page.linaddr) for space in spaces)


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_page_of_a_killed_enclave_is_not_blocked(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    enclave = world.system.driver.enclaves[0]
    page = next(page for page in enclave.pages.values() if page.kind is PageType.REG)
    epc = page.epc
    assert epc is not None and epc.lru is not None and epc.lru.isolate_page(epc)
    assert page.prepare()
    enclave.kill()
    assert page.block() and not epc.blocked
    assert page.write() and page.epc is None and page.entry is None
    assert not world.system.epcm(epc.addr).valid


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_page_of_a_killed_enclave_is_not_prepared_but_leaves(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    enclave = world.system.driver.enclaves[0]
    page = next(page for page in enclave.pages.values() if page.kind is PageType.REG)
    epc = page.epc
    assert epc is not None and epc.lru is not None and epc.lru.isolate_page(epc)
    enclave.kill()
    assert page.prepare() and page.reservation is None and page.being_reclaimed
    assert page.block() and page.write() and page.epc is None


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_page_is_marked_from_its_reservation_until_it_is_written(
    optimised: Implementation,
) -> None:
    world = World(80, optimised=optimised)
    enclave = world.system.driver.enclaves[0]
    page = next(page for page in enclave.pages.values() if page.kind is PageType.REG)
    epc = page.epc
    assert epc is not None and epc.lru is not None and epc.lru.isolate_page(epc)
    assert page.prepare() and page.being_reclaimed and page.reservation is not None
    assert page.block() and page.being_reclaimed
    assert page.write() and not page.being_reclaimed and page.reservation is None


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_fault_beyond_what_a_page_allows_is_refused(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    process, enclave = world.actor.process, world.system.driver.enclaves[0]
    page = next(page for page in enclave.pages.values() if page.kind is PageType.REG)
    assert page.epc is not None and world.system.core.evict(page.epc)
    page.max_prot = 0  # as if the mapping had been made before the page was restricted
    assert process.mm.fault(page.linaddr, 1, process) is FaultResult.SIGBUS
    assert page.entry is not None and enclave.counts.faults["refused"] == 1
    page.max_prot = 3
    enclave.kill()
    assert process.mm.fault(page.linaddr, 1, process) is FaultResult.SIGBUS


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_fault_without_a_free_page_waits_and_is_repeated(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    core, process = world.system.core, world.actor.process
    enclave = world.system.driver.enclaves[0]
    page = next(page for page in enclave.pages.values() if page.kind is PageType.REG)
    assert page.epc is not None and core.evict(page.epc)
    for _ in range(core.free_pages):
        core.alloc(None, reclaim=False)
    assert process.mm.fault(page.linaddr, 1, process) is FaultResult.RETRY
    assert enclave.counts.faults["busy"] == 1 and core.free_pages
    assert process.mm.fault(page.linaddr, 1, process) is FaultResult.NOPAGE


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_fault_loads_what_the_policy_wants_ahead(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    core, process = world.system.core, world.actor.process
    core.policy = Prefetching(window_pages=2)
    enclave = world.system.driver.enclaves[0]
    pages = [page for page in enclave.pages.values() if page.kind is PageType.REG][-3:]
    for page in pages:
        assert page.epc is not None and core.evict(page.epc)
    assert process.mm.fault(pages[0].linaddr, 1, process) is FaultResult.NOPAGE
    assert [page.epc is not None for page in pages] == [True, True, True]
    assert enclave.counts.reloads == 3 and not pages[1].touched


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_page_that_eldu_refuses_stays_evicted(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    core, enclave = world.system.core, world.system.driver.enclaves[0]
    page = next(page for page in enclave.pages.values() if page.kind is PageType.REG)
    assert page.epc is not None and core.evict(page.epc) and page.entry is not None
    slot, free = page.entry.slot, core.free_pages
    assert slot is not None and slot.page.epc is not None
    world.system.epcm(slot.page.epc.addr).versions[slot.number] += 8
    with pytest.raises(LoadFailed, match="SGX_MAC_COMPARE_FAIL"):
        enclave.swap.load(page.entry, page)
    assert core.counters.eldu_failed == 1 and core.free_pages == free
    world.check()


# --- backing --------------------------------------------------------------------------------------


class Half:
    """One swap file, and the evictions that have reserved their backing in it."""

    def __init__(self, backing: Backing) -> None:
        self.backing, self.counters = backing, Counters()
        self.events: list[object] = []
        self.file: SwapFile | FlatFile = open_swap_file(
            backing,
            enclave_layout(64),
            counters=self.counters,
            tracer=self.events.append,
            defects=frozenset(),
        )
        self.reserved: dict[int, Any] = {}
        self.writes = 0

    def do(self, kind: str, index: int) -> object:
        file, reserved = self.file, self.reserved
        try:
            match kind:
                case "evict":
                    return self.do("reserve", index), self.do("write", index)
                case "reserve" if index not in reserved and not self.holds(index):
                    reserved[index] = file.reserve(index)
                case "write" if index in reserved:
                    pinned = reserved.pop(index)
                    pinned.data[:] = bytes([index + 1]) * PAGE_BYTES
                    self.writes += 1
                    # Mostly R W, and not the same twice: what is kept once for all pages.
                    secinfo = SecInfo.of(PageType.REG, (3, 1, 3, 3, 5)[self.writes % 5])
                    eid = 1 + (self.writes % 3 == 0)
                    pcmd = Pcmd(secinfo=secinfo, enclave_id=eid, mac=bytes([index]) * 16)
                    pinned.pcmd_bytes[:] = pcmd.pack()
                    file.written(pinned)
                case "cancel" if index in reserved:
                    file.cancel(reserved.pop(index))
                case "load" | "fail" if index not in reserved:
                    pinned = file.open(index)
                    seen = bytes(pinned.data), bytes(pinned.pcmd_bytes)
                    (file.loaded if kind == "load" else file.close)(pinned)
                    return seen
                case "discard" if index not in reserved:
                    file.discard(index)
                case _:
                    pass
        except BackingError as error:
            return str(error)
        return None

    def holds(self, index: int) -> bool:
        try:
            self.file.close(self.file.open(index))
        except BackingError:
            return False
        return True


KINDS = ("evict", "evict", "reserve", "write", "cancel", "load", "load", "fail", "discard")


@settings(max_examples=150, deadline=None)
@given(
    limit=st.none() | st.integers(1, 12),
    history=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 64)), max_size=60),
    near=st.sampled_from([2, 5, 40, 65]),
)
def test_flat_backing_and_backing_pages_do_the_same(
    limit: int | None, history: list[tuple[str, int]], near: int
) -> None:
    flat, paged = Half(FlatBacking(limit)), Half(MemoryBacking(limit))
    for kind, index in history:
        assert flat.do(kind, index % near) == paged.do(kind, index % near)
        assert flat.backing.pages() == paged.backing.pages()
        assert flat.counters == paged.counters and flat.events == paged.events


@pytest.mark.parametrize("kind", [FlatBacking, MemoryBacking])
def test_a_pcmd_is_that_of_the_last_eviction(kind: type[FlatBacking | MemoryBacking]) -> None:
    file = Half(kind(None)).file
    kept: dict[int, Pcmd] = {}
    for number, (index, rights, eid) in enumerate(
        [(0, 5, 1), (1, 3, 1), (2, 3, 1), (0, 3, 1), (1, 5, 1), (3, 3, 2), (2, 3, 2), (0, 3, 1)]
    ):
        if index in kept:
            file.loaded(file.open(index))
        pinned = file.reserve(index)
        secinfo = SecInfo.of(PageType.REG, rights)
        kept[index] = Pcmd(secinfo=secinfo, enclave_id=eid, mac=bytes([number]) * 16)
        pinned.pcmd_bytes[:] = kept[index].pack()
        file.written(pinned)
        for evicted, pcmd in kept.items():
            pinned = file.open(evicted)
            assert Pcmd.unpack(bytes(pinned.pcmd_bytes)) == pcmd
            file.close(pinned)


@pytest.mark.parametrize("kind", [FlatBacking, MemoryBacking])
def test_a_closed_backing_holds_nothing(kind: type[FlatBacking | MemoryBacking]) -> None:
    half = Half(kind(None))
    for index in range(40):
        half.do("reserve", index)
        half.do("write", index)
    assert half.backing.pages() == 42
    half.backing.close()
    assert half.backing.pages() == 0
    half.do("evict", 3)
    assert half.backing.pages() == 2 and half.holds(3)


@pytest.mark.parametrize("kind", [FlatBacking, MemoryBacking])
@pytest.mark.parametrize("limit", [2, 3, 5, 33])
def test_a_backing_holds_as_many_pages_as_its_limit_and_no_more(
    kind: type[FlatBacking | MemoryBacking], limit: int
) -> None:
    """The first page needs a PCMD page, too; so does the 33rd."""
    half, taken = Half(kind(limit)), 0
    while half.do("reserve", taken) is None:
        half.do("write", taken)
        taken += 1
    assert taken == {2: 1, 3: 2, 5: 4, 33: 32}[limit]
    assert half.backing.pages() == limit
