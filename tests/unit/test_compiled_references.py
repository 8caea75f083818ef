"""The compiled core gives back each reference that it takes.

Method: many faults with evictions, loads that are refused and batches that skip pages; the number
of allocated blocks and the references of objects that every fault uses stay what they were.  One
allocation after the other fails, in a load and in an eviction.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from typing import Any

import pytest
from tests.model.test_random_programs import World

from softsgx import compiled
from softsgx.arch import PageType
from softsgx.driver.page import LABELS
from softsgx.paging import EpcBusy, FaultResult, FlatBacking
from softsgx.paging.sealed import free_places

FAULTS = 100_000

pytestmark = pytest.mark.skipif(compiled.speedups is None, reason=compiled.description)


def counts(world: World) -> dict[str, int]:
    core, driver = world.system.core, world.system.driver
    enclave = driver.enclaves[0]
    page = next(iter(enclave.pages.values()))
    things = {
        "core": core,
        "ksgxd": core._ksgxd,
        "claims": core.claims,
        "counters": core.counters,
        "group": world.group,
        "lru": world.group.lru,
        "reclaimable pages": world.group.lru.pages,
        "freed pages": core._pool.first(0).freed,
        "root": world.tree.root,
        "enclave": enclave,
        "counts": enclave.counts,
        "swap": enclave.swap,
        "va": enclave.swap.va,
        "backing": enclave.swap._backing,
        "machine": world.system.machine,
        "page": page,
        "process": world.actor.process,
        "mm": world.actor.process.mm,
        "kind": LABELS[PageType.REG],
        "none": None,
        "true": True,
        "false": False,
        "page type": PageType.REG,
    }
    many: dict[str, Iterable[object]] = {
        "pages": enclave.pages.values(),
        "records": core._pool.records.values(),
        "indices": [page.index for page in enclave.pages.values()],
        "VA pages": enclave.swap.va.pages(),
        "groups": world.tree.root.subtree(),
        "EPCM entries": world.system.machine.pages.values(),
    }
    return {
        **{name: sys.getrefcount(thing) for name, thing in things.items()},
        **{name: sum(map(sys.getrefcount, some)) for name, some in many.items()},
    }


def fault(world: World, number: int) -> None:
    """Evict a page and load it again; sometimes the load is refused first."""
    core, process = world.system.core, world.actor.process
    pages = [p for p in world.system.driver.enclaves[0].pages.values() if p.kind is PageType.REG]
    page = pages[number % len(pages)]
    if page.epc is not None:
        if number % 32 == 0:
            page.epc.kept = True
            assert not core.evict(page.epc)
            page.epc.kept = False
        assert core.evict(page.epc)
    if number % 64 == 0:
        page.max_prot = 0
        assert process.mm.fault(page.linaddr, 1, process) is FaultResult.SIGBUS
        page.max_prot = 3
    if number % 100 == 0:
        assert page.entry is not None and page.entry.slot is not None
        slot = page.entry.slot
        assert slot.page.epc is not None
        versions = world.system.epcm(slot.page.epc.addr).versions
        versions[slot.number] += 8
        assert process.mm.fault(page.linaddr, 1, process) is FaultResult.SIGBUS
        versions[slot.number] -= 8
    if number % 16 == 0:
        core.reclaim()
    if number % 32 == 0:
        group = world.group
        group.max_pages = group.usage_pages
        if page.entry is not None:
            with pytest.raises(EpcBusy):
                page.swap.load(page.entry, page, group=group)
        group.max_pages = None
    assert process.mm.fault(page.linaddr, 1, process) is FaultResult.NOPAGE


@pytest.mark.slow
def test_a_hundred_thousand_faults_leave_no_reference_behind() -> None:
    world = World(40, optimised="compiled")
    for number in range(2000):
        fault(world, number)
    gc.collect()
    before, blocks = counts(world), sys.getallocatedblocks()
    for number in range(2000, 2000 + FAULTS):
        fault(world, number)
    gc.collect()
    after = counts(world)
    for name, count in before.items():
        assert abs(after[name] - count) < 100, f"{name}: {count} references, then {after[name]}"
    assert sys.getallocatedblocks() - blocks < 1000
    world.check()


def test_no_fault_keeps_a_block_of_ciphertext_in_use() -> None:
    world = World(40, optimised="compiled")
    for number in range(130):
        fault(world, number)
    backing = world.system.driver.enclaves[0].swap._backing
    assert isinstance(backing, FlatBacking)
    sealed = backing.sealed
    assert sealed._blocks
    sealed.free = free_places(())  # only that of before holds blocks
    for block in sealed._blocks:
        block.release()  # a BufferError while it is used


# --- allocations that fail ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings(
    # The ciphers' library writes what failed, and panics.
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("what", ["load", "evict"])
def test_an_allocation_that_fails_is_no_other_error(what: str) -> None:
    testcapi: Any = pytest.importorskip("_testcapi")

    def attempt(number: int | None) -> object:
        world = World(40, optimised="compiled")
        core, process = world.system.core, world.actor.process
        pages = world.system.driver.enclaves[0].pages.values()
        page = next(page for page in pages if page.kind is PageType.REG)
        epc = page.epc
        assert epc is not None
        if what == "load":
            assert core.evict(epc)
        try:
            if number is not None:
                testcapi.set_nomemory(number, number + 1)
            if what == "load":
                return process.mm.fault(page.linaddr, 1, process)
            return core.evict(epc)
        except MemoryError:
            return MemoryError
        finally:
            testcapi.remove_mem_hooks()

    usual = attempt(None)
    # What is made at its first use is made before; the last numbers are beyond what a call needs.
    for implementation in (True, False):
        world = World(40, optimised=implementation)
        world.system.evict(world.system.driver.enclaves[0])
    seen = [attempt(number) for number in range(200)]
    assert seen[-1] == usual and seen.count(MemoryError) > 2
    assert set(seen) <= {usual, MemoryError, FaultResult.SIGBUS}
