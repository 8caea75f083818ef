"""Strategies: choose the schedules of a scenario that are run, and their order."""

from __future__ import annotations

from typing import Protocol

from softsgx.runtime import Pct, Policy, Systematic, Uniform

__all__ = ["PARTS", "STRATEGIES", "Search", "search_of"]

STRATEGIES = {
    "random": "at every place, any task that can run is as likely as another",
    "pct": "random priorities with two random changes: bugs that need few switches",
    "dfs": "every schedule, depth first",
    "bounded": "every schedule with at most two preemptions, those with few first",
}
"""What each strategy does, by name."""

PARTS = 16
"""Parts of a systematic search; the number does not depend on the worker, so that the parts give
the same schedules on one processor and on many."""

_DEPTH = 3
_PREEMPTIONS = 2


class Search(Protocol):
    """Gives the seed and the policy of one schedule after the other."""

    def next(self) -> tuple[int, Policy] | None:
        """Return those of the next schedule; ``None``: no schedule is left."""

    def ran(self, policy: Policy) -> None:
        """Record the places that the policy of the latest schedule has seen."""


class _Seeds:
    """A range of seeds under one policy."""

    def __init__(self, policy: Policy, first: int, count: int) -> None:
        self._policy, self._seeds = policy, iter(range(first, first + count))

    def next(self) -> tuple[int, Policy] | None:
        seed = next(self._seeds, None)
        return None if seed is None else (seed, self._policy)

    def ran(self, policy: Policy) -> None:
        pass


class _Parts:
    """Part ``number`` of a systematic search, all of whose schedules have the same seed."""

    def __init__(self, preemptions: int | None, number: int, count: int) -> None:
        self._search = Systematic(preemptions, part=(number, PARTS))
        self._left = count

    def next(self) -> tuple[int, Policy] | None:
        self._left -= 1
        policy = self._search.next() if self._left >= 0 else None
        return None if policy is None else (0, policy)

    def ran(self, policy: Policy) -> None:
        self._search.ran(policy)


def search_of(
    strategy: str, first: int, count: int, *, steps: int, preemptions: int = _PREEMPTIONS
) -> Search:
    """Return the search of one unit of work.

    Args:
        strategy: its name.
        first: the first seed; of a systematic strategy, the number of the part.
        count: the most schedules.
        steps: about how many places a race passes.
        preemptions: the bound of ``bounded``.
    """
    match strategy:
        case "random":
            return _Seeds(Uniform(), first, count)
        case "pct":
            return _Seeds(Pct(_DEPTH, steps), first, count)
        case "dfs":
            return _Parts(None, first, count)
        case "bounded":
            return _Parts(preemptions, first, count)
        case _:
            raise AssertionError(f"strategy {strategy!r} is not known")
