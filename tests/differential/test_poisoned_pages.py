"""A page whose memory fails during a batch, in each implementation.

EBLOCK cannot be undone and EWB would read the failed memory, so a page that is poisoned between the
two can neither be used nor evicted.  See ``test_paging_corners`` for the method.
"""

from __future__ import annotations

from errno import EFAULT
from typing import Any

import pytest
from tests.differential.test_paging_corners import compare, isolated
from tests.model.test_random_programs import World

from softsgx.arch import PAGE_BYTES, AttributesFlags
from softsgx.driver import PROT_READ, peek
from softsgx.paging import FaultResult


def end_batch(page: Any) -> bool:
    """End a batch of one prepared page; return whether it was evicted."""
    epc = page.epc
    written = page.block() and page.write()
    epc.lru.put_back(epc)
    page.put()
    return bool(written)


def unusable(world: World) -> Any:
    """A page that is poisoned between EBLOCK and EWB."""
    (page,) = isolated(world)
    assert page.prepare() and page.block()
    epc = page.epc
    world.system.core.poison(epc.addr)
    assert not page.write() and page.epc is epc and epc.blocked
    epc.lru.put_back(epc)
    page.put()
    return page


def fault(world: World, page: Any) -> FaultResult:
    process = world.actor.process
    result = process.mm.fault(page.linaddr, PROT_READ, process)
    assert isinstance(result, FaultResult)
    return result


def test_a_fault_on_a_page_poisoned_before_ewb_is_sigbus_at_once() -> None:
    def action(world: World) -> object:
        page, core = unusable(world), world.system.core
        enclave, batches = page.enclave, core.counters.batches
        results = [fault(world, page) for _ in range(2)]
        assert core.counters.batches == batches, "a batch cannot evict the page"
        return results, enclave.refusal, enclave.counts.faults.get("refused")

    assert compare(action) == ([FaultResult.SIGBUS] * 2, "poisoned", 2)


def test_a_page_poisoned_before_eblock_is_not_blocked_and_stays_in_use() -> None:
    def action(world: World) -> object:
        (page,) = isolated(world)
        assert page.prepare()
        world.system.core.poison(page.epc.addr)
        epc, va = page.epc, page.swap.va
        assert not end_batch(page)
        assert page.epc is epc and not epc.blocked and not epc.tracked
        assert page.reservation is None and not page.being_reclaimed
        world.check()
        return fault(world, page), va.used

    assert compare(action)[0] is FaultResult.NOPAGE


def test_system_calls_on_a_page_poisoned_before_ewb_are_refused() -> None:
    def action(world: World) -> object:
        page, process = unusable(world), world.actor.process
        (made,) = (share.made for share in world.actor.shares if share.made.enclave is page.enclave)
        page.enclave.attributes |= AttributesFlags.DEBUG  # ptrace reads debug enclaves only
        with pytest.raises(OSError, match="poisoned") as by_ioctl:
            process.restrict(made.fd, page.linaddr - page.enclave.base, PAGE_BYTES, PROT_READ)
        with pytest.raises(OSError, match="poisoned") as by_ptrace:
            peek(process.mm, page.linaddr, 8, process)
        return by_ioctl.value.errno, by_ptrace.value.errno

    assert compare(action) == (EFAULT, EFAULT)


def test_a_page_poisoned_before_ewb_goes_into_quarantine_with_its_enclave() -> None:
    def action(world: World) -> object:
        page, core = unusable(world), world.system.core
        epc = page.epc
        for share in list(world.actor.shares):
            world.actor.drop(share)
        assert epc.free and not epc.blocked and not epc.leaked
        world.check()
        return core.poisoned_pages, core.counters.leaked

    assert compare(action) == (1, 0)
