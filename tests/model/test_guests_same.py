"""The same guest workload with and without pressure from the host is the same to the guest.

Goal: with all evictions by the host, a guest's enclaves hold the same bytes, its system calls end
the same, and its own paging makes the same decisions in the same order.

Method: Hypothesis draws a program for a guest, and actions of its host between steps.  It runs on
a host with room for all that does nothing, and on a host whose EPC is smaller than the guest's own,
with another guest and a native enclave that want it too.  The streams of events that the guest's
kernel, core and driver see are compared, apart from time: when a tracking cycle is complete, and so
how many EWBs and ETRACKs it took, is a matter of when processors happen to be interrupted.
The guest's policy does not look at accessed bits, which depend on interrupts as well.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.model.programs import STEPS, Actor
from tests.support.driver import launch
from tests.support.guests import FIFO, GuestHost, GuestSystem

from softsgx.driver import ProcessorsKicked
from softsgx.hw import LeafDone
from softsgx.paging import LinuxPolicy, Policy
from softsgx.paging.events import Evicted, TrackingRound
from softsgx.trace import Event

SCALE = int(os.environ.get("SOFTSGX_GUESTS", "1"))
GUEST_PAGES = 40
HOST = ("reclaim", "evict all", "other guest", "native")
SMALL = st.integers(0, (1 << 24) - 1)
Program = list[tuple[str, int, int]]

programs = st.lists(
    st.tuples(st.sampled_from((*STEPS, *HOST, "guest reclaim")), SMALL, SMALL),
    min_size=5,
    max_size=40,
)
ordinary = settings(
    max_examples=40 * SCALE,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    derandomize=SCALE == 1,
)


def visible(events: list[Event]) -> list[Event]:
    """What the guest can tell of its events, apart from time."""
    kept: list[Event] = []
    for event in events:
        match event:
            case TrackingRound() | ProcessorsKicked():
                continue
            case LeafDone() if event.leaf == "etrack" or event.result == "SGX_NOT_TRACKED":
                continue
            case Evicted():
                kept.append(replace(event, tries=0))
            case _:
                kept.append(event)
    return kept


class Run:
    """One run of a program."""

    def __init__(self, epc_pages: int, *, pressed: bool, policy: Policy) -> None:
        self.host = GuestHost(epc_pages=epc_pages)
        self.pressed = pressed
        self.guest = self.host.guest(GUEST_PAGES, policy=policy, listen=True)
        self.actor = self._actor(self.guest, 0)
        if pressed:
            self.other = self._actor(self.host.guest(GUEST_PAGES, name="other"), 0)
            self.native = launch(self.host.system.process(), 8)

    def _actor(self, guest: GuestSystem, cpu: int) -> Actor:
        actor = Actor(guest, guest.process(), cpu=cpu)  # type: ignore[arg-type]
        for pages in (6, 12):
            assert actor.launch(pages) is not None
        return actor

    def play(self, program: Program) -> list[Event]:
        """Do every step; return what the guest has seen."""
        for kind, number, value in program:
            if kind == "guest reclaim":
                self.guest.core.reclaim(force=value % 2 == 0)
            elif kind not in HOST:
                self.actor.step(kind, number, value)
            elif self.pressed:
                self._host(kind, number, value)
        for share in list(self.actor.shares):
            self.actor.read_all(share)
        self.actor.process.exit()
        self.host.check_invariants()
        assert self.guest.free_pages == GUEST_PAGES
        return visible(self.guest.events)

    def _host(self, kind: str, number: int, value: int) -> None:
        match kind:
            case "reclaim":
                self.host.core.reclaim(force=value % 2 == 0)
            case "evict all":
                self.host.evict_all()
            case "other guest":
                self.other.step(STEPS[value % len(STEPS)], number, value)
            case "native":
                thread = self.native.thread(1, tcs=0)
                for page in range(8):
                    thread.load(self.native.data(page))
                thread.exit()
            case _:
                raise AssertionError(kind)


@pytest.mark.slow
@given(host_pages=st.sampled_from((24, 32, 40)), program=programs)
@ordinary
def test_the_guest_sees_the_same_events_with_and_without_pressure(
    host_pages: int, program: Program
) -> None:
    free = Run(400, pressed=False, policy=FIFO)
    expected = free.play(program)
    assert free.guest.guest.counters.evicted == 0
    pressed = Run(host_pages, pressed=True, policy=FIFO)
    seen = pressed.play(program)
    assert pressed.guest.guest.counters.evicted > 0
    assert seen == expected


@pytest.mark.slow
@given(host_pages=st.sampled_from((24, 40)), program=programs)
@ordinary
def test_the_guest_gets_the_same_results_when_its_own_reclaim_looks_at_accessed_bits(
    host_pages: int, program: Program
) -> None:
    """Actors check every byte, status and errno; the guest's choice of victims may differ."""
    pressed = Run(host_pages, pressed=True, policy=LinuxPolicy())
    pressed.play(program)
    assert pressed.guest.guest.counters.evicted > 0
