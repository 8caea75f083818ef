"""Stories of page faults: EAUG, loads, accessed bits, and removal during a fault."""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES, PageType, Status
from softsgx.defects import Defect
from softsgx.driver import PROT_READ, FaultResult
from softsgx.sim.stories.story import Scene, story
from softsgx.sim.stories.system import (
    RW,
    begin_eviction,
    evict,
    launch,
    leave_free,
    page_of,
)
from softsgx.userland import Signal, SoftProcess

_SIZE = 16 * PAGE_BYTES
_PENDING, _MODIFIED = 8, 16
_NEW_PAGE = PageType.REG << 8 | RW | _PENDING
_TRIMMED = PageType.TRIM << 8 | _MODIFIED
_VA_PAGE_FULL = 508
"""Data pages of an enclave whose pages, with TCS, SSA and SECS, use 512 VA slots."""


@story(
    Defect.EAUG_ASSUMES_RESIDENT_SECS,
    holds="A hole can be touched while all pages of the enclave are evicted.",
)
def a_hole_is_touched_while_the_secs_is_evicted(scene: Scene) -> None:
    """All pages of an enclave are evicted, the SECS last; then a hole is touched."""
    system = scene.system(epc_pages=32)
    made = launch(system.process(), 4, size=_SIZE)
    system.evict(made.enclave)
    assert made.enclave.swap.secs is None, "the SECS is evicted after its children"
    made.process.mm.fault(made.data(5), PROT_READ)


@story(
    Defect.EAUG_WITHOUT_VA_PAGE_REFUSED,
    holds="A fault that finds too few free EPC pages is repeated, not refused.",
)
def a_new_page_needs_a_va_page_and_there_is_one_free_page(scene: Scene) -> None:
    """All VA slots of an enclave are in use and one EPC page is free.

    A hole is touched, for which the driver needs two EPC pages: the new page and a VA page.
    """
    system = scene.system(epc_pages=32)
    made = launch(system.process(), _VA_PAGE_FULL, size=1024 * PAGE_BYTES)
    leave_free(system, 1)
    result = made.process.mm.fault(made.data(_VA_PAGE_FULL), PROT_READ)
    scene.claim(result is not FaultResult.SIGBUS, "the fault ends with SIGBUS")


@story(
    Defect.CONCURRENT_EAUG_REFUSED,
    holds="Two threads that touch the same hole of an enclave both get its page.",
    seeds=12,
)
def two_threads_touch_one_hole(scene: Scene) -> None:
    """Two threads of a process touch the same hole of an enclave at the same time."""
    made = launch(scene.system().process(), 1, size=_SIZE)
    results: dict[str, FaultResult] = {}

    def touch(thread: str) -> None:
        results[thread] = made.process.mm.fault(made.data(3), PROT_READ)

    scene.together(first=lambda: touch("first"), second=lambda: touch("second"))
    refused = [thread for thread, result in results.items() if result is FaultResult.SIGBUS]
    scene.claim(not refused, f"the fault of the {' and '.join(refused)} thread ends with SIGBUS")


@story(
    Defect.PAGE_NOT_BUSY_WHILE_ZAPPED,
    holds="After REMOVE_PAGES the page can be added again, even if it was touched meanwhile.",
    seeds=40,
)
def a_page_is_touched_while_it_is_removed(scene: Scene) -> None:
    """A trimmed page is removed by one task while another one touches it.

    Then a thread inside the enclave accepts a new page at that address.
    """
    system = scene.system(processors=2)
    made = launch(system.process(), 4, threads=2, size=_SIZE)
    process, page, scratch = made.process, made.data(1), made.data(0)
    process.modify_types(made.fd, made.offset(1), PAGE_BYTES, PageType.TRIM)
    thread = made.thread(0)
    trimmed = thread.eaccept(page, _TRIMMED, scratch)
    assert trimmed is Status.SUCCESS, f"EACCEPT of the trimmed page gives {trimmed!r}"
    scene.together(
        remove=lambda: process.remove_pages(made.fd, made.offset(1), PAGE_BYTES),
        fault=lambda: process.mm.fault(page, PROT_READ),
    )
    try:
        result = thread.eaccept(page, _NEW_PAGE, scratch)
        seen = "" if result is Status.SUCCESS else f"EACCEPT of the page gives {result!r}"
    except Signal as signal:
        seen = f"EACCEPT of the page ends with a signal: {signal}"
    scene.claim(not seen, seen)


@story(
    Defect.FAULT_REPEATED_WITHOUT_WAITING,
    holds="A fault that finds no free EPC page waits for a reclaim batch.",
)
def a_fault_that_must_wait_returns_at_once(scene: Scene) -> None:
    """A page is evicted, all EPC pages are in use, and the page is touched."""
    system = scene.system(epc_pages=32)
    made = launch(system.process(), 4)
    evict(system, page_of(made, 0))
    leave_free(system, 0)
    before = system.core.counters.batches
    result = made.process.mm.fault(made.data(0), PROT_READ)
    waited = system.core.counters.batches > before
    scene.claim(waited, f"the fault ends with {result.name} and no batch has run since")


@story(
    Defect.ACCESSED_BITS_OF_FIRST_MM_ONLY,
    holds="One scan clears the accessed bits of every address space.",
)
def two_processes_use_a_page_and_one_scan_does_not_see_both(scene: Scene) -> None:
    """A process and its child use the same page; then the page is scanned twice."""
    system = scene.system()
    made = launch(system.process(), 4)
    child = made.process.fork()
    for cpu, process in enumerate((made.process, child)):
        thread = process.thread(cpu)
        thread.enter(made.tcs())
        thread.load(made.data(0))
        thread.exit()
    page = page_of(made, 0)
    assert not page.age(), "a page that was used is young"
    scene.claim(page.age(), "the second scan finds the page young, and it was not used since")


@story(
    Defect.MM_WALK_NOT_REPEATED,
    holds="No address space maps a page that is blocked for eviction.",
    seeds=40,
)
def a_child_is_born_while_a_page_is_zapped(scene: Scene) -> None:
    """One task forks the process while another one blocks a page and removes its mappings."""
    system = scene.system()
    made = launch(system.process(), 4)
    made.process.mm.fault(made.data(0), PROT_READ)
    children: list[SoftProcess] = []
    scene.together(
        fork=lambda: children.append(made.process.fork()),
        reclaim=lambda: begin_eviction(page_of(made, 0)),
    )
    entry = children[0].ptes.entry(made.data(0))
    scene.claim(entry is None, "the child has a page table entry for the blocked page")
