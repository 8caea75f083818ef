"""Repeats a schedule and records every place and event, for people to read."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

from softsgx.explore.finding import Token
from softsgx.explore.registry import NamedScenario, find_scenario
from softsgx.explore.violation import Violation, property_of
from softsgx.explore.work import arena_of
from softsgx.paging.events import Evicted, Loaded
from softsgx.runtime import Policy, Stretches
from softsgx.runtime.policies import YIELD
from softsgx.trace import Event

__all__ = ["Line", "Replayed", "replay"]


@dataclass(frozen=True)
class Line:
    """One place of a schedule.

    Attributes:
        task: which task reached it.
        place: its name.
        switch: ``""``, or why another task runs next: ``"preempted"``, when this one could have
            continued, or ``"waits"``.
    """

    task: str
    place: str
    switch: str


@dataclass(frozen=True)
class Replayed:
    """A repeated schedule.

    Attributes:
        scenario: name of the scenario.
        token: as given.
        violated: the violated property, empty if none is.
        text: what was observed.
        tasks: names, in the order in which they appear.
        lines: the places in order.
        history: events of the page that the violation is about, each with the number of the place
            before; of every page where it names none.
        page: address of that page, 0 for none.
        faithful: whether the places are those that the token was made from.
    """

    scenario: NamedScenario
    token: Token
    violated: str
    text: str
    tasks: tuple[str, ...]
    lines: tuple[Line, ...]
    history: tuple[tuple[int, str], ...]
    page: int
    faithful: bool

    @property
    def failed(self) -> bool:
        """Whether a property is violated."""
        return bool(self.violated)


class _Observed:
    """Applies a policy and records where it has preempted a task."""

    def __init__(self, policy: Policy) -> None:
        self._made = policy

    def begin(self, rng: random.Random) -> None:
        self._policy = copy(self._made)
        self._policy.begin(rng)
        self.switches: list[str] = []

    def choose(self, current: str, where: str, ready: Sequence[str]) -> str:
        choice = self._policy.choose(current, where, ready)
        if choice == current or current == "main":
            self.switches.append("")
        elif current in ready and where != YIELD:
            self.switches.append("preempted")
        else:
            self.switches.append("waits")
        return choice

    def finish(self) -> None:
        self._policy.finish()


@dataclass
class _Log:
    """The events of a race, by the number of the place before."""

    place: int = -1
    events: list[tuple[int, Event]] = field(default_factory=list)

    def reached(self) -> None:
        self.place += 1

    def hear(self, event: Event) -> None:
        if self.place >= 0:
            self.events.append((self.place, event))


def replay(token: Token) -> Replayed:
    """Run the schedule of a token on a new stage.

    Raises:
        SoftSgxError: there is no such scenario.
    """
    named, log = find_scenario(token.scenario), _Log()
    arena = arena_of(
        named, token.defect_set, rounds=1, tracer=log.hear, reached=log.reached, watch=True
    )
    run = arena.run(token.seed, _Observed(Stretches(token.stretches)))
    arena.close()
    assert isinstance(run.policy, _Observed), "a run keeps its kind of policy"
    schedule, error = run.schedule, run.error
    switches = [*run.policy.switches, ""]  # none after a place that raised
    page, index = (error.page, error.index) if isinstance(error, Violation) else (0, -1)
    return Replayed(
        named,
        token,
        "" if error is None else property_of(error),
        "" if error is None else str(error) or type(error).__name__,
        tuple(dict.fromkeys(task for task, _place in schedule if task != "main")),
        tuple(Line(*step, switch) for step, switch in zip(schedule, switches, strict=False)),
        tuple((at, event.line()) for at, event in _of_page(log.events, page, index)),
        page,
        zlib.crc32(repr(schedule.steps).encode()) == token.digest,
    )


def _of_page(events: Sequence[tuple[int, Event]], page: int, index: int) -> list[tuple[int, Event]]:
    """Return the events of one page, by its linear address and those of EPC pages it was in."""
    if not page:
        return list(events)
    addresses = {page} | {
        event.page
        for _at, event in events
        if isinstance(event, Evicted | Loaded) and event.index == index
    }
    names = ("page", "linaddr")
    return [
        (at, event)
        for at, event in events
        if any(getattr(event, name, 0) in addresses for name in names)
    ]
