"""Random histories for any length of time, each from a seed: ``python -m tests.soak --help``.

A kind of history is a module of this package that is named in ``KINDS``.  It has ``run(seconds,
seed)``, which returns counts of its work by name.  It raises AssertionError after a failure, or
:class:`Found` if the counts up to the failure are known.  It may have ``minimise(seed)``, which
returns the smallest part of the history that still fails, as a sentence.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping

__all__ = ["KINDS", "Found", "repeat"]


class Found(AssertionError):
    """Something went wrong, after much that did not.

    Attributes:
        done: what was done, as ``run`` would have returned it.
        seed: the seed of the history that failed, where a kind has one history per seed.
    """

    def __init__(self, message: str, done: dict[str, int], seed: int | None = None) -> None:
        super().__init__(message)
        self.done = done
        self.seed = seed


def repeat(
    seconds: float, seed: int, history: Callable[[int], Mapping[str, int]]
) -> dict[str, int]:
    """Run histories with rising seeds, at least one, until ``seconds`` are over.

    Args:
        seconds: when they are over, no other history begins.
        seed: the seed of the first history.
        history: runs the history of a seed, and returns what was done.

    Returns:
        The sums of what was done.

    Raises:
        Found: a history failed; the error has the seed of that history.
    """
    until, done = time.monotonic() + seconds, Counter[str]()
    for number in itertools.count(seed):
        try:
            done.update(history(number))
        except AssertionError as error:
            raise Found(str(error), dict(done), number) from error
        if time.monotonic() >= until:
            break
    return dict(done)


KINDS = ("calls", "lifetimes", "longrun", "models", "operations", "parsers")
