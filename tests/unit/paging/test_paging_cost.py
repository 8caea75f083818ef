"""What one eviction and one load cost: the same whatever the EPC's size and the enclaves' number.

RefCounted in calls of Python functions, which, unlike time, are the same in every run.
"""

from __future__ import annotations

import sys
from types import FrameType

from tests.support.epc import ToyEnclave
from tests.support.hw import make_machine

from softsgx.paging import Claim, EpcCore
from softsgx.runtime import InlineRuntime

BATCH = 16


def calls_of_a_cycle(epc_pages: int, others: int) -> int:
    """Return how many calls evicting and loading a batch takes, after a warm-up."""
    runtime = InlineRuntime()
    machine = make_machine(epc_pages=epc_pages, runtime=runtime)
    core = EpcCore(machine, runtime, dirty=())
    encl = ToyEnclave(core, machine)
    for number in range(2, others + 2):
        ToyEnclave(core, machine, number=number, size_pages=2).add(0)
    for index in range(BATCH):
        encl.add(index)

    def cycle() -> None:
        pages = [encl.pages[index] for index in range(BATCH)]
        for page in pages:
            assert page.epc is not None and core.unmark_reclaimable(page.epc)
            assert page.prepare() and page.block()
        for page in pages:
            epc = page.epc
            assert epc is not None and page.write()
            core.free(epc)
        for index in range(BATCH):
            encl.fault(index, claim)

    claim = Claim()
    cycle()
    calls = 0

    def count(_frame: FrameType, event: str, _arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        cycle()
    finally:
        sys.setprofile(None)
    return calls


def test_a_fault_costs_the_same_whatever_the_size_of_the_epc_and_the_number_of_enclaves() -> None:
    small = calls_of_a_cycle(1 << 12, 0)
    large = calls_of_a_cycle(1 << 24, 300)
    assert large <= small * 1.02, f"{large} calls, {small} in a small EPC"
    assert small <= BATCH * 180, f"{small} calls for {BATCH} pages"
