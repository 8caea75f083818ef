"""Plans: what EADD would refuse is refused, partial pages are zero-filled, nothing is copied."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.enclave_files import PAGE, blob_plan, tcs_of

from softsgx.arch import Tcs
from softsgx.errors import SoftSgxError
from softsgx.image import (
    MASK_NONE,
    MOST_TCS,
    Blob,
    Data,
    Fill,
    Plan,
    Run,
    enclave_size,
    lay,
    measure,
    tcs_page,
)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (Run(0x1001, 1, 0x203), "aligned"),
        (Run(0x1000, 0, 0x203), "positive"),
        (Run(0, 17, 0x203), "beyond the enclave's size"),
        (Run(0x10000, 1, 0x203), "beyond the enclave's size"),
        (Run(0, 1, 0x101), "a TCS has no R, W or X"),
        (Run(0, 1, 0x202), "W needs R"),
        (Run(0, 1, 0x20B), "EADD refuses them"),
        (Run(0, 1, 0x003), "EADD refuses them"),
        (Run(0, 1, 0x303), "EADD refuses them"),
        (Run(0, 1, 0x1_0203), "EADD refuses them"),
        (Run(0, 1, 0x203, mask=0x10000), "more than 16 bits"),
        (Run(0, 1, 0x203, Fill(1 << 32)), "more than 32 bits"),
    ],
)
def test_a_page_that_eadd_would_refuse_is_in_no_plan(run: Run, why: str) -> None:
    with pytest.raises(SoftSgxError, match=why):
        Plan(0x10000, (run,))


def tcs_run(*fields: tuple[str, int]) -> Run:
    page = bytearray(tcs_page(ossa=0x1000, oentry=0x2000))
    for field, value in fields:
        page[Tcs.OFFSETS[field]] |= value
    return Run(0x1000, 1, 0x100, Data(memoryview(bytes(page))))


@pytest.mark.parametrize("field", ["state", "cssa", "aep", "flags"])
def test_bytes_of_a_tcs_that_eadd_clears_are_not_measured(field: str) -> None:
    added = Plan(0x10000, (tcs_run((field, 1)),))
    assert measure(added) == measure(Plan(0x10000, (tcs_run(),)))
    assert getattr(tcs_of(next(added.pages()).data), field) == 0


def test_the_tcs_flag_that_eadd_keeps_is_measured() -> None:
    added = Plan(0x10000, (tcs_run(("flags", 3)),))
    assert tcs_of(next(added.pages()).data).flags == 2
    assert measure(added) != measure(Plan(0x10000, (tcs_run(),)))


@pytest.mark.parametrize("field", ["reserved", "prevssp"])
def test_a_tcs_that_eadd_would_refuse_is_in_no_plan(field: str) -> None:
    with pytest.raises(SoftSgxError, match="EADD refuses a TCS"):
        Plan(0x10000, (tcs_run((field, 1)),))


def test_a_run_without_content_has_no_more_threads_than_a_plan_takes() -> None:
    assert len(Plan(1 << 40, (Run(0, MOST_TCS, 0x100),)).tcs) == MOST_TCS
    with pytest.raises(SoftSgxError, match="65537 TCS pages"):
        Plan(1 << 40, (Run(0, MOST_TCS + 1, 0x100),))


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (Run(0, 1, 0x503), "at an end"),
        (Run(0xF000, 1, 0x603), "at an end"),
        (Run(0x1000, 1, 0x601), "not those of a shadow stack"),
        (Run(0x1000, 2, 0x603, Fill(1)), "more in it than its token"),
        (Run(0x1000, 1, 0x603, Data(memoryview(bytes(4088) + b"\1" * 8))), "more in it"),
    ],
)
def test_a_shadow_stack_that_eadd_would_refuse_is_in_no_plan(run: Run, why: str) -> None:
    with pytest.raises(SoftSgxError, match=why):
        Plan(0x10000, (run,))


def test_a_shadow_stack_is_taken_with_its_token() -> None:
    token = Data(memoryview(bytes(4088) + b"\1" * 8))
    Plan(0x10000, (Run(0x1000, 1, 0x503, token), Run(0x2000, 1 << 2, 0x603)))


@pytest.mark.parametrize("size", [0, 1, 4096, 0x3000, 0x10001, 1 << 57])
def test_a_size_that_ecreate_would_refuse_is_in_no_plan(size: int) -> None:
    with pytest.raises(SoftSgxError, match="power of two"):
        Plan(size)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(1, 8)), min_size=2, max_size=5))
def test_no_page_is_added_twice(spans: list[tuple[int, int]]) -> None:
    pages = [page for start, count in spans for page in range(start, start + count)]
    runs = tuple(Run(start * PAGE, count, 0x203) for start, count in spans)
    if len(set(pages)) == len(pages):
        assert Plan(1 << 20, runs).page_count == len(pages)
    else:
        with pytest.raises(SoftSgxError, match="overlap"):
            Plan(1 << 20, runs)


@settings(deadline=None)
@given(st.integers(0, 3 * PAGE), st.binary(max_size=3 * PAGE))
def test_laid_bytes_lie_where_they_were_put_and_zeros_around_them(offset: int, data: bytes) -> None:
    memory = bytearray(8 * PAGE)
    for run in lay(offset, data, 0x203):
        for index in range(run.pages):
            page = run.page(index)
            memory[page.offset : page.offset + PAGE] = page.data
    assert memory == bytes(offset) + data + bytes(8 * PAGE - offset - len(data))


def test_whole_pages_are_not_copied() -> None:
    data = bytes(1 << 22)
    tracemalloc.start()
    runs = lay(0x123000, data, 0x205)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(runs) == 1
    assert isinstance(runs[0].source, Data)
    assert size < 1 << 16


def test_many_partial_pages_do_not_cost_a_page_each() -> None:
    tracemalloc.start()
    runs = [run for i in range(10_000) for run in lay(i * PAGE + 1, b"x", 0x203)]
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 10_000 * PAGE // 4
    assert bytes(runs[9].page(0).data) == b"\0x" + bytes(PAGE - 2)


def test_a_terabyte_of_zeros_costs_no_memory() -> None:
    tracemalloc.start()
    plan = Plan(1 << 41, (Run(0, 1 << 28, 0x203, mask=MASK_NONE),))
    assert plan.page_count == 1 << 28
    first = next(plan.pages())
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bytes(first.data) == bytes(PAGE)
    assert size < 1 << 16


def test_find_tells_the_run_of_a_page_and_of_no_hole() -> None:
    plan = Plan(0x10000, (Run(0x4000, 2, 0x203), Run(0x1000, 1, 0x205)))
    assert plan.find(0x5FFF) is plan.runs[0]
    assert plan.find(0x1000) is plan.runs[1]
    assert plan.find(0x2000) is None


@pytest.mark.parametrize(
    ("end", "size"), [(0, 8192), (1, 8192), (8192, 8192), (8193, 16384), (1 << 30, 1 << 30)]
)
def test_the_enclave_size_is_the_smallest_power_of_two_that_holds_it(end: int, size: int) -> None:
    assert enclave_size(end) == size


def test_a_thread_of_a_blob_has_its_ssa_behind_its_tcs_and_its_data_behind_that() -> None:
    plan = blob_plan()
    (at,) = plan.tcs
    run = plan.find(at)
    assert run is not None
    tcs = tcs_of(run.page(0).data)
    assert (tcs.ossa, tcs.nssa, tcs.oentry) == (at + PAGE, 2, 0)
    assert tcs.ofs_base == tcs.ogs_base == at + 3 * PAGE
    stack, ssa, data = plan.find(at - PAGE), plan.find(at + PAGE), plan.find(at + 3 * PAGE)
    assert stack and ssa and data
    assert (stack.label, ssa.label, data.label) == ("stack", "SSA", "thread data")


def test_a_gap_adds_no_page() -> None:
    plan = Blob().zeros(1).gap(3).zeros(1).plan()
    assert [page.offset for page in plan.pages()] == [0, 4 * PAGE]
    assert measure(plan) == measure(Plan(0x8000, (Run(0, 1, 0x203), Run(0x4000, 1, 0x203))))
