"""What follows an EWB that comes too early, in each implementation: ETRACK, and interrupts.

See ``test_paging_corners`` for the method.  What an address space sees while it is interrupted, and
what is left afterwards, must be equal.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tests.differential.test_optimised_paging import IMPLEMENTATIONS
from tests.differential.test_paging_corners import compare, isolated, pages_of
from tests.model.test_random_programs import World
from tests.support.hw import RepeatingRuntime

from softsgx import compiled
from softsgx.arch import Status
from softsgx.driver.enclave import Enclave
from softsgx.hw import Fault, PageFault
from softsgx.paging.optimised import CompiledSwap

FLAT = IMPLEMENTATIONS[:-1]


class Site:
    """A world whose first enclave has a processor inside, and some address spaces."""

    def __init__(self, world: World, spaces: int = 1) -> None:
        self.world, self.log = world, list[object]()
        self.enclave = world.system.driver.enclaves[0]
        swap: Any = self.enclave.swap
        self.swap = swap
        self.secs: Any = world.system.epcm(self.swap.secs.addr).owner
        self.secs.cur_count = 1
        self.children = [world.actor.process.fork(name=f"child {n}") for n in range(spaces - 1)]
        self.mms = [entry.mm for entry in self.enclave.mms]
        self.srcu: Any = self.enclave.srcu
        self.during: dict[int, Callable[[], object]] = {}
        for number, mm in enumerate(self.mms):
            vars(mm.ptes)["kick"] = lambda number=number: self.kicked(number)

    def kicked(self, number: int) -> None:
        """A round of interrupts has reached an address space."""
        self.log.append((number, *self.counts(), self.secs.epoch, self.secs.prev_count))
        self.secs.prev_count = 0
        self.during.get(number, int)()

    def counts(self) -> tuple[object, ...]:
        """Everything that the walk counts."""
        core, enclave = self.world.system.core, self.enclave
        kicks = enclave.counts.kicks, core.counters.kicks, core.counters.etrack, self.swap.etracks
        return *kicks, list(self.srcu._readers), [mm.users for mm in self.mms]

    def evict(self) -> bool:
        """Evict a page of the enclave: by one EWB more than one, and what comes before it."""
        return self.world.system.core.evict(pages_of(self.world)[0].epc)

    def end(self) -> object:
        """Return what the walk has done, and let the other processes end."""
        seen = [*self.log, self.counts()]
        for mm in self.mms:
            vars(mm.ptes).pop("kick", None)
        self.secs.cur_count = self.secs.prev_count = 0
        for child in self.children:
            if child.mm.alive:
                child.exit()
        runtime: Any = self.world.system.runtime
        runtime.run_pending()
        return seen


@pytest.mark.parametrize("spaces", [1, 2, 3])
def test_a_round_of_interrupts_pins_each_address_space_and_counts(spaces: int) -> None:
    def action(world: World) -> object:
        site = Site(world, spaces)
        done = site.evict()
        return done, world.system.core.counters.ewb_third, site.end()

    done, thirds, (*rounds, _left) = compare(action, 160)
    assert (done, thirds) == (True, 1) and [each[0] for each in rounds] == [*range(spaces)]
    for number, each in enumerate(rounds):
        users = [1] * spaces
        users[number] = 2
        assert each[5:7] == ([1, 0], users)


def test_the_readers_of_the_turn_are_counted() -> None:
    def action(world: World) -> object:
        site = Site(world)
        site.srcu._index = 1
        done = site.evict()
        site.srcu._index = 0
        return done, site.end()

    done, ((_number, *_counts, readers, _users, _epoch, _prev), _left) = compare(action)
    assert done and readers == [0, 1]


def test_an_address_space_that_has_ended_is_not_interrupted() -> None:
    def action(world: World) -> object:
        site = Site(world, 3)
        site.mms[1].users = 0
        done = site.evict()
        site.mms[1].users = 1
        return done, site.end()

    done, (*rounds, _left) = compare(action, 160)
    assert done and [each[0] for each in rounds] == [0, 2]


def test_a_process_that_ends_during_the_walk_ends_after_it() -> None:
    def action(world: World) -> object:
        site = Site(world, 2)
        mm = site.children[0].mm
        site.during[site.mms.index(mm)] = site.children[0].exit
        done = site.evict()
        return done, mm.users, site.end(), mm in [entry.mm for entry in site.enclave.mms]

    done, users, _seen, registered = compare(action, 160)
    assert done and users == 0 and not registered


class Turned(Exception):
    """A processor cannot be interrupted."""


@pytest.mark.parametrize("ends", [False, True])
def test_an_error_ends_the_walk_and_what_it_holds(ends: bool) -> None:
    """Also where the step that ends it has an error, which is the one that is seen."""

    def action(world: World) -> object:
        site = Site(world, 2)

        def fail() -> None:
            site.srcu._turning = ends
            raise Turned

        site.during[0] = fail
        site.srcu._drained = SimpleNamespace(notify_all=lambda: 1 / 0)
        (page,) = isolated(world)
        assert page.prepare() and page.block()
        reservation = page.reservation
        try:
            site.swap.write(page.epc, reservation)
        except (Turned, ZeroDivisionError) as error:
            site.log.append(type(error))
        site.srcu._turning = False
        site.swap.cancel(reservation)
        page.reservation, page.being_reclaimed = None, False
        seen = site.end()
        page.epc.lru.put_back(page.epc)
        page.put()
        return seen

    (number, *_rest), error, left = compare(action, 160)
    assert number == 0 and error is (ZeroDivisionError if ends else Turned)
    assert left[4:] == ([0, 0], [1, 1])


def test_the_last_reader_tells_a_writer_that_waits() -> None:
    def action(world: World) -> object:
        site = Site(world)
        drained = site.srcu._drained
        told: list[object] = []
        site.srcu._drained = SimpleNamespace(
            notify_all=lambda: told.append(list(site.srcu._readers))
        )
        site.during[0] = lambda: setattr(site.srcu, "_turning", True)
        done = site.evict()
        site.srcu._turning, site.srcu._drained = False, drained
        return done, told, site.end()

    assert compare(action)[:2] == (True, [[0, 0]])


# --- epochs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaves", [True, False])
@pytest.mark.parametrize("inside", [0, 1])
def test_an_incomplete_cycle_is_completed_before_the_next(leaves: bool, inside: int) -> None:
    def action(world: World) -> object:
        site = Site(world)
        site.secs.prev_count, site.secs.cur_count = 1, inside
        if not leaves:
            site.during[0] = lambda: setattr(site.secs, "prev_count", 1)
        done, counters = site.evict(), world.system.core.counters
        tries = counters.ewb_first, counters.ewb_second, counters.ewb_third, counters.ewb_failed
        return done, counters.prev_trk_incmpl, tries, site.end()

    done, incomplete, _tries, (*rounds, left) = compare(action)
    assert (done, incomplete) == (leaves, 1)
    assert len(rounds) == 1 + (inside or not leaves) and left[2] == left[3]


@pytest.mark.parametrize(
    "fault", [Fault(), PageFault(0, 0)], ids=lambda fault: type(fault).__name__
)
def test_a_fault_of_etrack_is_followed_by_an_ewb(fault: Fault) -> None:
    def action(world: World) -> object:
        site, leaves = Site(world), world.system.core.leaves

        def refuse(_secs: int) -> Status:
            raise fault

        etrack, leaves.etrack = leaves.etrack, refuse
        done, failed = site.evict(), world.system.core.counters.ewb_failed
        leaves.etrack = etrack
        return done, failed, site.end()

    done, failed, rounds = compare(action)
    assert (done, failed, len(rounds)) == (False, 1, 2)


def test_another_error_of_etrack_is_an_error() -> None:
    def fail(_secs: int) -> Status:
        raise Turned

    for optimised in FLAT:
        world = World(80, runtime=RepeatingRuntime(seed=7), optimised=optimised)
        site = Site(world)
        world.system.core.leaves.etrack = fail
        with pytest.raises(Turned):
            site.evict()
        assert not site.log and world.system.core.counters.ewb_second == 0


@pytest.mark.parametrize("optimised", FLAT)
def test_pages_without_a_secs_are_not_evicted(optimised: Any) -> None:
    world = World(80, runtime=RepeatingRuntime(seed=7), optimised=optimised)
    site = Site(world)
    (page,) = isolated(world)
    assert page.prepare() and page.block()
    site.swap.secs, etracks = None, world.system.core.counters.etrack
    with pytest.raises(AssertionError, match="no SECS"):
        site.swap.write(page.epc, page.reservation)
    assert world.system.core.counters.etrack == etracks and not site.log


# --- objects that C code does not know ------------------------------------------------------------


@pytest.mark.parametrize("who", ["core", "driver"])
def test_a_tracer_receives_each_round(who: str) -> None:
    events = []
    for optimised in FLAT:
        world = World(80, runtime=RepeatingRuntime(seed=7), optimised=optimised)
        site, seen = Site(world), list[object]()
        tracer: Any = seen.append
        if who == "core":
            world.system.core.tracer = tracer
        else:
            world.system.driver.tracer = tracer
        (page,) = isolated(world)
        assert page.prepare() and page.block() and page.write()
        events.append((list(map(repr, seen)), site.counts()))
    assert all(each == events[0] for each in events)
    assert len(events[0][0]) == (2 if who == "core" else 1)


@pytest.mark.skipif(compiled.speedups is None, reason=compiled.description)
def test_a_swapping_of_another_class_is_asked_itself() -> None:
    log: list[str] = []

    class Noting(CompiledSwap):
        __slots__ = ()

        def _start_epoch(self) -> None:
            log.append("epoch")
            super()._start_epoch()

        def _kick_cpus(self) -> None:
            log.append("kick")
            super()._kick_cpus()

    world = World(80, runtime=RepeatingRuntime(seed=7), optimised="compiled")
    site = Site(world)
    (page,) = isolated(world)
    assert page.prepare() and page.block()
    site.swap.__class__ = Noting
    assert site.swap.write(page.epc, page.reservation) is not None
    assert log == ["epoch", "kick"] and len(site.log) == 1


@pytest.mark.parametrize("interleaves", ["srcu", "mm"])
def test_tasks_that_take_turns_do_not_meet_in_a_walk(interleaves: str) -> None:
    """A lock is taken where another task may run."""

    def action(world: World) -> object:
        site, taken = Site(world), list[str]()

        thing: Any = site.srcu if interleaves == "srcu" else site.mms[0]
        name = "_lock" if interleaves == "srcu" else "_latch"
        lock = getattr(thing, name)

        class Noting:
            def __enter__(self) -> None:
                taken.append(repr(site.counts()))
                lock.__enter__()

            def __exit__(self, *error: Any) -> None:
                lock.__exit__(*error)

        thing._uninterleaved = False
        setattr(thing, name, Noting())
        done = site.evict()
        setattr(thing, name, lock)
        thing._uninterleaved = True
        return done, taken[-2:], site.end()

    done, taken, _seen = compare(action)
    assert done and len(taken) == 2


def test_an_enclave_of_another_class_interrupts_itself() -> None:
    log: list[object] = []

    class Noting(Enclave):
        __slots__ = ()

        def kick(self) -> None:
            log.append("kick")
            super().kick()

    def action(world: World) -> object:
        site = Site(world)
        site.enclave.__class__ = Noting
        site.swap._kick = site.enclave.kick
        done = site.evict()
        site.enclave.__class__ = Enclave
        return done, site.end()

    assert compare(action)[0]
    assert log == ["kick"] * len(IMPLEMENTATIONS)
