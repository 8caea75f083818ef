"""What a fault in C keeps from the last one, and counts, in each implementation.

Method: as in ``test_paging_corners``.  C code keeps the chunk of pages and the node that it used
last, refuses a charge itself, and counts by label; a change of what it keeps must be seen.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tests.differential.test_fault_corners import handle
from tests.differential.test_paging_corners import compare, evicted, load
from tests.model.test_random_programs import World

from softsgx import compiled
from softsgx.driver import fault, optimised
from softsgx.driver.page import EnclavePage
from softsgx.driver.pages import EnclavePages
from softsgx.paging import EpcBusy, FaultResult


def remove_all(pages: EnclavePages, how: str) -> None:
    """Remove every page."""
    if how == "delete":
        for index in list(pages):
            del pages[index]
    elif how == "drain":
        assert list(pages.drain())
    else:
        pages.clear()


@pytest.mark.parametrize("how", ["delete", "drain", "clear"])
def test_a_fault_finds_the_page_that_is_there_now(how: str) -> None:
    def action(world: World) -> object:
        first, second = evicted(world, 2)
        enclave, results = first.enclave, list[object]()
        results.append(handle(world, first)[0])
        kept = dict(enclave.pages.items())
        remove_all(enclave.pages, how)
        results.append((handle(world, second)[0], second.epc is None, len(enclave.pages)))
        enclave.pages[second.index] = second
        results.append(handle(world, second)[0])
        for index, page in kept.items():
            enclave.pages[index] = page
        return results, second.epc is not None, first.epc is not None

    (found, (_result, untouched, _left), again), *resident = compare(action)
    assert found is again is FaultResult.NOPAGE and untouched and all(resident)


def test_a_page_that_takes_the_place_of_another_one_is_found() -> None:
    def action(world: World) -> object:
        first, second = evicted(world, 2)
        handle(world, first)
        enclave = first.enclave
        other = type(second)(enclave, second.index, second.max_prot, second.kind)
        enclave.pages[second.index] = other
        result = handle(world, other)[0]
        return result, other.epc is not None, second.epc, other.touched, second.touched

    result, resident, before, touched, _touched = compare(action)
    assert (result, resident, before, touched) == (FaultResult.NOPAGE, True, None, True)


@pytest.mark.parametrize("chunks", [1, -1, 1 << 20, 1 << 40])
def test_pages_of_two_chunks_are_told_apart(chunks: int) -> None:
    def action(world: World) -> object:
        first, second = evicted(world, 2)
        mm, result = world.actor.process.mm, handle(world, first)[0]
        vma: Any = mm.find(first.linaddr)
        ended: object = None
        act = fault.handle if not world.optimised else optimised.handle
        if world.optimised == "compiled":
            assert compiled.speedups is not None
            act = compiled.speedups.handle
        away = second.linaddr + (chunks << 19)
        try:
            ended = act(second.enclave, mm, vma, away % 2**64, None)[0]
        except Exception as error:
            ended = type(error)
        return result, ended, second.epc, first.epc is not None

    assert compare(action)[2:] == (None, True)


def limited(world: World, child: Any, limit: str) -> None:
    """Let a limit refuse the next charge of a group."""
    group = child if limit == "child" else child.parent
    group.max_pages = group.usage_pages


@pytest.mark.parametrize("limit", ["child", "parent"])
@pytest.mark.parametrize("way", ["plain", "raises the peak", "no candidate", "verdict"])
def test_a_refused_charge_is_counted_where_it_is_refused(limit: str, way: str) -> None:
    def action(world: World) -> object:
        first, second = evicted(world, 2)
        core, child = world.system.core, world.tree.make("jobs/a")
        parent = world.tree.find("jobs")
        load(world, first, group=child)
        limited(world, child, limit)
        world.tree.raises_refused = way == "raises the peak"
        if way == "no candidate":
            assert core.unmark_reclaimable(first.epc)
        if way == "verdict":
            core._ksgxd._oom_verdicts[child] += 1
        error: object = None
        try:
            load(world, second, group=child)
        except Exception as refused:
            error = type(refused), str(refused), getattr(refused, "outcomes", None)
        if way == "no candidate":
            core.mark_reclaimable(first.epc)
        groups = (child, parent, world.tree.root)
        return (
            error,
            [(one.events, one.events_local, one.peak_pages, one.usage_pages) for one in groups],
            (core.counters.alloc_busy, core.counters.alloc_none, core.counters.wakeups),
            [group.describe() for group in core._ksgxd._requests],
            dict(core.counters.held),
        )

    error, (own, parent, root), (busy, _none, _wakeups), requests, _held = compare(action)
    assert own[:2] == (1, 1) if limit == "child" else own[:2] == (0, 0)
    assert parent[:2] == ((1, 0) if limit == "child" else (1, 1)) and root[:2] == (0, 0)
    if way == "plain":
        assert error[0] is EpcBusy and busy == 1 and len(requests) == 1


@pytest.mark.parametrize("plain", [True, False])
def test_pages_and_faults_are_counted_in_either_mapping(plain: bool) -> None:
    def action(world: World) -> object:
        first, second = evicted(world, 2)
        counters, counts = world.system.core.counters, first.enclave.counts
        if plain:
            counters.held, counts.faults = dict(counters.held), dict(counts.faults)
        before = counters.held["reg"], counts.faults.get("major", 0), counts.faults.get("busy", 0)
        handle(world, first)
        world.group.max_pages = world.group.usage_pages
        handle(world, second)
        world.group.max_pages = None
        after = counters.held["reg"], counts.faults.get("major", 0), counts.faults.get("busy", 0)
        world.system.core.evict(first.epc)
        return [late - early for late, early in zip(after, before, strict=True)], dict(
            counters.held
        )

    assert compare(action)[0][1] >= 1


def test_a_page_has_the_values_it_is_made_with() -> None:
    page: Any = EnclavePage(SimpleNamespace(base=0x7000), 5, 7, "kind")  # type: ignore[arg-type]
    assert (page.index, page.max_prot, page.kind, page.touched) == (5, 7, "kind", False)
    assert page.epc is page.reservation is None and page.linaddr == 0x7000 + 5 * 4096
