"""Coverage of a scenario: the distinct schedules, and the pairs of places that have met.

Two places have *met* when one task was stopped before the first while another executed the second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from typing import Any, Self

from softsgx.runtime import Schedule
from softsgx.runtime.policies import END, RACE

__all__ = ["Coverage", "Meeting"]

Meeting = tuple[str, str]
"""A place before which a task stood, and a place that another task executed meanwhile."""

_DIGEST_BYTES = 8
_NOT_WORK = frozenset({RACE, END, "start"})


@dataclass
class Coverage:
    """Coverage of one scenario, summed over its units of work.

    Attributes:
        runs: schedules.
        steps: places that they passed.
        switches: number of task switches.
        distinct: digests of the schedules that differ.
        meetings: how often two places have met, over distinct schedules.
        places: the places that each task has reached.
        complete: whether no schedule is left.
    """

    runs: int = 0
    steps: int = 0
    switches: int = 0
    distinct: set[int] = field(default_factory=set)
    meetings: Counter[Meeting] = field(default_factory=Counter)
    places: dict[str, set[str]] = field(default_factory=dict)
    complete: bool = False

    def add(self, schedule: Schedule) -> None:
        """Count one schedule."""
        steps = schedule.steps
        self.runs += 1
        self.steps += len(steps)
        text = "\n".join([f"{task}\t{place}" for task, place in steps])
        digest = int.from_bytes(blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest(), "big")
        if digest in self.distinct:
            self.switches += sum(1 for a, b in pairwise(steps) if a[0] != b[0])
            return
        self.distinct.add(digest)
        self._meet(steps)

    def _meet(self, steps: Iterable[tuple[str, str]]) -> None:
        stands: dict[str, str] = {}  # before which place each task stands
        meetings, places = self.meetings, self.places
        last = ""
        for task, place in steps:
            if task != last:
                self.switches += bool(last)
                last = task
            executed = stands.get(task)
            if executed is not None:
                for other, where in stands.items():
                    if other != task:
                        meetings[where, executed] += 1
            if place in _NOT_WORK:
                stands.pop(task, None)
            else:
                stands[task] = place
                places.setdefault(task, set()).add(place)

    def merge(self, other: Coverage) -> None:
        """Add the coverage of another unit of work."""
        self.runs += other.runs
        self.steps += other.steps
        self.switches += other.switches
        self.distinct |= other.distinct
        self.meetings.update(other.meetings)
        for task, places in other.places.items():
            self.places.setdefault(task, set()).update(places)

    def possible(self) -> set[Meeting]:
        """Return the pairs of places of different tasks; locks make some of them impossible."""
        return {
            (mine, yours)
            for task, places in self.places.items()
            for other, others in self.places.items()
            if other != task
            for mine in places
            for yours in others
        }

    def missing(self) -> list[Meeting]:
        """Return the pairs that have not met, in order."""
        return sorted(self.possible() - self.meetings.keys())

    def leaves(self) -> tuple[list[str], Mapping[Meeting, int]]:
        """Return the leaves and phases that were reached, and how often each two have met."""
        names = {place for places in self.places.values() for place in places}
        wanted = sorted(name for name in names if name[:1].isupper() or name.startswith("reclaim:"))
        chosen = set(wanted)
        met = {pair: n for pair, n in self.meetings.items() if chosen.issuperset(pair)}
        return wanted, met

    def to_json(self) -> dict[str, Any]:
        """Return everything, for a file."""
        return {
            "runs": self.runs,
            "steps": self.steps,
            "switches": self.switches,
            "distinct": sorted(self.distinct),
            "meetings": [[*pair, count] for pair, count in sorted(self.meetings.items())],
            "places": {task: sorted(places) for task, places in sorted(self.places.items())},
            "complete": self.complete,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """Return what :meth:`to_json` wrote."""
        return cls(
            document["runs"],
            document["steps"],
            document["switches"],
            set(document["distinct"]),
            Counter({(a, b): count for a, b, count in document["meetings"]}),
            {task: set(places) for task, places in document["places"].items()},
            document["complete"],
        )
