"""``softsgx plan --fleet`` from its arguments to its output.

Goal: what it refuses, what it prints, that it continues from its results.  Method: the command in
this process, on traces of a few thousand accesses.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.accesses import hot_and_cold, trace_of

from softsgx.accesses import write_trace
from softsgx.cli import main

SPEC = '[[host]]\nname = "a"\nepc = ["400KiB", "800KiB"]\n[[trace]]\nfile = "t.trace"\ncount = 3\n'


@pytest.fixture
def spec(tmp_path: Path) -> str:
    write_trace(tmp_path / "t.trace", trace_of(hot_and_cold(1, 60, 2000), seconds=0.5))
    path = tmp_path / "fleet.toml"
    path.write_text(SPEC)
    return str(path)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["app.trace"], "TRACE"),
        (["--epc", "1MiB"], "--epc"),
        (["--limit", "jobs=1MiB"], "--limit"),
        (["--target-slowdown", "1.5"], "--target-slowdown"),
        (["--evict-va"], "--evict-va"),
    ],
)
def test_options_of_one_host_do_not_go_with_a_fleet(
    words: list[str], option: str, spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--fleet", spec, *words]) == 2
    assert capsys.readouterr().err.startswith(f"softsgx: {option}: not possible with --fleet; ")


def test_a_plan_needs_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_that_is_no_journal_of_a_fleet_is_refused(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").write_text('{"other": 1}\n{"other": 2}\n')
    words = ["--results", str(tmp_path / "results"), "--jobs", "1"]
    assert main(["plan", "--fleet", spec, *words]) == 2
    assert "results:1: not a result of a fleet" in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_command_goes_on_from_its_results(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    words = ["plan", "--fleet", spec, "--jobs", "1", "--results", str(results)]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "3 programs on " in text.splitlines()[0]
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:1]) + lines[1][:10])
    assert main([*words, "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["replays"] == len(lines)
    assert sorted(results.read_text().splitlines(keepends=True)) == sorted(lines)
    best = document["placements"][document["best"]]
    assert sum(len(host["programs"]) for host in best["hosts"]) == 3
    assert all(host["slowdown"]["typical"] <= 1.1 for host in best["hosts"])


def test_a_fleet_without_room_is_status_1(
    spec: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "small.toml"
    path.write_text("target_slowdown = 1.0001\n" + SPEC.replace('["400KiB", "800KiB"]', '"100KiB"'))
    assert main(["plan", "--fleet", str(path), "--jobs", "1"]) == 1
    assert capsys.readouterr().out.startswith("No placement has room for all 3 programs")
