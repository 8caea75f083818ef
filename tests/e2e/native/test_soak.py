"""No history of processes, system calls or faults ends the supervisor or leaks its resources.

Method: a short run of the kinds of ``tests/soak`` that need the native engine, with fixed seeds.
"""

from __future__ import annotations

import pytest
from tests.e2e.native.enclave import COMPILER
from tests.soak import calls, lifetimes, longrun
from tests.support import modes
from tests.support.native import needs_tracing

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    needs_tracing,
    pytest.mark.slow,
]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("pager", lifetimes.usable_pagers())
def test_no_life_of_a_process_disturbs_the_others_or_the_supervisor(
    pager: str, strict: bool
) -> None:
    lifetimes.live(4, 60, {"pager": pager, "strict": strict, "epc": "128KiB"})


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("pager", lifetimes.usable_pagers())
def test_no_system_call_harms_an_enclave_or_gives_another_result_than_the_kernels(
    pager: str, strict: bool
) -> None:
    calls.call(7, range(100), {"pager": pager, "strict": strict, "epc": "128KiB"})


@pytest.mark.parametrize("pager", lifetimes.usable_pagers())
def test_no_fault_keeps_memory_or_descriptors(pager: str) -> None:
    first, *_, last = longrun.faults(8000, 1000, pager)[1:]
    assert last.faults > first.faults
    schedstat = int(modes.has("recorded"))  # the recorder has it open now and then
    assert abs(last.descriptors - first.descriptors) <= schedstat
    assert last.memory_bytes - first.memory_bytes < 1 << 20
    assert last.objects - first.objects < 1000
