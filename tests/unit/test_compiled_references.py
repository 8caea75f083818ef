"""The compiled core gives back each reference that it takes.

Method: many faults with evictions, loads that are refused and batches that skip pages; the number
of allocated blocks and the references of objects that every fault uses stay what they were.
"""

from __future__ import annotations

import gc
import sys

import pytest
from tests.model.test_random_programs import World

from softsgx import compiled
from softsgx.arch import PageType
from softsgx.paging import FaultResult

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
        "kind": "reg",
        "none": None,
        "true": True,
        "false": False,
        "page type": PageType.REG,
    }
    return {name: sys.getrefcount(thing) for name, thing in things.items()}


def fault(world: World, number: int) -> None:
    """Evict a page and load it again; sometimes the load is refused first."""
    core, process = world.system.core, world.actor.process
    pages = [p for p in world.system.driver.enclaves[0].pages.values() if p.kind is PageType.REG]
    page = pages[number % len(pages)]
    if page.epc is not None:
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
