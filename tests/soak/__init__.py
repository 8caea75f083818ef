"""Random histories for as long as one likes, each from a seed: ``python -m tests.soak --help``.

A kind of history is a module of this package that is named in ``KINDS``.  It has ``run(seconds,
seed)``, which returns how much was done as a dictionary from names to numbers, and raises
AssertionError when something went wrong, :class:`Found` where what was done before is known; and it
may have ``minimise(seed)``, which returns how little still fails, as a sentence.
"""

from __future__ import annotations


class Found(AssertionError):
    """Something went wrong, after much that did not.

    Attributes:
        done: what was done, as ``run`` would have returned it.
    """

    def __init__(self, message: str, done: dict[str, int]) -> None:
        super().__init__(message)
        self.done = done


KINDS = ("calls", "lifetimes", "longrun", "models", "operations", "parsers")
