"""Every defect that can be switched on by name shows, and without its name it does not.

A story is a small program that looks for one symptom; it gets the defects to run with and returns
whether it saw the symptom.  Where the symptom needs a race, the story runs under many seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from errno import EINVAL
from functools import partial
from typing import Any

import pytest
from tests.support.driver import (
    BASE,
    RW,
    SECINFO_RW,
    Launched,
    System,
    build,
    errno_of,
    launch,
    pattern,
    plan_for,
    secs_bytes,
    sigstruct_for,
)

from softsgx.arch import PAGE_BYTES, VA_SLOTS, PageType, Status
from softsgx.defects import Defect
from softsgx.driver import MAP_FIXED, MAP_PRIVATE, FaultResult
from softsgx.driver import enclave as enclave_module
from softsgx.driver.page import EnclavePage
from softsgx.hw import DEFAULT_EPC_BASE, EpcSection, GeneralProtection, Machine, MachineConfig
from softsgx.paging import (
    EpcBusy,
    EpcCore,
    FailingBacking,
    Interrupted,
    MachineCheck,
    MemoryBacking,
    NoEpc,
)
from softsgx.runtime import InlineRuntime, Livelock, Script, SeededRuntime, Uninterrupted
from softsgx.userland import Signal, SoftProcess

R = 1
REG, TRIM = PageType.REG << 8, PageType.TRIM << 8
PENDING, MODIFIED = 8, 16
SIZE = 16 * PAGE_BYTES
SEEDS = range(12)

Defects = frozenset[Defect]
Story = Callable[[Defects], bool]
STORIES: dict[Defect, Story] = {}


def story(*defects: Defect) -> Callable[[Story], Story]:
    """Register a story of defects."""

    def register(tell: Story) -> Story:
        STORIES.update(dict.fromkeys(defects, tell))
        return tell

    return register


def _page(made: Launched, number: int) -> EnclavePage:
    return made.enclave.pages[made.enclave.index_of(made.data(number))]


def _begin(system: System, page: EnclavePage) -> bool:
    """The first half of an eviction of one page: isolate, prepare, block."""
    assert page.epc is not None and page.epc.lru is not None
    lru = page.epc.lru
    while page.epc in lru:
        isolated, _dying = lru.isolate(1)
        if isolated != [page.epc]:
            lru.put_back(isolated[0])
            page.put()
    return page.prepare() and page.block()


def _end(system: System, page: EnclavePage) -> bool:
    """The other half."""
    epc = page.epc
    assert epc is not None and epc.lru is not None
    if not page.write():
        epc.lru.put_back(epc)
        page.put()
        return False
    epc.lru.forget(epc)
    system.core.free(epc)
    page.put()
    return True


def _evict(system: System, page: EnclavePage) -> bool:
    return _begin(system, page) and _end(system, page)


def _fails(check: Callable[[], object]) -> bool:
    try:
        check()
    except AssertionError:
        return True
    return False


def _any_seed(program: Callable[[SeededRuntime], bool], seeds: range = SEEDS) -> bool:
    """Whether a program sees its symptom under any schedule."""
    for seed in seeds:
        runtime = SeededRuntime(seed)
        if runtime.run(partial(program, runtime)):
            return True
    return False


def _together(runtime: SeededRuntime, *runs: Callable[[], object]) -> bool:
    """Run tasks at the same time; whether one failed an assertion."""
    tasks = [runtime.spawn(partial(_run, run), f"task{number}") for number, run in enumerate(runs)]
    failed = False
    for task in tasks:
        try:
            task.join()
        except AssertionError:
            failed = True
    return failed


def _run(call: Callable[[], object]) -> None:
    call()


# --- backing and PCMD -----------------------------------------------------------------------------


@story(Defect.PCMD_PAGE_TRUNCATED_WHILE_SHARED, Defect.BACKING_RESERVED_BEFORE_MARK)
def _a_neighbours_pcmd_goes_to_a_page_that_was_given_back(defects: Defects) -> bool:
    def program(runtime: SeededRuntime) -> bool:
        system = System(runtime=runtime, defects=defects)
        made = launch(system.process(), 4)
        first, second = _page(made, 0), _page(made, 1)
        _evict(system, first)  # the only PCMD of its page
        mm = made.process.mm
        _together(
            runtime,
            lambda: _evict(system, second),
            lambda: mm.fault(made.data(0), R),
        )
        return mm.fault(made.data(1), R) is FaultResult.SIGBUS

    return _any_seed(program, range(40))


@story(Defect.CLEARED_PCMD_NOT_DIRTY)
def _a_cleared_pcmd_is_back_after_memory_pressure(defects: Defects) -> bool:
    backing = MemoryBacking()
    system = System(defects=defects, backing=lambda _pages: backing)
    made = launch(system.process(), 4)
    _evict(system, _page(made, 0))
    _evict(system, _page(made, 1))
    backing.write_out()
    made.process.mm.fault(made.data(0), R)
    backing.drop_clean()
    made.process.mm.fault(made.data(1), R)
    return backing.pages() > 0  # the page was never found empty


@story(Defect.BACKING_DIRTIED_BEFORE_EWB)
def _a_page_written_out_too_early_is_lost(defects: Defects) -> bool:
    backing = MemoryBacking()
    system = System(defects=defects, backing=lambda _pages: backing)
    made = launch(system.process(), 4)
    _begin(system, _page(made, 0))
    backing.write_out()
    _end(system, _page(made, 0))
    backing.drop_clean()
    return made.process.mm.fault(made.data(0), R) is FaultResult.SIGBUS


@story(Defect.BACKING_KEPT_AFTER_ELDU)
def _backing_stays_when_everything_is_resident_again(defects: Defects) -> bool:
    backing = MemoryBacking()
    system = System(defects=defects, backing=lambda _pages: backing)
    made = launch(system.process(), 4)
    for number in range(4):
        _evict(system, _page(made, number))
    for number in range(4):
        made.process.mm.fault(made.data(number), R)
    return backing.pages() > 0


@story(Defect.BACKING_FETCHED_AFTER_BLOCK)
def _a_page_is_lost_when_backing_fails(defects: Defects) -> bool:
    for nth in (1, 2):
        system = System(
            defects=defects,
            backing=lambda _pages, nth=nth: FailingBacking.at(MemoryBacking(), nth),  # type: ignore[misc]
        )
        made = launch(system.process(), 4)
        if not _begin(system, _page(made, 0)):
            page = _page(made, 0)
            assert page.epc is not None and page.epc.lru is not None
            page.epc.lru.put_back(page.epc)
            page.put()
        else:
            _end(system, _page(made, 0))
        if made.process.mm.fault(made.data(0), R) is not FaultResult.NOPAGE:
            return True
    return False


# --- EWB and ELDU that fail -----------------------------------------------------------------------


def _refusing(system: System, leaf: str, times: int) -> None:
    real = getattr(system.core.leaves, leaf)
    left = [times]

    def refuse(*operands: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise GeneralProtection
        return real(*operands)

    setattr(system.core.leaves, leaf, refuse)


@story(Defect.PAGE_FREED_AFTER_FAILED_EWB)
def _a_page_whose_ewb_failed_is_gone(defects: Defects) -> bool:
    system = System(defects=defects)
    made = launch(system.process(), 4)
    _refusing(system, "ewb", 3)
    _evict(system, _page(made, 0))
    mm, result = made.process.mm, FaultResult.RETRY
    while result is FaultResult.RETRY:
        result = mm.fault(made.data(0), R)
    return result is FaultResult.SIGBUS


@story(Defect.VA_SLOT_LEAKED_BY_FAILED_EWB)
def _a_failed_ewb_keeps_its_slot(defects: Defects) -> bool:
    system = System(defects=defects)
    made = launch(system.process(), 4)
    _refusing(system, "ewb", 3)
    _evict(system, _page(made, 0))
    return sum(page.free_slots for page in made.enclave.swap.va.pages()) < VA_SLOTS


@story(Defect.PAGE_DESTROYED_BY_FAILED_ELDU)
def _one_failed_load_loses_the_page(defects: Defects) -> bool:
    system = System(defects=defects)
    made = launch(system.process(), 4)
    _evict(system, _page(made, 0))
    _refusing(system, "eldu", 1)
    mm = made.process.mm
    assert mm.fault(made.data(0), R) is FaultResult.SIGBUS
    return mm.fault(made.data(0), R) is FaultResult.SIGBUS


# --- faults ---------------------------------------------------------------------------------------


@story(Defect.EAUG_ASSUMES_RESIDENT_SECS)
def _a_hole_is_touched_while_the_secs_is_evicted(defects: Defects) -> bool:
    system = System(epc_pages=32, defects=defects)
    made = launch(system.process(), 4, size=SIZE)
    system.evict(made.enclave)
    assert made.enclave.swap.secs is None
    return _fails(lambda: made.process.mm.fault(made.data(5), R))


def _leave_free(system: System, pages: int) -> None:
    while system.free_pages < pages:
        system.core.reclaim(force=True)
    while system.free_pages > pages:
        system.core.alloc(None, reclaim=False)


@story(Defect.EAUG_WITHOUT_VA_PAGE_REFUSED)
def _a_new_page_needs_a_va_page_and_there_is_one_free_page(defects: Defects) -> bool:
    system = System(epc_pages=32, defects=defects)
    made = launch(system.process(), 508, size=1024 * PAGE_BYTES)
    assert len(made.enclave.pages) == 511  # and the SECS: the VA page is full
    _leave_free(system, 1)
    return made.process.mm.fault(made.data(508), R) is FaultResult.SIGBUS


@story(Defect.CONCURRENT_EAUG_REFUSED)
def _two_threads_touch_one_hole(defects: Defects) -> bool:
    def program(runtime: SeededRuntime) -> bool:
        made = launch(System(runtime=runtime, defects=defects).process(), 1, size=SIZE)
        results: list[FaultResult] = []

        def touch() -> None:
            results.append(made.process.mm.fault(made.data(3), R))

        _together(runtime, touch, touch)
        return FaultResult.SIGBUS in results

    return _any_seed(program)


@story(Defect.PAGE_NOT_BUSY_WHILE_ZAPPED)
def _a_page_is_touched_while_it_is_removed(defects: Defects) -> bool:
    def program(runtime: SeededRuntime) -> bool:
        system = System(runtime=runtime, defects=defects, processors=2)
        made = launch(system.process(), 4, threads=2, size=SIZE)
        process, page, scratch = made.process, made.data(1), made.data(0)
        process.modify_types(made.fd, made.offset(1), PAGE_BYTES, PageType.TRIM)
        thread = made.thread(0)
        assert thread.eaccept(page, TRIM | MODIFIED, scratch) is Status.SUCCESS
        _together(
            runtime,
            lambda: process.remove_pages(made.fd, made.offset(1), PAGE_BYTES),
            lambda: process.mm.fault(page, R),
        )
        # Whatever happened: to touch it makes it anew, or finds it new.
        try:
            return thread.eaccept(page, REG | RW | PENDING, scratch) is not Status.SUCCESS
        except Signal:
            return True

    return _any_seed(program, range(40))


@story(Defect.FAULT_REPEATED_WITHOUT_WAITING)
def _a_fault_that_must_wait_returns_at_once(defects: Defects) -> bool:
    system = System(epc_pages=32, defects=defects)
    made = launch(system.process(), 4)
    _evict(system, _page(made, 0))
    _leave_free(system, 0)
    before = system.core.counters.batches
    assert made.process.mm.fault(made.data(0), R) in (FaultResult.NOPAGE, FaultResult.RETRY)
    return system.core.counters.batches == before


@story(Defect.ACCESSED_BITS_OF_FIRST_MM_ONLY)
def _two_processes_use_a_page_and_one_scan_does_not_see_both(defects: Defects) -> bool:
    system = System(defects=defects)
    made = launch(system.process(), 4)
    child = made.process.fork()
    for cpu, process in enumerate((made.process, child)):
        thread = process.thread(cpu)
        thread.enter(made.tcs())
        thread.load(made.data(0))
        thread.exit()
    page = _page(made, 0)
    assert not page.age()
    return not page.age()


@story(Defect.MM_WALK_NOT_REPEATED)
def _a_child_is_born_while_a_page_is_zapped(defects: Defects) -> bool:
    def program(runtime: SeededRuntime) -> bool:
        system = System(runtime=runtime, defects=defects)
        made = launch(system.process(), 4)
        made.process.mm.fault(made.data(0), R)
        children: list[SoftProcess] = []
        _together(
            runtime,
            lambda: children.append(made.process.fork()),
            lambda: _begin(system, _page(made, 0)),
        )
        return children[0].ptes.entry(made.data(0)) is not None

    return _any_seed(program, range(40))


# --- mappings and arguments -----------------------------------------------------------------------


@story(Defect.PAGE_RANGE_OVERFLOW)
def _a_range_that_wraps_round_is_accepted(defects: Defects) -> bool:
    system = System(defects=defects)
    made = launch(system.process(), 4, size=SIZE)
    try:
        made.process.restrict(made.fd, (1 << 64) - PAGE_BYTES, 2 * PAGE_BYTES, R)
    except OSError as error:
        return error.errno != EINVAL
    return True


@story(Defect.MMAP_BEYOND_ENCLAVE)
def _a_mapping_reaches_beyond_the_enclave(defects: Defects) -> bool:
    made = launch(System(defects=defects).process(), 1)
    process = made.process
    return errno_of(lambda: process.mmap(made.fd, made.base + made.size, PAGE_BYTES, R)) == "ok"


@story(Defect.MAP_PRIVATE_ACCEPTED)
def _an_enclave_is_mapped_privately(defects: Defects) -> bool:
    made = launch(System(defects=defects).process(), 1)
    flags = MAP_PRIVATE | MAP_FIXED
    return errno_of(lambda: made.process.mmap(made.fd, BASE, PAGE_BYTES, R, flags)) == "ok"


@story(Defect.EMPTY_ADD_PAGES_ACCEPTED)
def _adding_nothing_succeeds(defects: Defects) -> bool:
    process = System(defects=defects).process()
    fd = process.open()
    process.create(fd, secs_bytes(SIZE))
    return errno_of(lambda: process.add_pages(fd, 0, b"", SECINFO_RW)) == "ok"


@story(Defect.CREATE_NOT_RESTARTED)
def _a_signal_during_create_is_not_restarted(defects: Defects) -> bool:
    system = System(epc_pages=16, defects=defects)
    process = system.process()
    launch(process, 20)
    _leave_free(system, 0)
    fd = process.open()
    process.signal = True
    return errno_of(lambda: process.create(fd, secs_bytes(SIZE, 0))) != "ERESTARTSYS"


@story(Defect.ALLOWED_ATTRIBUTES_RESET_BY_CREATE)
def _permission_given_before_create_is_forgotten(defects: Defects) -> bool:
    process = System(defects=defects).process()
    fd = process.open()
    process.provision(fd, process.open_provision())
    process.create(fd, secs_bytes(plan_for(0).size, flags=0x14))
    for run in plan_for(0).runs:
        data = b"".join(bytes(run.source.page(at)) for at in range(run.pages))
        process.add_pages(fd, run.offset, data, run.flags, measure=False)
    return errno_of(lambda: process.init(fd, sigstruct_for(plan_for(0), 0x14))) == "EACCES"


# --- failures while building, and the end ---------------------------------------------------------


@story(Defect.SECS_LEAKED_BY_FAILED_ECREATE)
def _a_refused_secs_costs_a_page(defects: Defects) -> bool:
    system = System(defects=defects)
    process = system.process()
    with suppress(OSError):
        process.create(process.open(), secs_bytes(PAGE_BYTES))
    return system.free_pages < system.epc_pages


@story(Defect.CHILD_COUNTED_AFTER_FAILED_EEXTEND)
def _a_page_that_was_not_measured_stays_counted(defects: Defects) -> bool:
    system = System(defects=defects)
    process = system.process()
    fd = process.open()
    process.create(fd, secs_bytes(SIZE))
    _refusing(system, "eextend_page", 1)
    with suppress(OSError):
        process.add_pages(fd, 0, pattern(1), SECINFO_RW)
    return _fails(system.driver.check_invariants)


@story(Defect.MM_WITHOUT_ENCLAVE_REFERENCE)
def _an_address_space_ends_while_the_file_is_closed(defects: Defects) -> bool:
    # The address space has unlinked its entry and waits for walkers; the file goes meanwhile.
    script = Script(("task1", "acquire encl1.srcu grace period"), ("task0", "end"), strict=False)
    runtime = SeededRuntime(0, policy=script)
    return runtime.run(lambda: _close_and_exit(runtime, defects))


@story(Defect.MM_ENTRY_DROPPED_TWICE)
def _both_the_file_and_the_address_space_drop_the_entry(defects: Defects) -> bool:
    return _any_seed(lambda runtime: _close_and_exit(runtime, defects), range(40))


def _close_and_exit(runtime: SeededRuntime, defects: Defects) -> bool:
    system = System(runtime=runtime, defects=defects)
    process = system.process()
    fd = build(process, plan_for(1))
    other = system.process()  # registered, but has unmapped the enclave again
    process.enclave_file(fd).mmap(other.mm, BASE, PAGE_BYTES, R, 0x11)
    other.munmap(BASE, PAGE_BYTES)
    failed = _together(runtime, lambda: process.close(fd), other.mm.exit)
    return failed or system.free_pages != system.epc_pages


@story(Defect.RELEASE_WITHOUT_RESCHED)
def _nobody_runs_while_a_large_enclave_is_released(defects: Defects) -> bool:
    runtime = InlineRuntime()
    system = System(runtime=runtime, defects=defects)
    process = system.process()
    fd = build(process, plan_for(20))
    ran: list[str] = []
    runtime.spawn(lambda: ran.append("others"), "others")
    before = enclave_module.CHECK_SCHED_PAGES
    enclave_module.CHECK_SCHED_PAGES = 8
    try:
        process.close(fd)
    finally:
        enclave_module.CHECK_SCHED_PAGES = before
    return not ran


@story(Defect.EREMOVE_FAILURE_FATAL)
def _a_page_that_cannot_be_removed_hangs_the_process(defects: Defects) -> bool:
    system = System(defects=defects)
    process = system.process()
    fd = build(process, plan_for(1))
    _refusing(system, "eremove", 1)
    return _fails(lambda: process.close(fd))


# --- the core -------------------------------------------------------------------------------------


@story(Defect.POISONED_PAGE_STAYS_ON_LRU)
def _a_poisoned_page_is_evicted(defects: Defects) -> bool:
    system = System(defects=defects)
    made = launch(system.process(), 4)
    epc = _page(made, 0).epc
    assert epc is not None
    system.core.poison(epc.addr + 5)
    try:
        for _ in range(20):
            system.core.reclaim(force=True)
    except MachineCheck:
        return True
    assert _page(made, 0).epc is epc
    return False


@story(Defect.PAGE_POISONED_IN_BATCH_EVICTED)
def _a_page_poisoned_in_a_batch_is_evicted(defects: Defects) -> bool:
    system = System(defects=defects)
    made = launch(system.process(), 4)
    page = _page(made, 0)
    _begin(system, page)
    assert page.epc is not None
    system.core.poison(page.epc.addr)
    try:
        _end(system, page)
    except MachineCheck:
        return True
    return False


@story(Defect.POISONED_PAGES_COUNTED_FREE)
def _poisoned_pages_count_as_free(defects: Defects) -> bool:
    system = System(defects=defects)
    system.core.poison(DEFAULT_EPC_BASE)
    return system.free_pages == system.epc_pages


@story(Defect.FREE_COUNT_WITHOUT_LOCK)
def _the_free_count_is_torn(defects: Defects) -> bool:
    def program(runtime: SeededRuntime) -> bool:
        system = System(runtime=runtime, defects=defects)

        def churn() -> None:
            for _ in range(3):
                system.core.free(system.core.alloc(None, reclaim=False))

        _together(runtime, churn, churn)
        return system.free_pages != system.epc_pages

    return _any_seed(program)


def _bare_core(runtime: Any, defects: Defects, **config: Any) -> EpcCore:
    """A core whose pages all need sanitizing."""
    sections = config.pop("sections", (EpcSection(DEFAULT_EPC_BASE, 64 * PAGE_BYTES),))
    machine = Machine(MachineConfig(sections=sections, **config), runtime)
    return EpcCore(machine, runtime, defects=defects)


@story(Defect.FREE_PAGES_COUNTED_TWICE)
def _more_pages_are_free_than_there_are(defects: Defects) -> bool:
    core = _bare_core(InlineRuntime(), defects)
    core.start()
    core.wait_sanitized()
    core.stop()
    return core.free_pages != core.epc_pages


@story(Defect.STOPPED_SANITIZE_REPORTED)
def _stopping_early_is_reported(defects: Defects) -> bool:
    runtime = InlineRuntime()
    core = _bare_core(runtime, defects)
    core.start()
    runtime.yield_now()  # one turn of sanitizing
    core.stop()
    return core.counters.unsanitized > 0


@story(Defect.NODE_WALK_WITHOUT_END)
def _an_allocation_from_a_node_without_epc_never_returns(defects: Defects) -> bool:
    runtime = SeededRuntime(0, policy=Uninterrupted(), step_limit=3000)
    sections = (EpcSection(DEFAULT_EPC_BASE, 4 * PAGE_BYTES, node=1),)

    def main() -> bool:
        machine = Machine(MachineConfig(sections=sections, cpu_nodes=(0, 0)), runtime)
        core = EpcCore(machine, runtime, defects=defects, dirty=())
        for _ in range(4):
            core.alloc(None, reclaim=False, cpu_node=0)
        with pytest.raises((NoEpc, EpcBusy)):
            core.alloc(None, reclaim=False, cpu_node=0)
        return False

    try:
        return runtime.run(main)
    except Livelock:
        return True


@story(Defect.VA_PAGE_EVERY_512_PAGES)
def _va_pages_pile_up_at_a_boundary(defects: Defects) -> bool:
    system = System(epc_pages=64, defects=defects)
    made = launch(system.process(), 508, size=1024 * PAGE_BYTES)  # 512 with the SECS
    swap = made.enclave.swap
    before = len(swap.va)
    for _ in range(4):  # a page comes and goes
        swap.grow()
        swap.shrink()
    return len(swap.va) - before > 1


@story(Defect.DIRECT_RECLAIM_WITHOUT_END)
def _reclaim_never_gives_up_on_pages_in_use(defects: Defects) -> bool:
    system = System(epc_pages=16, defects=defects)
    launch(system.process(), 20)
    _leave_free(system, 0)
    real = EnclavePage.age
    asked = iter(range(200))
    EnclavePage.age = lambda self: False  # type: ignore[method-assign]
    try:
        system.core.alloc(None, reclaim=True, signal_pending=lambda: next(asked) > 100)
    except Interrupted:
        return True
    finally:
        EnclavePage.age = real  # type: ignore[method-assign]
    return False


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("defect", [defect for defect in Defect if defect in STORIES])
def test_a_defect_shows_with_its_name_and_not_without(defect: Defect) -> None:
    assert STORIES[defect](frozenset({defect})), f"{defect!r} is on and nothing shows"
    assert not STORIES[defect](frozenset()), f"{defect!r} is off and shows"


def test_every_defect_of_driver_and_core_has_a_story() -> None:
    assert STORIES.keys() == {defect for defect in Defect if defect.package in ("driver", "paging")}


def test_the_table_has_every_defect_and_says_where_it_lives() -> None:
    numbers = [*(f"B{n}" for n in range(1, 37)), *(f"L{n}" for n in range(1, 14))]
    assert list(Defect) == numbers
    assert all(defect.symptom and defect.explanation.endswith(".") for defect in Defect)


def test_a_scripted_interleaving_of_b11_has_one_winner() -> None:
    """The race of B11 step by step: both past the unlocked look, then one after the other."""
    script = Script(("task0", "acquire encl1"), ("task1", "acquire encl1"), strict=False)
    runtime = SeededRuntime(0, policy=script)
    results: list[FaultResult] = []

    def main() -> None:
        made = launch(System(runtime=runtime).process(), 1, size=SIZE)
        mm = made.process.mm
        _together(
            runtime,
            lambda: results.append(mm.fault(made.data(3), R)),
            lambda: results.append(mm.fault(made.data(3), R)),
        )

    runtime.run(main)
    assert results == [FaultResult.NOPAGE, FaultResult.NOPAGE]
