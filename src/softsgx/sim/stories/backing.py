"""Stories of backing storage and PCMD."""

from __future__ import annotations

from softsgx.defects import Defect
from softsgx.driver import PROT_READ, FaultResult
from softsgx.paging import FailingBacking, MemoryBacking
from softsgx.sim.stories.story import Scene, story
from softsgx.sim.stories.system import (
    begin_eviction,
    end_eviction,
    evict,
    give_up_eviction,
    launch,
    page_of,
)


@story(
    Defect.PCMD_PAGE_TRUNCATED_WHILE_SHARED,
    Defect.BACKING_RESERVED_BEFORE_MARK,
    holds="A page that was evicted while its neighbour was loaded can be loaded again.",
    seeds=40,
)
def a_neighbours_pcmd_goes_to_a_page_that_was_given_back(scene: Scene) -> None:
    """Page 0 is evicted and its PCMD is the only one of its PCMD page.

    One task evicts page 1, which stores a PCMD in the same PCMD page.  Another task loads page 0 at
    the same time, which leaves that PCMD page empty.  Then page 1 is touched.
    """
    system = scene.system()
    made = launch(system.process(), 4)
    second = page_of(made, 1)
    evict(system, page_of(made, 0))
    mm = made.process.mm
    scene.together(
        reclaim=lambda: evict(system, second),
        fault=lambda: mm.fault(made.data(0), PROT_READ),
    )
    result = mm.fault(made.data(1), PROT_READ)
    scene.claim(result is not FaultResult.SIGBUS, "the fault on page 1 ends with SIGBUS")


@story(
    Defect.CLEARED_PCMD_NOT_DIRTY,
    holds="Backing of an enclave whose pages are all resident is given back.",
)
def a_cleared_pcmd_is_back_after_memory_pressure(scene: Scene) -> None:
    """Two pages are evicted and their backing is written out.

    Page 0 is loaded, which clears its PCMD; memory pressure then drops the clean backing pages, so
    that they are read from disk again; page 1 is loaded.
    """
    backing = MemoryBacking()
    system = scene.system(backing=lambda _pages: backing)
    made = launch(system.process(), 4)
    evict(system, page_of(made, 0))
    evict(system, page_of(made, 1))
    backing.write_out()
    made.process.mm.fault(made.data(0), PROT_READ)
    backing.drop_clean()
    made.process.mm.fault(made.data(1), PROT_READ)
    left = backing.pages()
    scene.claim(not left, f"backing pages left: {left}; the cleared PCMD came back from disk")


@story(
    Defect.BACKING_DIRTIED_BEFORE_EWB,
    holds="An evicted page survives a write-out of its backing at any time.",
)
def a_page_written_out_too_early_is_lost(scene: Scene) -> None:
    """A page is prepared for eviction; its backing is written out before EWB has written it.

    After EWB, memory pressure drops the clean backing pages, and the page is touched.
    """
    backing = MemoryBacking()
    system = scene.system(backing=lambda _pages: backing)
    made = launch(system.process(), 4)
    begin_eviction(page_of(made, 0))
    backing.write_out()
    end_eviction(system, page_of(made, 0))
    backing.drop_clean()
    result = made.process.mm.fault(made.data(0), PROT_READ)
    scene.claim(result is not FaultResult.SIGBUS, "the page is lost: its fault ends with SIGBUS")


@story(
    Defect.BACKING_KEPT_AFTER_ELDU,
    holds="Backing of an enclave whose pages are all resident is given back.",
)
def backing_stays_when_everything_is_resident_again(scene: Scene) -> None:
    """Four pages are evicted and loaded again."""
    backing = MemoryBacking()
    system = scene.system(backing=lambda _pages: backing)
    made = launch(system.process(), 4)
    for number in range(4):
        evict(system, page_of(made, number))
    for number in range(4):
        made.process.mm.fault(made.data(number), PROT_READ)
    left = backing.pages()
    scene.claim(not left, f"backing pages left: {left}")


@story(
    Defect.BACKING_FETCHED_AFTER_BLOCK,
    holds="A page stays usable when its eviction fails because backing is missing.",
)
def a_page_is_lost_when_backing_fails(scene: Scene) -> None:
    """A page is chosen for eviction and the first, or the second, request for backing fails."""
    for nth in (1, 2):
        failing = FailingBacking.at(MemoryBacking(), nth)
        system = scene.system(backing=lambda _pages, failing=failing: failing)
        made = launch(system.process(), 4)
        page = page_of(made, 0)
        if begin_eviction(page):
            end_eviction(system, page)
        else:
            give_up_eviction(page)
        result = made.process.mm.fault(made.data(0), PROT_READ)
        usable = result is FaultResult.NOPAGE
        scene.claim(
            usable, f"request {nth} failed, and a fault on the page ends with {result.name}"
        )
