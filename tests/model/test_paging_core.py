"""Histories of the EPC core on real leaves: no byte is lost, every page is in one place.

Goal: after additions, uses, stores, removals, evictions, kills, poison and failing backing in any
order, each page reads back the bytes that were written to it last, and every count agrees with a
recount.  Method: Hypothesis drives toy enclaves one call at a time; the seeded runtime then runs
several of them at once, with ksgxd, and switches at every lock and leaf.
"""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)
from tests.support.epc import ToyEnclave, block_of
from tests.support.hw import make_machine

from softsgx.paging import EpcCore, FailingBacking, LoadFailed, MemoryBacking, NoEpc, Policy
from softsgx.runtime import InlineRuntime, Pct, SeededRuntime, ThreadsRuntime
from softsgx.trace import Tracer

INDICES = st.integers(0, 40)


class EpcCoreHistories(RuleBasedStateMachine):
    """One call at a time."""

    enclaves = Bundle("enclaves")

    @initialize(epc_pages=st.sampled_from([16, 24, 48]), evict_va=st.booleans())
    def start(self, epc_pages: int, evict_va: bool, tracer: Tracer | None = None) -> None:
        self.runtime = InlineRuntime()
        self.machine = make_machine(epc_pages=epc_pages, runtime=self.runtime, tracer=tracer)
        policy = Policy(evict_va=evict_va)
        self.core = EpcCore(self.machine, self.runtime, dirty=(), policy=policy)
        self.living: list[ToyEnclave] = []
        self.numbers = 0
        self.writes = 0
        self.backing_fails = False

    @precondition(lambda self: len(self.living) < 4)
    @rule(target=enclaves)
    def create(self) -> ToyEnclave:
        self.numbers += 1
        backing = FailingBacking(MemoryBacking(), lambda _request: self.backing_fails)
        encl = ToyEnclave(self.core, self.machine, number=self.numbers, backing=backing)
        self.living.append(encl)
        return encl

    @rule(encl=enclaves, index=INDICES)
    def add(self, encl: ToyEnclave, index: int) -> None:
        if index not in encl.pages:
            encl.add(index)

    @rule(encl=enclaves, first=INDICES)
    def add_many(self, encl: ToyEnclave, first: int) -> None:
        for index in range(first, first + 12):
            self.add(encl, index)

    @rule(encl=enclaves, index=INDICES)
    def read(self, encl: ToyEnclave, index: int) -> None:
        if index in encl.pages:
            assert encl.read(index) == encl.pages[index].content

    @rule(encl=enclaves, index=INDICES)
    def store(self, encl: ToyEnclave, index: int) -> None:
        if index in encl.pages:
            self.writes += 1
            encl.store(index, block_of(self.writes | 1 << 60))

    @rule(encl=enclaves, index=INDICES)
    def remove(self, encl: ToyEnclave, index: int) -> None:
        if index in encl.pages:
            self.leave(encl)  # EREMOVE wants nobody inside
            assert encl.remove(index)

    @rule(force=st.booleans())
    def reclaim(self, force: bool) -> None:
        self.core.reclaim(force=force)

    @rule()
    def evict_everything(self) -> None:
        while self.core.reclaim(force=True).freed:
            pass

    @rule()
    def reclaim_without_backing(self) -> None:
        self.backing_fails = True
        self.core.reclaim(force=True)
        self.backing_fails = False

    @rule(encl=enclaves, index=INDICES)
    def load_without_backing(self, encl: ToyEnclave, index: int) -> None:
        page = encl.pages.get(index)
        if page is None or page.entry is None:
            return
        self.backing_fails = True
        with pytest.raises((LoadFailed, NoEpc)):  # or no page can leave to make room for it
            encl.touch(index)
        self.backing_fails = False

    @rule(encl=enclaves)
    def enter(self, encl: ToyEnclave) -> None:
        # Not more than the model of tracking allows: one that stays until it is kicked out.
        if encl.swap.secs is not None and not encl.inside and encl.swap.children:
            encl.enter()

    @rule(encl=enclaves)
    def leave(self, encl: ToyEnclave) -> None:
        if encl.inside:
            encl.kick()

    @rule(encl=consumes(enclaves))
    def destroy(self, encl: ToyEnclave) -> None:
        if encl.inside:
            encl.kick()
        encl.close()
        assert encl.destroyed
        self.living.remove(encl)

    @invariant()
    def every_epc_page_is_in_exactly_one_place(self) -> None:
        self.core.check_invariants()

    @invariant()
    def every_enclave_counts_right(self) -> None:
        for encl in self.living:
            encl.check_invariants()
            hardware = encl.hardware.children if encl.swap.secs is not None else 0
            assert hardware == encl.swap.children

    def teardown(self) -> None:
        if not hasattr(self, "living"):
            return
        for encl in self.living:
            if encl.inside:
                encl.kick()
            encl.check()
            encl.close()
        self.core.check_invariants()
        self.machine.check_invariants()
        assert self.core.free_pages == self.core.epc_pages
        assert self.core.counters.leaked == self.core.counters.lost == 0


EpcCoreHistories.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestEpcCoreHistories = EpcCoreHistories.TestCase


# --- several at once ------------------------------------------------------------------------------


def storm(
    runtime: SeededRuntime | ThreadsRuntime | InlineRuntime,
    *,
    epc_pages: int = 20,
    enclaves: int = 2,
    pages: int = 10,
    steps: int = 12,
    policy: Policy | None = None,
    tracer: Tracer | None = None,
) -> EpcCore:
    """Two tasks an enclave use it, one enclave dies early, ksgxd and a direct reclaimer run."""
    machine = make_machine(epc_pages=epc_pages, runtime=runtime, tracer=tracer)
    core = EpcCore(machine, runtime, dirty=(), policy=policy)
    made: list[ToyEnclave] = []

    def build() -> None:
        for number in range(enclaves):
            encl = ToyEnclave(core, machine, number=number + 1)
            for index in range(pages):
                encl.add(index)
            made.append(encl)

    def use(encl: ToyEnclave, half: int) -> None:
        rng = runtime.random
        for step in range(steps):
            index = rng.randrange(pages // 2) * 2 + half  # each task has its own pages
            if rng.random() < 0.5:
                encl.store(index, block_of(step << 16 | half << 8 | encl.number | 1 << 60))
            else:
                assert encl.read(index) == encl.pages[index].content

    def kill() -> None:
        encl = ToyEnclave(core, machine, number=99)
        for index in range(4):
            encl.add(index)
        encl.close()

    def squeeze() -> None:
        for _ in range(3):
            core.reclaim(force=True)

    def main() -> None:
        core.start()
        build()
        tasks = [
            runtime.spawn(partial(use, encl, half), f"use{encl.number}{half}")
            for encl in made
            for half in (0, 1)
        ]
        tasks += [runtime.spawn(kill, "kill"), runtime.spawn(squeeze, "squeeze")]
        for task in tasks:
            task.join()
        core.stop()
        for encl in made:
            encl.check_invariants()
            encl.check()
            encl.close()

    runtime.run(main)
    core.check_invariants()
    machine.check_invariants()
    assert core.free_pages == epc_pages
    assert core.counters.leaked == core.counters.lost == core.counters.eldu_failed == 0
    return core


@pytest.mark.parametrize("seed", range(8))
def test_no_schedule_loses_a_byte_or_a_page(seed: int) -> None:
    assert storm(SeededRuntime(seed)).counters.reclaimed > 0


@pytest.mark.parametrize("seed", range(4))
def test_no_schedule_of_few_switches_does(seed: int) -> None:
    storm(SeededRuntime(seed, policy=Pct(3, 5000)), epc_pages=24)


def test_threads_lose_nothing() -> None:
    storm(ThreadsRuntime(), steps=40)


def test_one_thread_loses_nothing() -> None:
    storm(InlineRuntime(), steps=200)


def test_the_same_seed_gives_the_same_history() -> None:
    runs = []
    for _ in range(2):
        runtime = SeededRuntime(5)
        core = storm(runtime, steps=6)
        runs.append((runtime.schedule.text(), core.counters.as_dict()))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("seed", range(3))
def test_shortage_ends_in_an_answer_under_every_schedule(seed: int) -> None:
    """Enclaves that may not lose their SECS fill the EPC: the last one gets NoEpc."""
    runtime = SeededRuntime(seed)
    machine = make_machine(epc_pages=16, runtime=runtime)
    core = EpcCore(machine, runtime, dirty=())
    refused: list[int] = []

    def build(number: int) -> None:
        try:
            ToyEnclave(core, machine, number=number, initialised=False)
        except NoEpc:
            refused.append(number)

    def main() -> None:
        core.start()
        tasks = [runtime.spawn(partial(build, number), "build") for number in range(1, 13)]
        for task in tasks:
            task.join()
        core.stop()

    runtime.run(main)
    assert refused
    core.check_invariants()
