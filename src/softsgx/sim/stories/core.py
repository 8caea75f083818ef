"""Stories of the EPC core: poison, free counts, sanitizing, nodes, VA pages, direct reclaim."""

from __future__ import annotations

from typing import Any

from softsgx.arch import PAGE_BYTES
from softsgx.defects import Defect
from softsgx.hw import DEFAULT_EPC_BASE, EpcSection, Machine, MachineConfig
from softsgx.paging import EpcBusy, EpcCore, Interrupted, MachineCheck, NoEpc, Policy, Reclaimable
from softsgx.sim.stories.story import Scene, story
from softsgx.sim.stories.system import begin_eviction, end_eviction, launch, page_of

_EPC_PAGES = 64
_BATCHES = 20
_ROUNDS = 100


@story(
    Defect.POISONED_PAGE_STAYS_ON_LRU,
    holds="A poisoned page is never evicted.",
)
def a_poisoned_page_is_evicted(scene: Scene) -> None:
    """The memory of a page fails; then reclaim batches evict every page that they may evict."""
    system = scene.system()
    made = launch(system.process(), 4)
    epc = page_of(made, 0).epc
    assert epc is not None, "the page is resident"
    system.core.poison(epc.addr + 5)
    try:
        for _ in range(_BATCHES):
            system.core.reclaim(force=True)
    except MachineCheck:
        scene.claim(False, "EWB reads the poisoned page: machine check")
    assert page_of(made, 0).epc is epc, "the poisoned page stays where it is"


@story(
    Defect.PAGE_POISONED_IN_BATCH_EVICTED,
    holds="A page whose memory fails during a batch is not written out.",
)
def a_page_poisoned_in_a_batch_is_evicted(scene: Scene) -> None:
    """A batch has blocked a page; its memory fails before EWB."""
    system = scene.system()
    made = launch(system.process(), 4)
    page = page_of(made, 0)
    begin_eviction(page)
    assert page.epc is not None, "the page is resident"
    system.core.poison(page.epc.addr)
    try:
        end_eviction(system, page)
    except MachineCheck:
        scene.claim(False, "EWB reads the poisoned page: machine check")


@story(
    Defect.POISONED_PAGES_COUNTED_FREE,
    holds="A poisoned page is not counted free.",
)
def poisoned_pages_count_as_free(scene: Scene) -> None:
    """Memory of a free page fails."""
    system = scene.system()
    system.core.poison(DEFAULT_EPC_BASE)
    free = system.free_pages
    scene.claim(free < system.epc_pages, f"{free} of {system.epc_pages} pages are counted free")


@story(
    Defect.FREE_COUNT_WITHOUT_LOCK,
    holds="The free count is exact when no task allocates.",
    seeds=12,
)
def the_free_count_is_torn(scene: Scene) -> None:
    """Two tasks allocate and free pages at the same time."""
    core = scene.system().core

    def churn() -> None:
        for _ in range(3):
            core.free(core.alloc(None, reclaim=False))

    scene.together(first=churn, second=churn)
    free = core.free_pages
    scene.claim(free == core.epc_pages, f"{free} pages are counted free, {core.epc_pages} are")


def _bare_core(scene: Scene, **config: Any) -> EpcCore:
    """Return a core without a driver."""
    dirty = config.pop("dirty", None)
    sections = config.pop("sections", (EpcSection(DEFAULT_EPC_BASE, _EPC_PAGES * PAGE_BYTES),))
    machine = Machine(MachineConfig(sections=sections, **config), scene.runtime)
    return EpcCore(machine, scene.runtime, defects=scene.defects, dirty=dirty, tracer=scene.tracer)


@story(
    Defect.FREE_PAGES_COUNTED_TWICE,
    holds="After sanitizing, as many pages are free as there are.",
)
def more_pages_are_free_than_there_are(scene: Scene) -> None:
    """The thread ksgxd sanitizes all pages at start-up."""
    core = _bare_core(scene)
    core.start()
    core.wait_sanitized()
    core.stop()
    free = core.free_pages
    scene.claim(free == core.epc_pages, f"{free} pages are counted free of {core.epc_pages}")


@story(
    Defect.STOPPED_SANITIZE_REPORTED,
    holds="Stopping ksgxd is not a failure to sanitize.",
)
def stopping_early_is_reported(scene: Scene) -> None:
    """The thread ksgxd is stopped while it sanitizes."""
    core = _bare_core(scene)
    core.start()
    scene.runtime.yield_now()  # one turn of sanitizing
    core.stop()
    reported = core.counters.unsanitized
    scene.claim(not reported, f"{reported} pages are reported as impossible to sanitize")


@story(
    Defect.NODE_WALK_WITHOUT_END,
    holds="An allocation ends when no node has a free page.",
    step_limit=3000,
)
def an_allocation_from_a_node_without_epc_never_returns(scene: Scene) -> None:
    """All EPC is on node 1 and in use; a processor of node 0 allocates."""
    sections = (EpcSection(DEFAULT_EPC_BASE, 4 * PAGE_BYTES, node=1),)
    core = _bare_core(scene, sections=sections, cpu_nodes=(0, 0), dirty=())
    for _ in range(4):
        core.alloc(None, reclaim=False, cpu_node=0)
    try:
        core.alloc(None, reclaim=False, cpu_node=0)
    except (NoEpc, EpcBusy):
        return
    raise AssertionError("an allocation succeeds in an EPC that is full")


@story(
    Defect.VA_PAGE_EVERY_512_PAGES,
    holds="An enclave has no more VA pages than its pages need, and one spare.",
)
def va_pages_pile_up_at_a_boundary(scene: Scene) -> None:
    """An enclave has 512 pages; one more page is added and removed four times."""
    system = scene.system(epc_pages=_EPC_PAGES)
    made = launch(system.process(), 508, size=1024 * PAGE_BYTES)  # 512 with the SECS
    swap = made.enclave.swap
    before = len(swap.va)
    for _ in range(4):
        swap.grow()
        swap.shrink()
    more = len(swap.va) - before
    scene.claim(more <= 1, f"{more} more VA pages, and the enclave has as many pages as before")


class _AllYoung(Policy):
    """Other threads use every page between any two scans."""

    def old(self, owner: Reclaimable) -> bool:
        return False


@story(
    Defect.DIRECT_RECLAIM_WITHOUT_END,
    holds="An allocation ends while every page is in use.",
)
def reclaim_never_gives_up_on_pages_in_use(scene: Scene) -> None:
    """The EPC is full and every page is young at every scan; a task allocates and reclaims.

    A signal arrives after 100 batches.
    """
    system = scene.system(epc_pages=16, policy=_AllYoung())
    rounds = iter(range(2 * _ROUNDS))
    launch(system.process(), 9)
    while system.free_pages:
        system.core.alloc(None, reclaim=False)
    try:
        system.core.alloc(None, reclaim=True, signal_pending=lambda: next(rounds) > _ROUNDS)
    except Interrupted:
        scene.claim(False, f"only a signal ends the allocation, after {_ROUNDS} batches")
    except NoEpc:
        pass
