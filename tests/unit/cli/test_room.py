"""A command's calls take no memory from the kernel, however deep they are.

CPython has frames in pieces of memory.  Where a loop calls a function at the end of a piece, the
next one is mapped and unmapped each time, and its first page faults.  Method: a function is called
in a loop at each depth, and page faults are counted.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence

import pytest

from softsgx import cli

CALLS, DEPTHS = 100, range(0, 400, 2)
FRAME_WORDS = 100


def leaf() -> None:
    pass


leaf.__code__ = leaf.__code__.replace(co_stacksize=FRAME_WORDS)


def calls_at(depth: int) -> int:
    """Return how many page faults calls at a depth cause."""
    if depth:
        return calls_at(depth - 1)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(CALLS):
        leaf()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def most_faults(_argv: Sequence[str] | None = None) -> int:
    return max(calls_at(depth) for depth in DEPTHS)


def test_calls_of_a_command_map_nothing() -> None:
    cli._with_room(most_faults, None)  # the pages that it uses are there
    assert cli._with_room(most_faults, None) < CALLS
    if most_faults() < CALLS:
        pytest.skip("this Python keeps the next piece, or its frames are elsewhere")


def test_a_command_has_room() -> None:
    seen = []

    def main_of(argv: Sequence[str] | None) -> int:
        seen.append(argv)
        return 7

    assert cli._with_room(main_of, ["a"]) == 7
    assert seen == [["a"]]
    with pytest.raises(ZeroDivisionError):
        cli._with_room(lambda _argv: 1 // 0, None)
