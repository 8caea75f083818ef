"""Guests under a host that evicts their EPC, against a dictionary of expected memory.

Goal: three guests, each with a virtual EPC as large as the host's whole EPC and enclaves larger
than that, beside native enclaves under a limit: host and guests swap at the same time, and nothing
is lost, stale or foreign; in the end every page of every EPC is free.

Method: the actors of ``programs.py`` run in the guests and on the host, interleaved by seeded
schedules, by threads, or one after the other; both ksgxds run, and a storm reclaims on the host
whenever it can.  Counts are recounted, VIRTCHILDCNT against the host's own among them.
The long profile, thousands of schedules: ``SOFTSGX_GUESTS=50 pytest tests/model/test_guests.py``.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import pytest
from tests.model.programs import STEPS, Actor, run_steps
from tests.support.guests import GuestHost, GuestSystem

from softsgx.kvm import GuestStoppedError
from softsgx.runtime import Pct, Runtime, SeededRuntime, ThreadsRuntime, Uniform
from softsgx.trace import Tracer

SCALE = int(os.environ.get("SOFTSGX_GUESTS", "1"))
KINDS = tuple(kind for kind in STEPS if kind != "remap")


def _storm(host: GuestHost, seed: int, count: int) -> None:
    """Reclaim on the host, gently and by force, as others allocate."""
    rng = random.Random(seed)
    for _ in range(count):
        host.core.reclaim(force=rng.random() < 0.5)
        host.runtime.yield_now()


def _guest_storm(guest: GuestSystem, seed: int, count: int) -> None:
    """Reclaim in the guest."""
    rng = random.Random(seed)
    for _ in range(count):
        guest.core.reclaim(force=rng.random() < 0.5)
        guest.runtime.yield_now()


def _warden(guest: GuestSystem, seed: int, count: int) -> None:
    """Pause and go on."""
    rng = random.Random(seed)
    for _ in range(count):
        for _yield in range(rng.randrange(20)):
            guest.runtime.yield_now()
        guest.guest.pause()
        guest.runtime.yield_now()
        guest.guest.unpause()


def _executioner(guest: GuestSystem, seed: int) -> None:
    """Stop a guest in the middle of things."""
    for _yield in range(random.Random(seed).randrange(60)):
        guest.runtime.yield_now()
    guest.guest.stop("on command")


def _until_stopped(program: Callable[[], None]) -> None:
    # A task that is killed while it waits would wait again to leave its enclave: KeyError.
    with suppress(GuestStoppedError, KeyError):
        program()


def swarm(
    runtime: Runtime,
    seed: int,
    *,
    guests: int = 3,
    epc_pages: int = 40,
    guest_pages: int = 40,
    steps: int = 4,
    pages: int = 6,
    shared: bool = False,
    doomed: bool = False,
    kinds: Sequence[str] = KINDS,
    tracer: Tracer | None = None,
) -> int:
    """Let actors in guests and on the host run at the same time; everything must be free then.

    Returns:
        How many operations they did.
    """
    host = GuestHost(epc_pages=epc_pages, runtime=runtime, processors=3, ksgxd=True, tracer=tracer)
    limited = host.tree.make("native")
    limited.max_pages = 14
    native = Actor(host.system, host.system.process(group=limited), cpu=0, tolerant=True)
    native.launch(4)
    crew: list[tuple[GuestSystem, list[Actor]]] = []
    for _ in range(guests):
        guest = host.guest(guest_pages, ksgxd=True)
        first = Actor(guest, guest.process(), cpu=0)  # type: ignore[arg-type]
        threads = 2 if shared else 1
        share = first.launch(pages, threads=threads, actors=threads)
        assert share is not None
        actors = [first]
        if shared:
            second = Actor(guest, first.process, cpu=1)  # type: ignore[arg-type]
            second.join(share.made, 1, 2)
            actors.append(second)
        crew.append((guest, actors))
    tasks = [
        runtime.spawn(partial(run_steps, native, seed, steps, kinds), "native"),
        runtime.spawn(partial(_storm, host, seed, 4 * steps), "storm"),
    ]
    for number, (guest, actors) in enumerate(crew):
        name = guest.guest.name
        programs = {f"{name}.storm": partial(_guest_storm, guest, seed, steps)}
        for actor in actors:
            own = seed * 100 + 10 * number + actor.cpu
            programs[f"{name}.{actor.cpu}"] = partial(run_steps, actor, own, steps, kinds)
        if doomed and not number:
            # A task of a machine that is no more may wait in it for ever.
            for at, program in programs.items():
                runtime.spawn(partial(_until_stopped, program), at, daemon=True)
            programs = {"executioner": partial(_executioner, guest, seed)}
        elif number == 1:
            programs["warden"] = partial(_warden, guest, seed, steps)
        tasks += [runtime.spawn(program, at) for at, program in programs.items()]
    for task in tasks:
        task.join()
    if doomed:
        stopped, _actors = crew.pop(0)
        assert stopped.guest.stopped == "on command"
        while stopped.guest.resident:  # whoever has its lock may have to let go first
            runtime.yield_now()
        with suppress(GuestStoppedError):
            stopped.core.stop()
        stopped.guest.destroy()
        host.guests.remove(stopped)
    for guest, _actors in crew:
        guest.core.stop()
    host.core.stop()
    host.check_invariants()
    _end(host, native, crew)
    return native.operations + sum(actor.operations for _, actors in crew for actor in actors)


def _end(host: GuestHost, native: Actor, crew: list[tuple[GuestSystem, list[Actor]]]) -> None:
    native.process.exit()
    for guest, actors in crew:
        actors[0].process.exit()
        while guest.driver.enclaves:
            host.runtime.yield_now()
        assert guest.free_pages == guest.epc_pages, f"{guest.guest.name} has lost pages"
        guest.check_invariants()
    host.check_invariants()
    for guest in host.guests:
        guest.guest.destroy()
    host.guests = []
    host.check_invariants()
    assert not host.device.zombies
    assert host.core.free_pages == host.epc_pages, "the host has lost pages"


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("policy", ["uniform", "pct"])
@pytest.mark.parametrize("shared", [False, True])
def test_guests_keep_what_they_stored_under_any_schedule(policy: str, shared: bool) -> None:
    for seed in range(20 * SCALE):
        chosen = Uniform() if policy == "uniform" else Pct(depth=4, steps=20_000)
        runtime = SeededRuntime(seed, policy=chosen, step_limit=5_000_000)
        runtime.run(partial(swarm, runtime, seed, shared=shared))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_guest_that_is_stopped_takes_nothing_of_the_others_with_it() -> None:
    for seed in range(20 * SCALE):
        runtime = SeededRuntime(seed, step_limit=5_000_000)
        runtime.run(partial(swarm, runtime, seed, shared=seed % 2 == 0, guests=2, doomed=True))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("shared", [False, True])
def test_guests_keep_what_they_stored_on_threads(shared: bool) -> None:
    runtime = ThreadsRuntime()
    steps = 10 * min(SCALE, 20)
    runtime.run(partial(swarm, runtime, 1, steps=steps, shared=shared))
