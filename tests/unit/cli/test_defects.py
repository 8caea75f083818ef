"""The command for known defects: what it lists, explains and runs, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from softsgx.cli import main
from softsgx.defects import Defect
from softsgx.sim.stories import STORIES

RACE = Defect.CONCURRENT_EAUG_REFUSED


def printed(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    assert main(["defects", *words]) == status
    return capsys.readouterr().out


def described(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    defects: list[dict[str, Any]] = json.loads(printed(capsys, *words, "--json"))["defects"]
    return defects


def test_every_defect_is_listed_with_its_fix_and_what_softsgx_has_of_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    listed = described(capsys, "list")
    assert [one["id"] for one in listed] == list(Defect)
    assert all(one["fix"] and (one["package"] or one["explanation"]) for one in listed)
    assert {one["id"] for one in listed if "story" in one} == set(STORIES)


def test_the_table_says_why_a_defect_cannot_be_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    table = printed(capsys, "list")
    for defect in Defect:
        (line,) = (line for line in table.splitlines() if line.startswith(f"{defect} "))
        assert ("yes, in" in line) is (defect in STORIES)
        assert defect in STORIES or defect.explanation in line


@pytest.mark.parametrize("name", ["B11", "b11", "concurrent_eaug_refused"])
def test_a_defect_has_two_names_in_any_case(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = described(capsys, "show", name)
    assert shown["name"] == RACE.name
    assert shown["property"] == STORIES[RACE].holds


def test_a_run_prints_the_violated_property_and_the_schedule(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = printed(capsys, "run", "B11")
    assert STORIES[RACE].holds in " ".join(text.split())
    assert "violated: the fault of" in text
    assert "runs until" in text
    assert "holds in 12 schedules" in text


def test_the_json_of_a_run_has_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = described(capsys, "run", "B11", "L2")
    assert "SIGBUS" in first["with_defect"]["violation"]
    assert first["with_defect"]["switches"]
    assert first["without"]["violation"] is None
    assert second["id"] == "L2"


def test_a_defect_that_does_not_show_is_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mended = replace(STORIES[RACE], scenario=lambda scene: None)
    monkeypatch.setitem(STORIES, RACE, mended)
    assert "does not show" in printed(capsys, "run", "B11", status=1)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["show"], "no NAME"),
        (["run", "B99"], "'B99': unknown"),
        (["run", "B5"], "B5: cannot be run"),
        (["list", "B1"], "takes no NAME"),
    ],
)
def test_bad_names_are_refused_in_one_line(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["defects", *words]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
