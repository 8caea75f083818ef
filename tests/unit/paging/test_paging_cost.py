"""The cost of an eviction and a load does not depend on the EPC's size or the number of enclaves.

The cost is counted in calls of functions, which, unlike time, are the same in every run: the
garbage collector, which calls finalizers and callbacks of other libraries, is off meanwhile.
"""

from __future__ import annotations

import gc
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
    for _ in range(8):  # a class gets its own methods when some instances have been made
        cycle()
    calls = 0

    def count(_frame: FrameType, event: str, _arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    gc.disable()
    sys.setprofile(count)
    try:
        cycle()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


def test_the_cost_of_a_fault_does_not_depend_on_epc_size_or_number_of_enclaves() -> None:
    small = calls_of_a_cycle(1 << 12, 0)
    large = calls_of_a_cycle(1 << 24, 300)
    assert large == small, f"{large} calls, {small} in a small EPC"


def test_evicting_and_loading_a_page_takes_less_than_200_calls() -> None:
    """A sixth more than it takes, so that other versions of Python pass and a slow path shows."""
    calls = calls_of_a_cycle(1 << 12, 0)
    assert calls < BATCH * 200, f"{calls} calls for {BATCH} pages"
