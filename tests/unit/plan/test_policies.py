"""Kernels miss exactly what the readable policies miss, and none misses less than OPT.

Method: random accesses to few pages, in chunks that end anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from softsgx.accesses import Trace
from softsgx.errors import SoftSgxError
from softsgx.plan import curves, policies, readable
from softsgx.plan.curves import stack_distances
from softsgx.plan.numbering import PageNumbers, numbered
from softsgx.plan.policies import POLICIES, PolicyName, misses

Readable = Callable[[Sequence[int], int], int]
READABLE: dict[PolicyName, Readable] = {
    "fifo": readable.fifo,
    "lru": readable.lru,
    "clock": readable.clock,
    "s3fifo": readable.s3fifo,
    "opt": readable.opt,
}

_near = st.lists(st.integers(0, 25), max_size=300)
_loops = st.builds(
    lambda rounds, size, more: [*range(size)] * rounds + more,
    st.integers(1, 8),
    st.integers(1, 30),
    _near,
)
pages_accessed = _near | _loops
cuts = st.lists(st.integers(0, 400), max_size=4)
capacities = st.lists(st.integers(1, 32), min_size=1, max_size=4)


def parts(pages: Sequence[int], where: Sequence[int] = ()) -> list[NDArray[np.uint32]]:
    numbers = np.array(pages, np.uint32)
    return [numbers[first:end] for first, end in pairwise([0, *sorted(where), len(pages)])]


@pytest.mark.parametrize("policy", POLICIES)
@given(pages_accessed, cuts, capacities)
def test_a_kernel_misses_what_the_readable_policy_misses(
    policy: PolicyName, pages: list[int], where: list[int], sizes: list[int]
) -> None:
    expected = [READABLE[policy](pages, size) for size in sizes]
    assert misses(policy, parts(pages, where), sizes) == expected


@given(pages_accessed, st.integers(1, 32))
def test_no_policy_misses_less_than_opt_or_than_first_accesses(pages: list[int], size: int) -> None:
    found = {policy: misses(policy, parts(pages), [size])[0] for policy in POLICIES}
    assert min(found.values()) == found["opt"] >= len(set(pages))


@given(pages_accessed, cuts)
def test_stack_distances_are_those_of_a_list(pages: list[int], where: list[int]) -> None:
    expected = readable.distances(pages)
    found = stack_distances(parts(pages, where))
    assert found.cold == expected.pop(-1, 0) == len(set(pages))
    assert {
        distance: count for distance, count in enumerate(found.counts.tolist()) if count
    } == expected


@given(pages_accessed)
def test_the_curve_falls_from_all_accesses_to_first_accesses(pages: list[int]) -> None:
    found = stack_distances(parts(pages))
    curve = found.misses()
    assert curve[0] == len(pages) == found.accesses
    assert curve[-1] == len(set(pages)) == found.pages == len(curve) - 1
    assert (np.diff(curve) <= 0).all()
    assert [found.misses_at(size) for size in range(len(curve))] == curve.tolist()


@pytest.mark.parametrize("pages", [9_000, 300_000])
def test_distances_stay_exact_when_the_axis_is_full(pages: int) -> None:
    found = stack_distances(parts([*range(pages)] * 3))
    assert found.counts[pages - 1] == 2 * pages == found.counts.sum()


def test_distances_of_random_accesses_are_exact_over_many_axes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(curves, "_POSITIONS_PER_PAGE", 1)
    chance = np.random.default_rng(3)
    numbers = np.minimum(chance.zipf(1.2, 600_000), 5000).astype(np.uint32) - 1
    found = stack_distances(parts(numbers.tolist(), [1, 77_777, 300_000]))
    for size in (1, 10, 600, 4000):
        assert found.misses_at(size) == readable.lru(numbers.tolist(), size)


def test_distances_of_random_accesses_are_exact_over_many_superblocks() -> None:
    chance = np.random.default_rng(4)
    hot = chance.integers(0, 3000, 500_000)
    numbers = np.where(chance.random(500_000) < 0.3, hot, chance.integers(0, 200_000, 500_000))
    found = stack_distances(parts(numbers.tolist(), [260_000, 400_001]))
    for size in (100, 2000, 70_000, 140_000):
        assert found.misses_at(size) == readable.lru(numbers.tolist(), size)


def test_distances_are_those_of_numbers_in_any_order() -> None:
    found = stack_distances(parts([4, 0, 4, 9, 0], [3]))
    assert found.counts.tolist() == [0, 1, 1]


def test_a_trace_is_numbered_across_its_enclaves_and_chunks() -> None:
    trace = Trace.of([(7, True), (3, True), (7, False), (1, True)]).accesses
    other = replace(trace, enclaves=trace.enclaves + np.uint16(1))
    assert [part.tolist() for part in numbered([trace, other, trace])] == [
        [0, 1, 0, 2],
        [3, 4, 3, 5],
        [0, 1, 0, 2],
    ]


@given(st.lists(st.integers(0, (1 << 48) - 1) | st.integers(0, 9), max_size=50), st.integers(1, 9))
def test_keys_are_numbered_in_order_of_first_use(keys: list[int], pieces: int) -> None:
    numbers, known = PageNumbers(), dict[int, int]()
    for part in np.array_split(np.array(keys, np.uint64), pieces):
        expected = [known.setdefault(key, len(known)) for key in part.tolist()]
        assert numbers.of(part).tolist() == expected
    assert numbers.pages == len(known)


def test_numbers_stay_when_the_table_grows() -> None:
    keys = np.random.default_rng(1).permutation(1 << 16).astype(np.uint64) << np.uint64(20)
    numbers = PageNumbers()
    assert (numbers.of(keys) == np.arange(1 << 16)).all()
    assert (numbers.of(keys[::-1]) == np.arange(1 << 16)[::-1]).all()


def test_a_trace_too_long_for_opt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "MOST_OPT_ACCESSES", 3)
    with pytest.raises(SoftSgxError, match="more than 3 accesses"):
        misses("opt", parts([1, 2, 3, 4]), [1])
