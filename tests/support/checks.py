"""Tables of a leaf's checks, and which one decides when two fail together.

A :class:`Check` is one row of a leaf's list: how to break it, and how the leaf then ends.  Each row
alone must end so; any two rows broken together must end as the earlier one.  In both cases nothing
may have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Generic, Protocol, TypeVar

import pytest
from tests.support.tables import sampled

__all__ = ["Check", "Scene", "assert_refused", "pair_params", "row_params"]


class Scene(Protocol):
    """A machine, and one call of a leaf that would succeed."""

    def run(self) -> object:
        """Execute the leaf and return how it ends."""

    def snapshot(self) -> object:
        """Return everything that a refusal must leave as it was."""


S = TypeVar("S", bound=Scene)


@dataclass(frozen=True)
class Check(Generic[S]):
    """One row of a leaf's checks.

    Attributes:
        step: its number in the manual's order; rows of one number are alternatives.
        name: what is wrong, in words.
        violate: makes it wrong in a scene.
        ends: how the leaf then ends; asked after ``violate``.
        kinds: for which targets the row exists.
        memory: whether it takes operands in memory, not objects, to break it.
        hides: names of earlier rows that this one cannot be broken together with.
    """

    step: int
    name: str
    violate: Callable[[S], object]
    ends: Callable[[S], object]
    kinds: frozenset[str]
    memory: bool = False
    hides: frozenset[str] = frozenset()


def row_params(
    checks: Sequence[Check[Any]], kinds: Sequence[str], modes: Sequence[str]
) -> list[Any]:
    """Return (kind, mode, check) for every row that exists for a kind in a mode."""
    return [
        pytest.param(kind, mode, check, id=f"{kind}-{mode}-{check.name}")
        for kind in kinds
        for mode in modes
        for check in _existing(checks, kind, mode)
    ]


def pair_params(
    checks: Sequence[Check[Any]], kinds: Sequence[str], modes: Sequence[str]
) -> list[Any]:
    """Return (kind, mode, earlier, later) for every two rows that can be broken together."""
    return sampled(
        pytest.param(kind, mode, first, later, id=f"{kind}-{mode}-{first.name}-before-{later.name}")
        for kind in kinds
        for mode in modes
        for first, later in combinations(_existing(checks, kind, mode), 2)
        if first.step < later.step and first.name not in later.hides
    )


def _existing(checks: Sequence[Check[Any]], kind: str, mode: str) -> list[Check[Any]]:
    return [
        check
        for check in sorted(checks, key=lambda check: check.step)
        if kind in check.kinds and (mode == "memory" or not check.memory)
    ]


def assert_refused(scene: S, expected: Check[S], *others: Check[S]) -> None:
    """Break rows, run, and see the leaf end as the first says with nothing changed."""
    for check in (expected, *others):
        check.violate(scene)
    before = scene.snapshot()
    got, wanted = scene.run(), expected.ends(scene)
    assert got == wanted, f"ended as {got!r}, the manual says {wanted!r}"
    assert scene.snapshot() == before, "a leaf that refused has changed something"
