"""Systematic search: every schedule of a program within a bound, one after the other.

Source:
    Musuvathi, Qadeer: "Iterative Context Bounding for Systematic Testing of Multithreaded
    Programs", PLDI 2007.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from softsgx.runtime.policies import YIELD, Policy, Uninterrupted

__all__ = ["Systematic"]

_Prefix = tuple[list[str], int, str]
"""The tasks chosen at the first places: so many of a run's, which all its prefixes share, and one
more."""


class Systematic:
    """Gives a policy for each schedule that is left, and learns from each run what else is left.

    A preemption is a switch away from a task that could have continued.  Switches where a task
    waits, yields or ends are free, and all ways to make them are tried.

    Args:
        preemptions: the bound: schedules with few preemptions come first.  ``None``: no bound, and
            depth first: what differs late comes first.
        part: of how many parts of the search this is one, as ``(number, parts)``.  Every part runs
            the first schedule, and tries a share of what can be changed in it.
    """

    def __init__(self, preemptions: int | None, *, part: tuple[int, int] = (0, 1)) -> None:
        self._bound = preemptions
        self._part = part
        self._left: list[list[_Prefix | None]] = [[None]]  # the first schedule has none
        self._used = 0

    def next(self) -> Policy | None:
        """Return the policy of the next schedule; ``None``: none is left within the bound."""
        for used, prefixes in enumerate(self._left):
            if prefixes:
                self._used = used
                prefix = prefixes.pop()
                if prefix is None:
                    return _FollowPrefix([])
                chosen, length, other = prefix
                return _FollowPrefix([*chosen[:length], other])
        return None

    def ran(self, policy: Policy) -> None:
        """Note what could have been chosen in the run of the latest policy."""
        assert isinstance(policy, _FollowPrefix), "a run keeps its kind of policy"
        alternatives = policy.alternatives
        if not policy.prefix:
            number, parts = self._part
            alternatives = alternatives[number::parts]
        for prefix, cost in alternatives:
            if self._bound is None:
                self._left[0].append(prefix)
                continue
            used = self._used + cost
            if used <= self._bound:
                while len(self._left) <= used:
                    self._left.append([])
                self._left[used].append(prefix)


class _FollowPrefix(Uninterrupted):
    """Makes the choices it is given, then none; notes what else could have been chosen there."""

    def __init__(self, prefix: list[str]) -> None:
        self.prefix = prefix

    def begin(self, rng: random.Random) -> None:
        self._chosen: list[str] = []
        self.alternatives: list[tuple[_Prefix, int]] = []

    def choose(self, current: str, where: str, ready: Sequence[str]) -> str:
        at = len(self._chosen)
        if at < len(self.prefix):
            choice = self.prefix[at]
            assert choice in ready, f"task {choice!r} cannot run: the program is not repeatable"
        else:
            choice = super().choose(current, where, ready)
            if len(ready) > 1:
                cost = int(current in ready and where != YIELD)
                self.alternatives += [
                    ((self._chosen, at, other), cost) for other in ready if other != choice
                ]
        self._chosen.append(choice)
        return choice
