"""Progress: every instruction completes, with any number of threads in the smallest EPC.

Method: toy enclaves in an EPC of exactly the smallest size that is accepted, and threads with
instructions that each need as many pages at once as possible, under seeded schedules.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count

import pytest
from tests.support.epc import ToyEnclave
from tests.support.hw import make_machine

from softsgx.cgroup import Hierarchy
from softsgx.hw import MachineConfig
from softsgx.paging import Claim, EpcBusy, EpcCore, NoEpc, needed_pages
from softsgx.paging.claims import Claims, pages_at_once
from softsgx.runtime import InlineRuntime, Pct, Runtime, SeededRuntime, ThreadsRuntime

NEEDED = needed_pages(MachineConfig())
AT_ONCE = pages_at_once(MachineConfig())
"""Pages of an instruction and of the way back into the enclave."""


def make_core(runtime: Runtime, epc_pages: int = NEEDED, **options: object) -> EpcCore:
    machine = make_machine(epc_pages=epc_pages, runtime=runtime)
    core = EpcCore(machine, runtime, dirty=(), **options)  # type: ignore[arg-type]
    core.start()
    return core


def make_enclave(core: EpcCore, number: int, pages: int, **options: object) -> ToyEnclave:
    encl = ToyEnclave(core, core.hw, number=number, size_pages=1 << 13, **options)  # type: ignore[arg-type]
    for index in range(pages):
        encl.add(index)
    return encl


def crowd(runtime: Runtime, *, enclaves: int = 4, threads: int = 4, steps: int = 2) -> EpcCore:
    """Run threads, each of which needs pages of its own, together more than there are."""
    core = make_core(runtime)

    def main() -> None:
        made = [make_enclave(core, at + 1, threads * AT_ONCE) for at in range(enclaves)]
        tasks = []
        for encl in made:
            for thread in range(threads):
                needs = range(thread * AT_ONCE, (thread + 1) * AT_ONCE)
                work = partial(repeat, steps, partial(encl.execute, needs))
                tasks.append(runtime.spawn(work, f"thread{encl.number}.{thread}"))
        for task in tasks:
            task.join()
        core.stop()
        for encl in made:
            encl.check()
            encl.close()

    runtime.run(main)
    core.check_invariants()
    assert core.free_pages == core.epc_pages
    return core


def repeat(times: int, step: Callable[[], object]) -> None:
    for _ in range(times):
        step()


@pytest.mark.parametrize("seed", range(4))
def test_every_instruction_completes_in_the_smallest_epc(seed: int) -> None:
    core = crowd(SeededRuntime(seed, step_limit=2_000_000))
    assert core.counters.claims and core.counters.kept, "nobody was ever thrashes"
    assert core.counters.alloc_none == 0


@pytest.mark.parametrize("seed", range(4))
def test_every_instruction_completes_under_schedules_of_few_switches(seed: int) -> None:
    runtime = SeededRuntime(seed, policy=Pct(3, 20_000), step_limit=2_000_000)
    assert crowd(runtime).counters.alloc_none == 0


def test_instructions_complete_on_threads() -> None:
    assert crowd(ThreadsRuntime()).counters.alloc_none == 0


@pytest.mark.slow
def test_without_turns_threads_evict_each_others_pages_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The crowd is one that needs them."""
    monkeypatch.setattr(Claims, "_line_up", lambda *_arguments: None)
    with pytest.raises(AssertionError):  # a livelock of this runtime, or the patience of a thread
        crowd(SeededRuntime(0, step_limit=150_000))


def test_pages_whose_versions_are_in_different_va_pages_come_together() -> None:
    """Each VA page must stay for the slot that its page has left."""
    runtime = InlineRuntime()
    core = make_core(runtime)
    encl = make_enclave(core, 1, 512 * AT_ONCE)
    assert encl.execute(range(0, 512 * AT_ONCE, 512), patience=2 * NEEDED)
    core.stop()
    encl.close()


def test_thrashing_in_one_group_refuses_no_allocation_in_another() -> None:
    runtime = SeededRuntime(0, step_limit=5_000_000)
    tree = Hierarchy(4 * NEEDED, runtime)
    tight, roomy = tree.make("tight"), tree.make("roomy")
    tight.max_pages, roomy.max_pages = AT_ONCE, NEEDED
    core = make_core(runtime, 4 * NEEDED, root=tree.root)
    tree.request_reclaim = core.request_reclaim
    refusals: list[str] = []

    def thrash(encl: ToyEnclave) -> None:
        for _ in range(4):
            with pytest.raises(NoEpc) as refused:
                encl.execute(range(AT_ONCE))
            refusals.append(str(refused.value))

    def main() -> None:
        bad = make_enclave(core, 1, AT_ONCE, group=tight)
        good = [make_enclave(core, number, AT_ONCE, group=roomy) for number in (2, 3, 4)]
        tasks = [runtime.spawn(partial(thrash, bad), "bad")]
        for encl in good:
            work = partial(repeat, 6, partial(encl.execute, range(AT_ONCE)))
            tasks.append(runtime.spawn(work, f"good{encl.number}"))
        for task in tasks:
            task.join()
        core.stop()

    runtime.run(main)
    assert set(refusals) == {
        f"group /tight, limited to {AT_ONCE} pages, has no free page, and none can be evicted"
    }


class Late:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def test_a_thread_that_does_not_come_back_holds_for_a_bounded_time() -> None:
    clock = Late()

    def sleep(duration_ns: int) -> None:
        clock.now_ns += duration_ns

    runtime = InlineRuntime(clock_ns=clock, sleep_ns=sleep)
    core = make_core(runtime)
    first, second = (make_enclave(core, number, AT_ONCE) for number in (1, 2))
    while core.reclaim(force=True).freed:
        pass
    claim = Claim()
    for _robbed in range(2):
        while core.reclaim(force=True).freed:
            pass
        for index in range(AT_ONCE):
            first.fault(index, claim)
    assert core.claims.holder is claim
    began = clock.now_ns
    second.execute(range(AT_ONCE))
    assert 0 < clock.now_ns - began < 10_000_000
    assert core.claims.holder is not claim
    core.stop()


def test_the_end_of_a_turn_lets_every_page_go() -> None:
    runtime = SeededRuntime(1)
    core = crowd(runtime, steps=1)
    assert core.claims.holder is None and core.claims.short_in is None
    assert not any(page.kept for page in core._pool.records.values())


def test_a_page_for_the_thread_that_holds_is_not_taken_by_others() -> None:
    runtime = InlineRuntime()
    core = make_core(runtime, 64)
    holder, other = Claim(), Claim()
    core.claims._line_up(holder, None)
    core.claims.waiting(holder, core.root)
    for _page in range(2):  # until its turn has ended, not only for the page that it waits for
        with pytest.raises(EpcBusy) as refused:
            core.alloc(None, reclaim=False, claim=other)
        assert refused.value.pause
        core.free(core.alloc(None, reclaim=False, claim=holder))
    core.claims.release(holder)
    core.free(core.alloc(None, reclaim=False, claim=other))
    core.stop()


def test_threads_of_the_group_that_thrashes_stand_back_and_others_do_not() -> None:
    runtime = InlineRuntime()
    tree = Hierarchy(64, runtime)
    tight, roomy = tree.make("tight"), tree.make("roomy")
    core = make_core(runtime, 64, root=tree.root)
    core.claims._line_up(Claim(), tight)  # EPC pages are free: it need not wait for one
    with pytest.raises(EpcBusy) as refused:
        core.alloc(None, reclaim=False, group=tight, claim=Claim())
    assert refused.value.pause
    core.free(core.alloc(None, reclaim=False, group=roomy, claim=Claim()))
    core.stop()


def test_the_time_of_a_turn_follows_the_time_between_the_pages_of_a_holder() -> None:
    clock = Late()
    core = make_core(InlineRuntime(clock_ns=clock), 64)
    claims, holder, other = core.claims, Claim(), Claim()
    claims._line_up(holder, None)
    clock.now_ns += 900_000
    claims.waiting(holder, core.root)  # the machine is slow
    clock.now_ns += 3_000_000
    assert claims.held_by_other(other)
    for _need in range(40):
        clock.now_ns += 1000
        claims.waiting(holder, core.root)
    assert claims.grace_ns == 1_000_000
    clock.now_ns += 1_000_001
    assert not claims.held_by_other(other)
    core.stop()


def test_a_thread_that_thrashes_again_after_a_turn_that_ended_by_time_gets_more() -> None:
    clock = Late()
    core = make_core(InlineRuntime(clock_ns=clock), 64)
    claims, holder, other = core.claims, Claim(), Claim()
    graces = []
    for _turn in range(12):
        claims._line_up(holder, None)
        assert claims.holder is holder
        graces.append(claims.grace_ns)
        clock.now_ns += claims.grace_ns + 1
        assert not claims.held_by_other(other)
    assert graces == [min(1_000_000 << turn, 1_000_000_000) for turn in range(12)]
    claims._line_up(holder, None)
    claims.release(holder)  # its instruction has completed
    claims._line_up(holder, None)
    assert claims.grace_ns == 1_000_000_000
    core.stop()


def test_turns_come_in_the_order_in_which_threads_were_robbed() -> None:
    core = make_core(InlineRuntime(), 64)
    claims = [Claim() for _ in range(4)]
    for claim in claims:
        core.claims._line_up(claim, None)
    order = []
    for _turn in count():
        if core.claims.holder is None:
            break
        order.append(core.claims.holder)
        core.claims.release(core.claims.holder)
    assert order == claims
    core.stop()
