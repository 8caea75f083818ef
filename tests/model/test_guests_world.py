"""A guest under all actions of its host, against a dictionary of its memory.

Goal: pressure, limits, backing that fails, poisoned memory, pauses, loss of power of guest or
machine, and the end of a neighbour: the guest reads back what it stored, or knows that it has lost
it; a guest that cannot continue is stopped with a reason; the host's counts always agree.

Method: Hypothesis draws histories of one actor in one of two guests, with actions of the host
between its steps, on the inline runtime; every count is recounted after each step.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.model.programs import STEPS, Actor, Share
from tests.support.guests import GuestHost, GuestSystem

from softsgx.kvm import GuestStoppedError
from softsgx.paging import BackingFile, FailingBacking, MemoryBacking
from softsgx.trace import Tracer

SCALE = int(os.environ.get("SOFTSGX_GUESTS", "1"))
WORLD = (
    "reclaim",
    "evict all",
    "guest reclaim",
    "pause",
    "limit",
    "poison",
    "neighbour",
    "guest power",
    "machine power",
    "stop",
)
SMALL = st.integers(0, (1 << 24) - 1)
programs = st.lists(
    st.tuples(st.sampled_from(STEPS + WORLD), SMALL, SMALL), min_size=5, max_size=40
)


class World:
    """One machine with a guest that acts, and another one that comes and goes."""

    def __init__(
        self,
        epc_pages: int,
        guest_pages: int,
        *,
        fail_every: int,
        tracer: Tracer | None = None,
    ) -> None:
        self.fail_every, self.poisoned = fail_every, 0
        self.host = GuestHost(epc_pages=epc_pages, backing=self._backing, tracer=tracer)
        self.group = self.host.tree.make("guests")
        self.number = 0
        self.neighbour: GuestSystem | None = None
        self.guest_pages = guest_pages
        self.begin()

    def _backing(self, _pages: int) -> BackingFile:
        return FailingBacking(
            MemoryBacking(),
            lambda request: bool(self.fail_every) and request % self.fail_every == 0,
        )

    def begin(self) -> None:
        """Start a guest."""
        self.guest = self._guest()
        self.actor = Actor(self.guest, self.guest.process(), cpu=0)  # type: ignore[arg-type]
        self.actor.launch(4)
        self.actor.launch(6)

    def _guest(self) -> GuestSystem:
        self.number += 1
        return self.host.guest(self.guest_pages, name=f"guest{self.number}", group=self.group)

    def _end(self, guest: GuestSystem) -> None:
        guest.guest.destroy()
        self.host.guests.remove(guest)

    def do(self, kind: str, number: int, value: int) -> None:
        host, guest = self.host, self.guest
        match kind:
            case "reclaim":
                host.core.reclaim(force=value % 2 == 0)
            case "evict all":
                host.evict_all()
            case "guest reclaim":
                guest.core.reclaim(force=value % 2 == 0)
            case "pause":
                guest.guest.pause()
                host.core.reclaim(force=True)
                guest.guest.unpause()
            case "limit":
                self.group.max_pages = None if value % 3 == 0 else 20 + value % 20
            case "poison" if host.epc_pages - self.poisoned > 30:
                self._poison(number)
            case "neighbour":
                self._neighbour()
            case "guest power" if value % 4 == 0:
                guest.guest.power_transition()
                self._lost()
            case "machine power" if value % 4 == 0:
                host.system.machine.power_transition()
                host.device.power_lost()
                self._lost()
            case "stop" if value % 4 == 0:
                guest.guest.stop("on command")
                with pytest.raises(GuestStoppedError, match="on command"):
                    self.actor.read_all(self.actor.shares[0])
                assert guest.guest.resident == 0
                self._end(guest)
                self.begin()
            case _:
                if kind not in WORLD:
                    self.actor.step(kind, number, value)

    def _poison(self, number: int) -> None:
        pages = [page for vepc in self.guest.guest.vepcs for page in vepc.pages.values()]
        used = [page.epc for page in pages if page.epc is not None and not page.epc.poisoned]
        if used:
            self.host.core.poison(used[number % len(used)].addr)
            self.poisoned += 1

    def _neighbour(self) -> None:
        if self.neighbour is not None:
            self._end(self.neighbour)
            self.neighbour = None
            return
        self.neighbour = self._guest()
        actor = Actor(self.neighbour, self.neighbour.process(), cpu=0)  # type: ignore[arg-type]
        share = actor.launch(6)
        assert share is not None
        actor.read_all(share)

    def _lost(self) -> None:
        """After a loss of power: nothing is read, above all nothing wrong; then new enclaves."""
        if self.neighbour is not None:
            self._end(self.neighbour)
            self.neighbour = None
        for share in list(self.actor.shares):
            self._check_lost(share)
        self.actor.launch(4)
        self.actor.launch(6)

    def _check_lost(self, share: Share) -> None:
        share.lost = True
        self.actor.read_all(share)
        self.actor.drop(share)

    def finish(self) -> None:
        """Everything must be there, and then everything must be free."""
        self.group.max_pages, self.fail_every = None, 0
        for share in list(self.actor.shares):
            self.actor.read_all(share)
        self.actor.process.exit()
        assert self.guest.free_pages == self.guest.epc_pages
        for guest in list(self.host.guests):
            self._end(guest)
        self.host.check_invariants()
        free = self.host.core.free_pages + self.host.core.poisoned_pages
        assert free == self.host.epc_pages, f"{self.host.epc_pages - free} pages are gone"


@pytest.mark.slow
@given(
    epc_pages=st.sampled_from((34, 48, 80)),
    guest_pages=st.sampled_from((16, 40)),
    fail_every=st.sampled_from((0, 0, 3, 7)),
    program=programs,
)
@settings(
    max_examples=100 * SCALE,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    derandomize=SCALE == 1,
)
def test_a_guest_keeps_its_memory_or_knows_that_it_is_lost(
    epc_pages: int, guest_pages: int, fail_every: int, program: list[tuple[str, int, int]]
) -> None:
    world = World(epc_pages, guest_pages, fail_every=fail_every)
    for kind, number, value in program:
        world.do(kind, number, value)
        world.host.check_invariants()
    world.finish()
