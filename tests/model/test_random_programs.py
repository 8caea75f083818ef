"""Random programs against a dictionary of what each enclave's memory must hold.

Goal: a byte written by an enclave is read back by that enclave, or the step fails in a way it may;
never stale, never foreign, never lost; and in the end every EPC page is free again.

Method: Hypothesis draws programs of one actor (``programs.py``) in EPCs down to 12 pages, with
what an operating system and a machine do to it: reclaim, poison, limits, backing that fails, loss
of power, a kill.  Seeded schedules interleave several actors with ksgxd; threads run a few.
The long profile: ``SOFTSGX_PROGRAMS=20 pytest tests/model/test_random_programs.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.model.programs import STEPS, Actor, Share, run_steps, storm, touch
from tests.support.driver import System

from softsgx.arch import PAGE_BYTES
from softsgx.cgroup import Hierarchy
from softsgx.defects import Defect
from softsgx.paging import Backing, EpcCore, FailingBacking, FlatBacking, MemoryBacking, Policy
from softsgx.paging.optimised import CompiledCore, PlainCore
from softsgx.runtime import InlineRuntime, Pct, Runtime, SeededRuntime, ThreadsRuntime, Uniform
from softsgx.trace import Tracer
from softsgx.userland import Signal

SCALE = int(os.environ.get("SOFTSGX_PROGRAMS", "1"))
WORLD = (
    "reclaim",
    "evict",
    "poison free",
    "poison used",
    "launch",
    "drop",
    "limit",
    "kill",
    "power",
)
SHARED_STEPS = tuple(kind for kind in STEPS if kind != "remap")
SMALL = st.integers(0, (1 << 24) - 1)


CORES: dict[object, type[EpcCore]] = {
    "compiled": CompiledCore,
    True: PlainCore,
    False: EpcCore,
}


class World:
    """One machine with one actor, and everything that may happen to it."""

    def __init__(
        self,
        epc_pages: int,
        *,
        fail_every: int = 0,
        limited: bool = False,
        tracer: Tracer | None = None,
        runtime: Runtime | None = None,
        optimised: bool | Literal["compiled"] = False,
        backing_limit: int | None = None,
        policy: Policy | None = None,
        data_pages: int = 4,
    ) -> None:
        self.data_pages = data_pages
        runtime = InlineRuntime() if runtime is None else runtime
        self.optimised, self.backing_limit = optimised, backing_limit
        self.backings: list[Backing] = []
        self.tree = Hierarchy(epc_pages, runtime)
        self.fail_every = fail_every
        self.system = System(
            epc_pages=epc_pages,
            runtime=runtime,
            root=self.tree.root,
            backing=self._backing,
            tracer=tracer,
            core_type=CORES[optimised],
            policy=policy,
        )
        self.group = self.tree.make("jobs")
        self.limited = limited
        self.poisoned = 0
        self.actor = Actor(
            self.system,
            self.system.process(group=self.group),
            cpu=0,
            tolerant=bool(fail_every) or limited or backing_limit is not None,
        )
        self.launch()

    def _backing(self, _pages: int) -> Backing:
        if self.fail_every:
            return FailingBacking(MemoryBacking(), self._fails)
        kind = FlatBacking if self.optimised else MemoryBacking
        self.backings.append(kind(self.backing_limit))
        return self.backings[-1]

    def _fails(self, request: int) -> bool:
        return bool(self.fail_every) and request % self.fail_every == 0

    def launch(self) -> None:
        self.actor.launch(self.data_pages)

    def do(self, kind: str, number: int, value: int) -> None:
        actor, core = self.actor, self.system.core
        match kind:
            case "reclaim":
                core.reclaim()
            case "evict":
                for _ in range(8):
                    core.reclaim(force=True)
            case "poison free" | "poison used" if self.room():
                self._poison(kind, number, value)
            case "launch" if len(actor.shares) < 3:
                self.launch()
            case "drop" if len(actor.shares) > 1:
                actor.drop(actor.shares[number % len(actor.shares)])
            case "limit" if self.limited:
                self.group.max_pages = None if value % 4 == 0 else 10 + value % 20
            case "kill" if actor.shares:
                share = actor.shares[number % len(actor.shares)]
                share.made.file.kill()
                self._check_lost(share)
            case "power" if value % 4 == 0:
                self.system.machine.power_transition()
                for share in list(actor.shares):
                    self._check_lost(share)
            case _:
                actor.step(kind, number, value)

    def room(self) -> bool:
        """Whether the EPC stays large enough for one step after a page is poisoned."""
        return self.system.epc_pages - self.poisoned > 24

    def _poison(self, kind: str, number: int, value: int) -> None:
        core: EpcCore = self.system.core
        pages = [
            page.epc
            for share in self.actor.shares
            for page in share.made.enclave.pages.values()
            if page.epc is not None
        ]
        if kind == "poison used" and pages:
            core.poison(pages[number % len(pages)].addr)
        else:
            section = core.hw.config.sections[0]
            core.poison(section.base + value % section.pages * PAGE_BYTES)
        self.poisoned += 1

    def _check_lost(self, share: Share) -> None:
        """Of a lost enclave nothing is read, and above all nothing wrong."""
        share.lost = True
        self.actor.read_all(share)
        self.actor.drop(share)

    def finish(self) -> None:
        """Everything must be there, and then everything must be free."""
        if self.limited:
            self.group.max_pages = None
        self.fail_every = 0
        for share in list(self.actor.shares):
            self.actor.read_all(share)
        self.check()
        self.actor.process.exit()
        self.check()
        free = self.system.free_pages + self.system.core.poisoned_pages
        assert free == self.system.epc_pages, f"{self.system.epc_pages - free} pages are gone"
        self.system.driver.unload()

    def check(self) -> None:
        self.system.check_invariants()
        self.tree.check_invariants()


programs = st.lists(st.tuples(st.sampled_from(STEPS + WORLD), SMALL, SMALL), max_size=40)
ordinary = settings(
    max_examples=60 * SCALE,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    derandomize=SCALE == 1,
)


def _run(world: World, program: list[tuple[str, int, int]]) -> None:
    for kind, number, value in program:
        world.do(kind, number, value)
        world.check()
    world.finish()


@pytest.mark.slow
@given(epc_pages=st.sampled_from((12, 13, 16, 32, 40, 80)), program=programs)
@ordinary
def test_memory_holds_the_stored_bytes_after_any_history(
    epc_pages: int, program: list[tuple[str, int, int]]
) -> None:
    _run(World(epc_pages), program)


@pytest.mark.slow
@given(epc_pages=st.sampled_from((16, 32)), fail_every=st.integers(1, 7), program=programs)
@ordinary
def test_memory_survives_backing_that_fails(
    epc_pages: int, fail_every: int, program: list[tuple[str, int, int]]
) -> None:
    _run(World(epc_pages, fail_every=fail_every), program)


@pytest.mark.slow
@given(epc_pages=st.sampled_from((16, 40)), program=programs)
@ordinary
def test_memory_survives_limits(epc_pages: int, program: list[tuple[str, int, int]]) -> None:
    _run(World(epc_pages, limited=True), program)


# --- several actors -------------------------------------------------------------------------------


def together(
    system: System,
    seed: int,
    *,
    actors: int,
    steps: int,
    shared: bool,
    kinds: Sequence[str] = SHARED_STEPS,
) -> int:
    """Let actors run at the same time, with ksgxd; then everything must be free again.

    Returns:
        How many operations they did.
    """
    runtime = system.runtime
    crew = [Actor(system, system.process(), cpu=cpu) for cpu in range(actors)]
    if shared:
        share = crew[0].launch(4, threads=actors, actors=actors)
        assert share is not None
        for number, actor in enumerate(crew[1:], 1):
            # Forked or a thread of the same process: both share an enclave.
            actor.process = crew[0].process if number % 2 else crew[0].process.fork()
            actor.join(replace(share.made, process=actor.process), number, actors)
    else:
        for actor in crew:
            actor.launch(4)
    programs: list[tuple[str, Callable[[], None]]] = [
        ("storm", partial(storm, system, seed, 3 * steps)),
    ]
    for cpu, actor in enumerate(crew):
        programs += [
            (f"actor{cpu}", partial(run_steps, actor, seed * 100 + cpu, steps, kinds)),
            (f"touch{cpu}", partial(touch, actor, actor.process, seed + cpu, 4 * steps)),
        ]
    tasks = [runtime.spawn(program, name) for name, program in programs]
    for task in tasks:
        task.join()
    system.core.stop()  # in the middle of a batch, pages are marked
    system.check_invariants()
    for process in {id(actor.process): actor.process for actor in crew}.values():
        process.exit()
    while system.driver.enclaves:  # the end of a space that was being walked is put off
        runtime.yield_now()
    system.check_invariants()
    assert system.free_pages == system.epc_pages
    return sum(actor.operations for actor in crew)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["uniform", "pct"])
@pytest.mark.parametrize("shared", [False, True])
def test_actors_do_not_disturb_each_other_under_any_schedule(policy: str, shared: bool) -> None:
    for seed in range(30 * SCALE):
        chosen = Uniform() if policy == "uniform" else Pct(depth=4, steps=20_000)
        runtime = SeededRuntime(seed, policy=chosen, step_limit=5_000_000)

        def main(runtime: SeededRuntime = runtime, seed: int = seed) -> None:
            system = System(epc_pages=40, runtime=runtime, processors=3, ksgxd=True)
            together(system, seed, actors=3, steps=10, shared=shared)

        runtime.run(main)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_actors_do_not_disturb_each_other_on_threads(shared: bool) -> None:
    runtime = ThreadsRuntime()
    system = System(epc_pages=48, runtime=runtime, processors=3, ksgxd=True)
    runtime.run(lambda: together(system, 1, actors=3, steps=40 * SCALE, shared=shared))


@pytest.mark.slow
@pytest.mark.parametrize(
    "defect",
    [
        Defect.PCMD_PAGE_TRUNCATED_WHILE_SHARED,
        Defect.CONCURRENT_EAUG_REFUSED,
        Defect.MM_WALK_NOT_REPEATED,
    ],
)
def test_random_programs_find_a_race_that_is_switched_on(defect: Defect) -> None:
    """What the test above is worth: each of these shows within a few seeds."""

    def found(seed: int) -> bool:
        runtime = SeededRuntime(seed, step_limit=5_000_000)

        def main() -> None:
            system = System(
                epc_pages=40,
                runtime=runtime,
                processors=3,
                ksgxd=True,
                defects=frozenset((defect,)),
            )
            together(system, seed, actors=3, steps=12, shared=seed % 2 == 0)

        try:
            runtime.run(main)
        except (AssertionError, Signal):
            return True
        return False

    assert any(found(seed) for seed in range(100))
