"""A schedule: the sequence of tasks and the places that they reached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Self, TypeAlias, overload

__all__ = ["Schedule", "Step", "Stretch"]

Step: TypeAlias = tuple[str, str]
"""A task's name and the place it reached."""

Stretch: TypeAlias = tuple[str, int]
"""A task, and the number of places it had reached since its start when another task ran."""

_HEADER = "schedule of seed "


@dataclass(frozen=True, slots=True)
class Schedule(Sequence[Step]):
    """The history of a :class:`SeededRuntime`, complete enough to repeat it.

    Step ``n`` is a task and the place that it reached; the policy then chose the task of step
    ``n + 1``.

    Attributes:
        seed: seed of the program's own random choices.
        steps: the steps in order.
    """

    seed: int
    steps: tuple[Step, ...]

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> Schedule: ...
    def __getitem__(self, index: int | slice) -> Step | Schedule:
        """Return a step, or the schedule cut to a slice of its steps."""
        if isinstance(index, slice):
            return Schedule(self.seed, self.steps[index])
        return self.steps[index]

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def switches(self) -> list[Step]:
        """Return the steps after which another task ran: the schedule in short."""
        steps = self.steps
        return [step for step, after in pairwise(steps) if step[0] != after[0]]

    def stretches(self) -> list[Stretch]:
        """Return the stretches in which one task ran, in order."""
        reached: dict[str, int] = {}
        found = []
        for task, group in groupby(self.steps, key=lambda step: step[0]):
            reached[task] = reached.get(task, 0) + sum(1 for _ in group)
            found.append((task, reached[task]))
        return found

    def text(self) -> str:
        """Return the schedule as text: a header, then ``task<TAB>place`` a line."""
        lines = [f"{_HEADER}{self.seed}", *(f"{task}\t{where}" for task, where in self.steps)]
        return "\n".join(lines) + "\n"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the schedule that :meth:`text` wrote.

        Raises:
            ValueError: a line is not of that form; names the line.
        """
        header, *lines = text.splitlines() or [""]
        if not header.startswith(_HEADER):
            raise ValueError(f"line 1: {header!r} is not {_HEADER + 'NUMBER'!r}")
        steps: list[Step] = []
        for number, line in enumerate(lines, 2):
            task, tab, where = line.partition("\t")
            if not tab:
                raise ValueError(f"line {number}: {line!r} is not a task, a tab and a place")
            steps.append((task, where))
        return cls(int(header.removeprefix(_HEADER)), tuple(steps))
