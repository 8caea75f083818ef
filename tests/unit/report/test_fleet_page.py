"""The page of a fleet loads nothing, has the answer on top, and every host and choice in it.

Method: placements of made-up replays, and the parser of the page of runs; the command writes it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
from tests.support.accesses import hot_and_cold, trace_of
from tests.unit.report.test_page import Elements

from softsgx.accesses import write_trace
from softsgx.cli import main
from softsgx.plan.fleet import FleetPlan, PlacedHost, Placement, UnitResult
from softsgx.plan.fleet_spec import FleetHost, FleetSpec, FleetTrace
from softsgx.report.fleet import answer
from softsgx.report.fleet_html import fleet_page

MIB = 1 << 20


def made(
    *, unplaced: tuple[tuple[str, int], ...] = (), hosts: int = 3, timed: bool = True
) -> FleetPlan:
    """Two choices: three hosts of 2 MiB, and two of 4 MiB; ``unplaced`` is of both."""
    traces = (
        FleetTrace("<front>", Path("front.trace"), 4, limit_bytes=MIB),
        FleetTrace("back", Path("back.trace"), 2, hosts=("edge",)),
    )
    spec = FleetSpec((FleetHost("edge", (2 * MIB, 4 * MIB), 9),), traces)
    result = UnitResult(
        "key", True, 700, (1.01, 1.05, 1.09) if timed else None, 1234, 2345, 99.0 if timed else None
    )

    def host(size: int) -> PlacedHost:
        return PlacedHost("edge", size, ("<front>", "<front>", "back"), result)

    placements = tuple(
        Placement((("edge", size),), tuple(host(size) for _ in range(count)), unplaced)
        for size, count in ((2 * MIB, hosts), (4 * MIB, 2))
    )
    return FleetPlan(spec, placements, 17)


@pytest.mark.parametrize(
    "plan", [made(), made(timed=False), made(unplaced=(("back", 1),)), made(hosts=0)]
)
def test_the_page_loads_nothing_and_its_elements_are_nested(plan: FleetPlan) -> None:
    page = fleet_page(plan)
    assert not re.findall(r"<(?:script|img|iframe|link)[^>]*(?:src|href)=", page)
    Elements(page)
    assert "<front>" not in page


def test_the_answer_is_on_top_and_the_choice_is_marked() -> None:
    plan = made()
    page = fleet_page(plan)
    text = escape(answer(plan.best, 6))
    assert text == "6 programs on 3 × edge (2 MiB): 6 MiB of EPC in all."
    assert page.index(text) < page.index("class='tiles'") < page.index("<figure>")
    assert "class='verdict fits'" in page
    assert "edge 2 MiB (chosen)" in page
    assert re.search(r"<tr class='marked'><th[^>]*>edge 2 MiB</th>", page)
    assert "2.7 MiB of 2 MiB" in page, "700 pages, of which some are paged"
    assert "2 × &lt;front&gt;, back" in page
    assert ">1 MiB<" in page, "the limit of a program"
    assert ">5 %<" in page and ">1 % – 9 %<" in page.replace("\N{NO-BREAK SPACE}", " ")


def test_without_room_the_choice_that_leaves_the_fewest_out_is_shown() -> None:
    plan = made(unplaced=(("back", 3),))
    closer = replace(plan.placements[1], unplaced=(("back", 1),))
    page = fleet_page(replace(plan, placements=(plan.placements[0], closer)))
    assert "class='verdict small'" in page
    assert "No placement has room for all 6 programs" in page
    assert "leaves the fewest programs out: 1 × back" in page
    assert "2.7 MiB of 4 MiB" in page
    assert "edge 2 MiB (no room for 3)" in page
    assert "(chosen)" not in page


def test_a_large_fleet_has_a_bounded_page() -> None:
    page = fleet_page(made(hosts=5000))
    assert "The first 100 of 5000; JSON has all." in page or "edge 4 MiB (chosen)" in page
    assert len(page) < 200_000


def test_the_command_writes_the_page_beside_the_json(tmp_path: Path) -> None:
    write_trace(tmp_path / "a.trace", trace_of(hot_and_cold(1, 60, 900)))
    spec, page = tmp_path / "fleet.toml", tmp_path / "fleet.html"
    spec.write_text('[[host]]\nname = "h"\nepc = ["1MiB", "2MiB"]\n[[trace]]\nfile = "a.trace"\n')
    words = ["plan", "--fleet", str(spec), "--jobs", "1", "--quiet", "--report", str(page)]
    assert main([*words, "--json", str(tmp_path / "json")]) == 0
    assert "1 programs on 1 × h (1 MiB)" in page.read_text()
    assert (tmp_path / "json").exists()
    assert main(words) == 2, "it is not overwritten without --force"
