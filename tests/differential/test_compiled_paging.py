"""What random programs of ``test_optimised_paging`` seldom meet, in each implementation."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
from tests.differential.test_optimised_paging import IMPLEMENTATIONS, Implementation
from tests.model.test_random_programs import World

from softsgx.arch import PAGE_BYTES, AttributesFlags, PageType
from softsgx.paging import EpcBusy, FaultResult
from softsgx.runtime import InlineRuntime
from softsgx.sim.stories.system import build, plan_for


def evicted_page(world: World) -> Any:
    """A page of the first enclave that was evicted just now."""
    core, enclave = world.system.core, world.system.driver.enclaves[0]
    page = next(page for page in enclave.pages.values() if page.kind is PageType.REG)
    assert page.epc is not None and core.evict(page.epc) and page.entry is not None
    return page


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_load_in_a_full_group_is_refused_and_counted(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    page, group = evicted_page(world), world.group
    group.max_pages = group.usage_pages
    with pytest.raises(EpcBusy):
        page.swap.load(page.entry, page, group=group)
    assert group.events == 1 and world.system.core.counters.alloc_busy == 1
    group.max_pages = group.usage_pages + 1
    epc = page.swap.load(page.entry, page, group=group)
    assert epc.group is group and group.usage_pages == group.max_pages


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_load_raises_the_peaks_of_its_groups(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    page, groups = evicted_page(world), (world.group, world.tree.root)
    for group in groups:
        group.peak_pages = group.usage_pages
    epc = page.swap.load(page.entry, page, group=world.group)
    assert all(group.peak_pages == group.usage_pages for group in groups)
    world.tree.root.peak_pages += 5
    before = world.tree.root.peak_pages
    world.system.core.mark_reclaimable(epc)
    page.epc, page.entry = epc, None
    assert world.system.core.evict(epc)
    page.swap.load(page.entry, page, group=world.group)
    assert world.tree.root.peak_pages == before


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_no_version_of_another_page_is_overwritten(optimised: Implementation) -> None:
    world = World(80, optimised=optimised)
    enclave = world.system.driver.enclaves[0]
    pages: list[Any] = [page for page in enclave.pages.values() if page.kind is PageType.REG][:2]
    for page in pages:
        assert page.epc.lru.isolate_page(page.epc) and page.prepare() and page.block()
    # The ETRACK of the first is the second's, too, so its first EWB gets as far as the slot.
    assert pages[0].write()
    slot = pages[1].reservation.slot
    world.system.epcm(slot.page.epc.addr).versions[slot.number] = 8
    with pytest.raises(AssertionError, match="another page's version"):
        pages[1].write()


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_an_enclave_with_a_base_that_no_program_can_map_is_evicted_and_loaded(
    optimised: Implementation,
) -> None:
    world = World(80, optimised=optimised)
    # ECREATE takes each canonical base; the driver does not look at it.
    process = world.system.process(group=world.group)
    build(process, plan_for(4), base=0xFFFF_8000_0000_0000, flags=AttributesFlags.MODE64BIT)
    enclave = world.system.driver.enclaves[-1]
    pages: list[Any] = [page for page in enclave.pages.values() if page.kind is PageType.REG]
    assert enclave.base == 0xFFFF_8000_0000_0000 and pages
    epc = pages[0].epc
    assert world.system.core.evict(epc) and pages[0].entry is not None
    loaded = pages[0].swap.load(pages[0].entry, pages[0], group=world.group)
    assert world.system.epcm(loaded.addr).linaddr == enclave.base + pages[0].index * PAGE_BYTES


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_fault_lasts_as_long_as_the_clock_of_its_runtime_says(optimised: Implementation) -> None:
    ticks = count(1, 1000)
    world = World(
        80, optimised=optimised, runtime=InlineRuntime(seed=7, clock_ns=lambda: next(ticks))
    )
    page, process = evicted_page(world), world.actor.process
    before = page.enclave.counts.fault_ns
    assert process.mm.fault(page.linaddr, 1, process) is FaultResult.NOPAGE
    assert page.entry is None and page.enclave.counts.fault_ns - before == 1000
