"""The page of a plan needs no other files, and has the answer first and all its assumptions.

Method: plans of made-up traces, and the parser of the page of runs.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from functools import cache
from html import escape
from pathlib import Path

import numpy as np
import pytest
from tests.unit.report.test_page import LARGEST_BYTES, Elements

from softsgx.accesses import Trace, TraceWriter, parse_trace, write_trace
from softsgx.cli import main
from softsgx.plan import Plan, PlannedTrace, plan
from softsgx.report.charts import COLOURS, Mark, Series, lines
from softsgx.report.plan_html import plan_page

PROGRAM = "sort <numbers> 'a b'"


@cache
def timed() -> Plan:
    """Two enclaves: one accesses few pages often, one all of its pages in turn."""
    file = io.BytesIO()
    with TraceWriter(file, precision="accesses", program=PROGRAM) as writer:
        hot = writer.add_enclave("hot.so", 200, 1)
        cold = writer.add_enclave("cold <b>.so", 300, 1)
        for number in range(6000):
            time_ns = 10_000 * number
            writer.append(hot, number * number % 70, number % 3 == 0, time_ns)
            if number % 4 == 0:
                writer.append(cold, number // 4 % 300, False, time_ns)
    with parse_trace(file, "app.trace") as reader:
        return plan([PlannedTrace(reader.read())], policies=("lru",))


@cache
def untimed() -> Plan:
    return plan([PlannedTrace(Trace.of([(page % 90, True) for page in range(500)], "walk"))])


def charts(page: str) -> list[dict[str, object]]:
    return [
        json.loads(text)
        for text in re.findall(r"<script type='application/json'>(.*?)</script>", page)
    ]


@pytest.mark.parametrize("made", [timed, untimed])
def test_the_page_loads_nothing_and_its_elements_are_nested(made: object) -> None:
    assert callable(made)
    page = plan_page(made())
    assert not re.findall(r"<(?:script|img|iframe|link)[^>]*(?:src|href)=", page)
    assert "http" not in page and "url(" not in page and "@import" not in page
    seen = Elements(page).seen
    assert seen["figure"] == seen["figcaption"] == seen["section"]
    assert len(page.encode()) < LARGEST_BYTES


def test_the_recommendation_comes_before_everything_but_the_title() -> None:
    for made in (timed(), untimed()):
        body = plan_page(made).partition("<main>")[2]
        title, _, rest = body.partition("</h1>")
        assert "EPC for" in title
        assert rest.startswith("<p class='verdict fits'>" + escape(made.recommendation.text))


def test_a_plan_without_a_size_that_is_enough_is_an_alarm() -> None:
    none = replace(timed().recommendation, epc_bytes=None, text="No size is enough.")
    assert "<p class='verdict small'>No size is enough." in plan_page(
        replace(timed(), recommendation=none)
    )


def test_the_knee_and_the_recommended_size_are_marked_on_the_curve() -> None:
    page = plan_page(timed())
    assert timed().curve.knee_pages is not None
    assert re.search(r"<span class='place' style='[^']*'>knee [0-9.]+ [KM]iB</span>", page)
    assert re.search(r"<span class='place' style='[^']*'>enough [0-9.]+ [KM]iB</span>", page)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([90, 80, 20, 11, 0], "mark left"),
        ([0, 11, 20, 80, 90], "mark"),
        ([50, 50, 50, 50, 50], "mark"),
        ([0, 0, 9, 9, 9], "mark"),
    ],
)
def test_the_name_of_a_level_is_not_on_a_line(values: list[float], kind: str) -> None:
    drawn = lines(
        range(5), [Series("one", values, COLOURS[0])], unit="%", mark=Mark("target 10 %", 10)
    )
    assert re.findall(r"<span class='([^']*)'[^>]*>target 10 %</span>", drawn) == [kind]


def test_the_curve_has_the_misses_of_lru_and_of_linux() -> None:
    made = timed()
    curve = charts(plan_page(made))[0]
    assert (curve["unit"], curve["xUnit"]) == ("%", "MiB")
    lru, linux = curve["series"]  # type: ignore[misc]
    assert (lru["name"], linux["name"]) == ("LRU", "Linux")  # type: ignore[has-type]
    last = 100 * made.sizes[-1].faults / made.curve.accesses
    assert [one for one in linux["y"] if one is not None][-1] == pytest.approx(  # type: ignore[has-type]
        last, rel=1e-3
    )
    assert min(one for one in lru["y"] if one is not None) == pytest.approx(  # type: ignore[has-type]
        100 * made.curve.cold_misses / made.curve.accesses, rel=1e-3
    )


def test_every_row_of_pages_and_enclave_is_in_the_heat_map() -> None:
    page = plan_page(timed())
    heat = re.search(r"<div class='plot heat'>(.*?)</div>", page)
    assert heat is not None
    rows = len(timed().residency.page_bins)
    assert f"viewBox='0 0 {len(timed().residency.loads)} {rows}'" in heat[1]
    assert re.findall(r"class='name'[^>]*>(.*?)</span>", heat[1]) == [
        "hot.so",
        "cold &lt;b&gt;.so",
    ]
    covered = np.zeros((rows, len(timed().residency.loads)), int)
    for path in re.findall(rf"fill:{re.escape('var(--c0)')}[^>]* d='([^']*)'", heat[1]):
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)", path):
            covered[int(y), int(x) : int(x) + int(width)] += 1
    assert (covered == (np.array(timed().residency.resident) > 0)).all()


def test_every_price_is_listed_with_its_basis_and_source() -> None:
    page = plan_page(timed())
    for size in timed().sizes:
        for item in size.estimate.items:
            assert escape(item.price.what) in page
            assert f"<td class='text'>{item.price.basis}</td>" in page
            assert escape(item.price.source) in page


def test_slowdowns_say_that_prices_are_estimated() -> None:
    page = plan_page(timed())
    assert "<th scope='col'>slowdown (partly estimated)</th>" in page
    assert "prices: partly estimated" in page
    prices = timed().costs
    guessed = replace(prices, swap=replace(prices.swap, basis="estimated"))
    assert "slowdown (estimated)" in plan_page(replace(timed(), costs=guessed))


def test_a_trace_without_times_has_no_slowdown_and_no_rates() -> None:
    page = plan_page(untimed())
    assert "Predicted slowdown" not in page
    assert "percent of the accesses" in page
    assert "per second" not in page.partition("<main>")[2].partition("<script>")[0]


def test_the_command_writes_the_page_and_overwrites_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, report = tmp_path / "app.trace", tmp_path / "plan.html"
    write_trace(trace, Trace.of([(page % 90, True) for page in range(500)], "walk"))
    command = ["plan", str(trace), "--epc", "1MiB", "--report", str(report), "--quiet"]
    assert main(command) == 0
    assert report.read_text().startswith("<!DOCTYPE html>")
    assert main(command) == 2
    assert "plan.html" in capsys.readouterr().err


def test_names_cannot_write_into_the_page() -> None:
    page = plan_page(timed())
    assert "<b>.so" not in page
    assert escape(PROGRAM) in page
