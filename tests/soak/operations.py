"""Random operations over every consumer of the EPC, many of them a second.

Method: the actors, worlds and machines of ``tests/model`` without Hypothesis: a seed chooses the
operations, and recounts, which cost more than most operations, follow every few of them.  Most
accesses share their entry into the enclave with others, as those of programs do.  The kinds of
histories take turns: one thread with all events of a machine, guests the same way, guests and
native enclaves on seeded schedules and on threads, the core alone, and all leaves against a
reference.  A history of one thread that fails is reduced to steps that still fail.

Counted are operations (steps of actors, accesses of visits, happenings of worlds), and by the
events of machine and driver the leaves that ended, the ioctls and the faults.

``python -m tests.soak.operations --history world --seed 7`` plays one history.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from tests.model import test_guests as guests
from tests.model import test_guests_world as guests_world
from tests.model import test_paging_core as paging_core
from tests.model import test_random_programs as programs
from tests.model.programs import VISITS
from tests.model.test_hw_machine import WALK
from tests.soak import repeat
from tests.support.driver import System
from tests.support.machines import NEEDS, Machines

from softsgx.driver import FaultHandled, IoctlDone
from softsgx.hw import LeafDone
from softsgx.runtime import (
    Pct,
    Policy,
    Runtime,
    SeededRuntime,
    ThreadsRuntime,
    Uniform,
)
from softsgx.trace import Event

__all__ = ["HISTORIES", "Tally", "play", "run"]

Steps = list[tuple[str, int, int]]
_SHARED_VISITS = tuple(kind for kind in VISITS if kind != "remap")
_STEPS, _STEPS_BETWEEN_RECOUNTS = 400, 25
_CALLS = 4000
_CORE_CALLS = (
    *["read", "store", "read", "store"] * 12,
    *["add", "add_many", "add_many", "remove", "reclaim", "reclaim", "enter", "leave"],
    *["create", "destroy", "evict_everything", "reclaim_without_backing", "load_without_backing"],
)
_STEP_LIMIT = 50_000_000
_REDUCING_SECONDS = 60.0


class Tally(Counter[str]):
    """What was done, by name; as a tracer it counts what machine and driver tell."""

    def __call__(self, event: Event) -> None:
        """Count an event."""
        match event:
            case LeafDone():
                self["leaf calls"] += 1
            case IoctlDone():
                self["ioctls"] += 1
            case FaultHandled():
                self["faults handled"] += 1
            case _:  # other things are not counted
                pass

    def operations(self, count: int, kind: str) -> None:
        """Count operations of a kind of history."""
        self["operations"] += count
        self[f"operations, {kind}"] += count


# --- one thread: histories that are lists of steps ------------------------------------------------


def _steps(seed: int, world: tuple[str, ...]) -> Steps:
    rng = random.Random(seed)
    kinds = (*VISITS, *VISITS, *VISITS, *world)
    return [(rng.choice(kinds), rng.getrandbits(24), rng.getrandbits(24)) for _ in range(_STEPS)]


def _world(seed: int, steps: Steps, tally: Tally, *, every: int) -> None:
    rng = random.Random(f"world {seed}")
    fails, limited = rng.choice([(0, False), (0, False), (rng.randrange(1, 8), False), (0, True)])
    epc_pages = rng.choice([16, 32] if fails else [16, 40] if limited else [12, 13, 16, 32, 40, 80])
    world = programs.World(epc_pages, fail_every=fails, limited=limited, tracer=tally)
    for number, (kind, first, second) in enumerate(steps):
        world.do(kind, first, second)
        if number % every == 0:
            world.check()
    world.finish()
    tally.operations(len(steps) + world.actor.operations, "one thread")


def _guest_world(seed: int, steps: Steps, tally: Tally, *, every: int) -> None:
    rng = random.Random(f"guests {seed}")
    world = guests_world.World(
        rng.choice((34, 48, 80)),
        rng.choice((16, 40)),
        fail_every=rng.choice((0, 0, 3, 7)),
        tracer=tally,
    )
    for number, (kind, first, second) in enumerate(steps):
        world.do(kind, first, second)
        if number % every == 0:
            world.host.check_invariants()
    world.finish()
    tally.operations(len(steps) + world.actor.operations, "guests")


_LISTS = {
    "world": (_world, programs.WORLD),
    "guest world": (_guest_world, guests_world.WORLD),
}


def _listed(name: str, seed: int, tally: Tally) -> None:
    """Play a history of steps; when it fails, say which of its steps still fail."""
    history, happenings = _LISTS[name]
    steps = _steps(seed, happenings)
    try:
        history(seed, steps, tally, every=_STEPS_BETWEEN_RECOUNTS)
    except Exception as error:
        fewest = _reduced(partial(history, seed, tally=Tally(), every=1), steps, type(error))
        raise AssertionError(f"{_text(error)}\nenough steps: {fewest}") from error


def _reduced(play_steps: Callable[[Steps], None], steps: Steps, kind: type[Exception]) -> Steps:
    """Return fewer steps that raise the same kind of error."""

    def fails(some: Steps) -> bool:
        try:
            play_steps(some)
        except kind:
            return True
        except Exception:  # another fault: not what is looked for
            return False
        return False

    end, size = time.monotonic() + _REDUCING_SECONDS, len(steps) // 2
    while size and time.monotonic() < end:
        at = 0
        while at < len(steps) and time.monotonic() < end:
            fewer = steps[:at] + steps[at + size :]
            if fails(fewer):
                steps = fewer
            else:
                at += size
        size //= 2
    return steps


# --- several at once ------------------------------------------------------------------------------


def _policy(seed: int) -> Policy:
    return Uniform() if seed % 2 else Pct(depth=4, steps=50_000)


def _together(seed: int, tally: Tally, runtime: Runtime, kind: str) -> None:
    rng = random.Random(seed)
    shared, steps = rng.random() < 0.5, rng.randrange(20, 120)

    def main() -> None:
        system = System(epc_pages=48, runtime=runtime, processors=3, ksgxd=True, tracer=tally)
        done = programs.together(
            system, seed, actors=3, steps=steps, shared=shared, kinds=_SHARED_VISITS
        )
        tally.operations(done, kind)

    runtime.run(main)


def _swarm(seed: int, tally: Tally, runtime: Runtime, kind: str) -> None:
    shared, doomed = seed % 2 == 0, seed % 5 == 0 and kind != "guests on threads"

    def main() -> None:
        done = guests.swarm(
            runtime,
            seed,
            shared=shared,
            guests=2 if doomed else 3,
            doomed=doomed,
            steps=40,
            kinds=_SHARED_VISITS,
            tracer=tally,
        )
        tally.operations(done, kind)

    runtime.run(main)


def _scheduled(play_on: Callable[..., None], kind: str, seed: int, tally: Tally) -> None:
    runtime = SeededRuntime(seed, policy=_policy(seed), step_limit=_STEP_LIMIT)
    play_on(seed, tally, runtime, kind)


def _threaded(play_on: Callable[..., None], kind: str, seed: int, tally: Tally) -> None:
    play_on(seed, tally, ThreadsRuntime(), kind)


# --- core and machine -----------------------------------------------------------------------------


def _core(seed: int, tally: Tally) -> None:
    """Up to four toy enclaves on the core, one call at a time."""
    rng, core = random.Random(seed), paging_core.EpcCoreHistories()
    core.start(rng.choice((16, 24, 48)), rng.random() < 0.5, tracer=tally)
    for number in range(_CALLS):
        name = rng.choice(_CORE_CALLS)
        if name == "create" or not core.living:
            if len(core.living) < 4:
                core.create()
            continue
        call, enclave = getattr(core, name), rng.choice(core.living)
        match name:
            case "read" | "store" | "load_without_backing" | "remove":
                index = rng.choice(list(enclave.pages)) if enclave.pages else 0
                call(enclave, index)
            case "add" | "add_many":
                call(enclave, rng.randrange(40))
            case "reclaim":
                call(rng.random() < 0.5)
            case "evict_everything" | "reclaim_without_backing":
                call()
            case _:
                call(enclave)
        if number % _STEPS_BETWEEN_RECOUNTS == 0:
            core.every_epc_page_is_in_exactly_one_place()
            core.every_enclave_counts_right()
    core.teardown()
    tally.operations(_CALLS, "core")


def _core_at_once(seed: int, tally: Tally) -> None:
    """Two tasks an enclave on the core, one enclave that dies early, a reclaimer."""
    rng = random.Random(seed)
    enclaves, pages, steps = rng.randrange(2, 6), rng.randrange(4, 24), rng.randrange(20, 200)
    epc_pages = max(20, enclaves * pages * rng.randrange(40, 110) // 100)
    runtime: SeededRuntime | ThreadsRuntime = ThreadsRuntime()
    kind = "core on threads"
    if seed % 2:
        runtime = SeededRuntime(seed, policy=_policy(seed), step_limit=_STEP_LIMIT)
        kind = "core on schedules"
    paging_core.storm(
        runtime, epc_pages=epc_pages, enclaves=enclaves, pages=pages, steps=steps, tracer=tally
    )
    tally.operations(2 * enclaves * steps, kind)


def _machine(seed: int, tally: Tally) -> None:
    """All leaves and accesses on two processors, each compared with the reference."""
    rng, machines = random.Random(seed), Machines()
    machines.start(fast=seed % 2 == 0, tracer=tally)
    weights, names, arguments = zip(*WALK, strict=True)
    done = 0
    for step in range(2000):
        if step == 1500 and seed % 4 == 3:
            machines.lose_power(number=4)
        chosen = rng.choices(range(len(WALK)), weights)[0]
        name = names[chosen]
        if name not in NEEDS or NEEDS[name](machines):
            getattr(machines, name)(**arguments[chosen](rng))
            done += 1
            if step % _STEPS_BETWEEN_RECOUNTS == 0:
                machines.every_epc_page_is_in_one_place_and_as_it_must_be()
    machines.every_epc_page_is_in_one_place_and_as_it_must_be()
    machines.every_processor_is_where_the_reference_has_it()
    tally.operations(done, "leaves against a reference")


HISTORIES: dict[str, Callable[[int, Tally], None]] = {
    "world": partial(_listed, "world"),
    "core": _core,
    "core at once": _core_at_once,
    "machine": _machine,
    "guest world": partial(_listed, "guest world"),
    "schedules": partial(_scheduled, _together, "schedules"),
    "threads": partial(_threaded, _together, "threads"),
    "guests on schedules": partial(_scheduled, _swarm, "guests on schedules"),
    "guests on threads": partial(_threaded, _swarm, "guests on threads"),
}
_TURNS = [
    *["world", "threads", "guest world", "schedules", "guests on threads", "core"],
    *["world", "threads", "guests on schedules", "machine", "guests on threads", "core at once"],
    *["world", "threads", "guest world", "schedules", "guests on threads"],
]
assert set(_TURNS) == HISTORIES.keys(), "a history without its turn"


def play(name: str, seed: int, tally: Tally) -> None:
    """Play one history.

    Raises:
        AssertionError: it went wrong; the message says how to play it again.
    """
    try:
        HISTORIES[name](seed, tally)
    except Exception as error:
        again = f"python -m tests.soak.operations --history '{name}' --seed {seed}"
        raise AssertionError(f"{_text(error)}\n{again}") from error


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def run(seconds: float, seed: int) -> dict[str, int]:
    """Run histories until ``seconds`` are over; see :mod:`tests.soak`."""

    def history(seed: int) -> Tally:
        tally = Tally()
        play(_TURNS[seed % len(_TURNS)], seed, tally)
        return tally

    return repeat(seconds, seed, history)


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--history", choices=HISTORIES, required=True)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    tally = Tally()
    play(args.history, args.seed, tally)
    print(dict(tally))


if __name__ == "__main__":
    _main()
