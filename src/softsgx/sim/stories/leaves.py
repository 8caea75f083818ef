"""Stories of leaves that fail: EWB, ELDU, EEXTEND, ECREATE, EREMOVE."""

from __future__ import annotations

from contextlib import suppress

from softsgx.arch import PAGE_BYTES, VA_SLOTS
from softsgx.defects import Defect
from softsgx.driver import PROT_READ, FaultResult
from softsgx.sim.stories.story import Scene, story
from softsgx.sim.stories.system import (
    SECINFO_RW,
    build,
    evict,
    launch,
    page_of,
    pattern,
    plan_for,
    secs_bytes,
)

_EWB_TRIES = 3


@story(
    Defect.PAGE_FREED_AFTER_FAILED_EWB,
    holds="A page whose EWB failed is still there.",
)
def a_page_whose_ewb_failed_is_gone(scene: Scene) -> None:
    """EWB of a page fails in all its three tries; then the page is touched."""
    system = scene.system(refusals={"ewb": _EWB_TRIES})
    made = launch(system.process(), 4)
    evict(system, page_of(made, 0))
    mm, result = made.process.mm, FaultResult.RETRY
    while result is FaultResult.RETRY:
        result = mm.fault(made.data(0), PROT_READ)
    scene.claim(result is not FaultResult.SIGBUS, "the page is gone: its fault ends with SIGBUS")


@story(
    Defect.VA_SLOT_LEAKED_BY_FAILED_EWB,
    holds="An eviction that failed uses no VA slot.",
)
def a_failed_ewb_keeps_its_slot(scene: Scene) -> None:
    """EWB of a page fails in all its three tries; then VA slots are counted."""
    system = scene.system(refusals={"ewb": _EWB_TRIES})
    made = launch(system.process(), 4)
    evict(system, page_of(made, 0))
    free = sum(page.free_slots for page in made.enclave.swap.va.pages())
    scene.claim(free >= VA_SLOTS, f"{free} of {VA_SLOTS} slots are free and no page is evicted")


@story(
    Defect.PAGE_DESTROYED_BY_FAILED_ELDU,
    holds="A page whose load failed once can be loaded later.",
)
def one_failed_load_loses_the_page(scene: Scene) -> None:
    """A page is evicted; its first ELDU fails, and it is touched again."""
    system = scene.system(refusals={"eldu": 1})
    made = launch(system.process(), 4)
    evict(system, page_of(made, 0))
    mm = made.process.mm
    first = mm.fault(made.data(0), PROT_READ)
    assert first is FaultResult.SIGBUS, "a load that failed is SIGBUS"
    result = mm.fault(made.data(0), PROT_READ)
    scene.claim(result is not FaultResult.SIGBUS, "the second fault ends with SIGBUS as well")


@story(
    Defect.SECS_LEAKED_BY_FAILED_ECREATE,
    holds="A CREATE that is refused leaves no EPC page in use.",
)
def a_refused_secs_costs_a_page(scene: Scene) -> None:
    """CREATE is called with a SECS that ECREATE refuses: its size is one page."""
    system = scene.system()
    process = system.process()
    with suppress(OSError):
        process.create(process.open(), secs_bytes(PAGE_BYTES))
    lost = system.epc_pages - system.free_pages
    scene.claim(not lost, f"{lost} EPC page is in use and no enclave exists")


@story(
    Defect.CHILD_COUNTED_AFTER_FAILED_EEXTEND,
    holds="The SECS' count of children is the number of pages that exist.",
)
def a_page_that_was_not_measured_stays_counted(scene: Scene) -> None:
    """ADD_PAGES adds a page, whose EEXTEND fails; then pages are recounted."""
    system = scene.system(refusals={"eextend_page": 1})
    process = system.process()
    fd = process.open()
    process.create(fd, secs_bytes(16 * PAGE_BYTES))
    with suppress(OSError):
        process.add_pages(fd, 0, pattern(1), SECINFO_RW)
    system.driver.check_invariants()


@story(
    Defect.EREMOVE_FAILURE_FATAL,
    holds="An enclave can be released although EREMOVE refuses one of its pages.",
)
def a_page_that_cannot_be_removed_hangs_the_process(scene: Scene) -> None:
    """The file of an enclave is closed and the first EREMOVE fails."""
    system = scene.system(refusals={"eremove": 1})
    process = system.process()
    process.close(build(process, plan_for(1)))
