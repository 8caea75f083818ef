"""MRENCLAVE: the manual's vectors, and the fast routine against the block-by-block one."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.enclave_files import PAGE, code, slow_measure

from softsgx.errors import SoftSgxError
from softsgx.image import MASK_NONE, Data, Fill, Padded, Plan, Run, Source, hashed_bytes, measure

RW = Run(0, 1, 0x203)


@pytest.mark.parametrize(
    ("runs", "digest"),
    [
        ((), "9e197c8837c6d65632dbdd59cd7df4f1a25b68d8e4e5eb6ca3b20b05311fecb8"),
        (
            (Run(0, 1, 0x203, mask=MASK_NONE),),
            "995c454650d39811c9c53e1af534aa6c34a496ce9302c34e0ced2c7a7e2c4103",
        ),
        ((RW,), "1f2cf80bd03ffd8bfac33f7cba128aff511c3af666b93bb66e7ef718418bdade"),
        (
            (RW, Run(0x1000, 1, 0x100, mask=MASK_NONE)),
            "2280eda7599b4f23813224621835d69de20107e0d8b13881e19481578669e02c",
        ),
    ],
)
def test_the_vectors_of_the_rules_come_out(runs: tuple[Run, ...], digest: str) -> None:
    assert measure(Plan(0x2000, runs)).hex() == digest


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    runs: list[Run] = []
    at = 0
    for seed in range(draw(st.integers(0, 4))):
        at += draw(st.integers(0, 3)) * PAGE
        pages = draw(st.sampled_from([1, 2, 63, 64, 65, 130]))
        kind = draw(st.sampled_from(["data", "zero", "fill", "padded", "tcs"]))
        source: Source = Fill(0 if kind == "zero" else draw(st.integers(0, 0xFFFFFFFF)))
        if kind == "data":
            source = Data(memoryview(code(pages * PAGE - seed) + bytes(seed)))
        elif kind == "padded":
            pages, lead = 1, draw(st.integers(0, PAGE))
            source = Padded(memoryview(code(draw(st.integers(0, PAGE - lead)))), lead)
        elif kind == "tcs":
            source = Data(memoryview(code(72, seed).ljust(PAGE, b"\0") * pages))
        mask = draw(st.one_of(st.sampled_from([0, 0xFFFF]), st.integers(0, 0xFFFF)))
        flags = 0x100 if kind == "tcs" else draw(st.sampled_from([0x203, 0x205]))
        runs.append(Run(at, pages, flags, source, mask))
        at = runs[-1].end
    order = draw(st.permutations(runs))
    return Plan(1 << 22, tuple(order), draw(st.integers(1, 4)))


@given(plans())
@settings(max_examples=60, deadline=None)
def test_the_fast_measurement_is_the_manuals(plan: Plan) -> None:
    assert measure(plan) == slow_measure(plan)


@pytest.mark.parametrize("pages", [1, 1023, 1024, 1025, 3000])
def test_unmeasured_pages_are_hashed_by_their_headers_alone(pages: int) -> None:
    plan = Plan(1 << 24, (Run(0x3000, pages, 0x203, mask=MASK_NONE),))
    assert measure(plan) == slow_measure(plan)
    assert hashed_bytes(plan) == 64 + 64 * pages


def test_a_gigabyte_of_unmeasured_heap_costs_no_memory() -> None:
    plan = Plan(1 << 31, (Run(0, 1 << 18, 0x203, mask=MASK_NONE),))
    tracemalloc.start()
    measure(plan)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_more_hashing_than_the_limit_is_refused_before_any() -> None:
    plan = Plan(1 << 56, (Run(0, 1 << 44, 0x203),))
    with pytest.raises(SoftSgxError, match="limit_bytes"):
        measure(plan)
    assert hashed_bytes(plan) == 64 + (1 << 44) * 5184


@pytest.mark.parametrize(
    "other",
    [
        Plan(0x4000, (RW,)),
        Plan(0x2000, (RW,), 2),
        Plan(0x2000, (Run(0x1000, 1, 0x203),)),
        Plan(0x2000, (Run(0, 1, 0x205),)),
        Plan(0x2000, (Run(0, 1, 0x203, Fill(1)),)),
        Plan(0x2000, (Run(0, 1, 0x203, mask=0x7FFF),)),
    ],
)
def test_everything_that_ecreate_and_eadd_take_is_in_the_hash(other: Plan) -> None:
    assert measure(other) != measure(Plan(0x2000, (RW,)))


def test_the_order_of_pages_is_in_the_hash() -> None:
    a, b = Run(0, 1, 0x203), Run(0x1000, 1, 0x205)
    assert measure(Plan(0x2000, (a, b))) != measure(Plan(0x2000, (b, a)))


def test_the_base_address_is_not_in_the_hash() -> None:
    assert measure(Plan(0x2000, (RW,), base=0x40000)) == measure(Plan(0x2000, (RW,)))
