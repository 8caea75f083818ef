"""Pages that leave their enclaves, and enclaves that end: loading, the LRU curve, lives, plans.

Method: a cache that is simulated page by page; a reading of traces that keeps sets of pages.
"""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.going import with_removals

from softsgx.accesses import Event, Trace, TraceWriter, parse_trace
from softsgx.plan import Host, PlannedTrace, plan, readable
from softsgx.plan.curves import StackDistances
from softsgx.plan.loading import load
from softsgx.plan.policies import lives, misses
from softsgx.plan.scene import ENDS, GOES

Record = tuple[int, int, Event]

records = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(0, 5),
        st.sampled_from([Event.READ, Event.READ, Event.WRITE, Event.REMOVED, Event.ENDED]),
    ),
    min_size=1,
    max_size=60,
).map(lambda found: [(0, 0, Event.READ), *found])


def trace_of(found: list[Record], *, first_ns: int = 0, step_ns: int = 1000) -> Trace:
    """Return a trace of three enclaves of 600 pages; page N of the records is page 100 N there."""
    file = io.BytesIO()
    with TraceWriter(file, precision="accesses", program="./app") as writer:
        for name in "abc":
            writer.add_enclave(name, 600, 7)
        for at, (enclave, page, event) in enumerate(found):
            now_ns = first_ns + at * step_ns
            if event is Event.ENDED:
                writer.end_enclave(enclave, now_ns)
            elif event is Event.REMOVED:
                writer.remove_page(enclave, 100 * page, now_ns)
            else:
                writer.append(enclave, 100 * page, event is Event.WRITE, now_ns)
    return parse_trace(io.BytesIO(file.getvalue()), "trace").read()


def sequence(found: list[Record]) -> list[int]:
    """Return accesses and removals as numbers of pages; an end is the removal of each page."""
    numbers: dict[tuple[int, int], int] = {}
    wanted: list[int] = []
    for enclave, page, event in found:
        if event <= Event.WRITE:
            wanted.append(numbers.setdefault((enclave, page), len(numbers)))
        elif event is Event.REMOVED and (enclave, page) in numbers:
            wanted.append(numbers[enclave, page] | GOES)
        elif event is Event.ENDED:
            own = (number for (owner, _page), number in numbers.items() if owner == enclave)
            wanted += [number | GOES for number in own]
    return wanted


@given(records)
def test_the_curve_of_a_trace_is_that_of_a_cache_whose_pages_go(found: list[Record]) -> None:
    distances = load([PlannedTrace(trace_of(found))]).distances
    wanted = sequence(found)
    for capacity in range(1, 19):
        assert distances.misses_at(capacity) == readable.lru(wanted, capacity), capacity
    assert distances.cold == readable.lru(wanted, 1 << 20)
    assert distances.accesses == sum(event <= Event.WRITE for _enclave, _page, event in found)


@given(records)
def test_a_scene_has_removals_of_pages_that_are_there_and_ends_of_empty_enclaves(
    found: list[Record],
) -> None:
    scene = load([PlannedTrace(trace_of(found))]).scene
    there: set[int] = set()
    owner = np.repeat(np.arange(len(scene.enclaves)), [one.pages for one in scene.enclaves])
    ended, accesses = 0, 0
    for number in np.concatenate(list(scene.parts)).tolist():
        page = number & ENDS - 1
        if number & GOES and number & ENDS:
            assert not [one for one in there if owner[one] == owner[page]]
            ended += 1
        elif number & GOES:
            there.remove(page)
        else:
            accesses += 1
            there.add(page)
    started: set[int] = set()
    wanted = 0
    for enclave, _page, event in found:
        wanted += event is Event.ENDED and enclave in started
        started |= {enclave} if event <= Event.WRITE else set()
    # An end before the first access may be there, too: it ends nothing.
    assert wanted <= ended <= sum(event is Event.ENDED for _enclave, _page, event in found)
    assert scene.goes or not sequence(found) or max(sequence(found)) < GOES


def test_two_traces_whose_pages_go_are_merged_by_time() -> None:
    first = [(0, page, Event.WRITE) for page in range(5)] + [(0, 0, Event.ENDED)]
    second = [(0, 0, Event.READ), (0, 0, Event.REMOVED), *[(0, 0, Event.READ)] * 8]
    loaded = load([PlannedTrace(trace_of(each)) for each in (first, second)])
    flags = np.concatenate(list(loaded.scene.parts)) >> 30
    # Each step: a record of each trace, the first one before; the end is five removals, itself.
    assert flags.tolist() == [0, 0, 0, 2, *[0] * 6, *[2] * 5, 3, *[0] * 5]
    assert loaded.distances.pages == 6, "five and one at once"
    assert loaded.distances.cold == 7


@pytest.mark.parametrize("seed", range(12))
def test_stack_distances_are_those_of_lru_in_frames_that_become_free(seed: int) -> None:
    chance = random.Random(seed)
    share = chance.choice((0.01, 0.1, 0.4, 0.6))
    wanted = with_removals(chance, chance.choice((3, 40, 500)), 4000, share)
    counted = StackDistances()
    for part in np.array_split(np.array(wanted, np.uint32), chance.choice((1, 3, 200))):
        counted.add(part)
    found = counted.result()
    for capacity in (1, 2, 3, 5, 17, 60, 200, 600):
        assert found.misses_at(capacity) == readable.lru(wanted, capacity)
    assert found.misses_at(found.pages) == found.cold


@pytest.mark.slow
def test_holes_stay_in_order_when_the_axis_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(5)
    wanted = with_removals(chance, 2000, 700_000, 0.2)
    counted = StackDistances()
    for part in np.array_split(np.array(wanted, np.uint32), 9):
        counted.add(part)
    found = counted.result()
    for capacity in (10, 300, 1500):
        assert found.misses_at(capacity) == readable.lru(wanted, capacity)


def test_a_page_made_anew_is_another_life() -> None:
    numbers = np.array([4, 2, 4, 4 | GOES, 2, 4, 2 | GOES, 2], np.uint32)
    parts, count = lives([numbers[:3], numbers[3:]])
    assert np.concatenate(list(parts)).tolist() == [0, 1, 0, 1, 2, 3]
    assert count == 4
    wanted = with_removals(random.Random(2), 50, 3000, 0.1)
    parts, count = lives([np.array(wanted, np.uint32)])
    for capacity in (5, 20, 60):
        (opt,) = misses("opt", parts, [capacity])
        assert opt <= readable.lru(wanted, capacity), "OPT evicts dead pages first"
        (fifo,) = misses("fifo", parts, [capacity])
        assert fifo >= opt >= count


def test_a_plan_of_enclaves_after_each_other_is_that_of_the_larger_one() -> None:
    pages, found = 5, []
    for enclave in range(3):
        for _round in range(200):
            found += [(enclave, page, Event.WRITE) for page in range(pages)]
        found.append((enclave, 0, Event.ENDED))
    planned = plan([PlannedTrace(trace_of(found))], Host(), ("fifo",))
    assert planned.curve.pages[-1] == pages
    assert planned.curve.cold_misses == 3 * pages
    last = planned.sizes[-1]
    assert (last.made, last.loads, last.evictions) == (3 * pages, 0, 0)
    assert [column[-1] for column in zip(*planned.residency.resident, strict=True)][-1] == 0
    assert any("Pages leave their enclaves" in remark for remark in planned.remarks)
    without = plan([PlannedTrace(trace_of(found[:1000]))], Host(), ("fifo",))
    assert not any("Pages leave" in remark for remark in without.remarks)
