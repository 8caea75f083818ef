"""``softsgx explore``: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from softsgx.cli import main
from softsgx.explore import BUILT_IN


def test_the_list_has_every_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["scenarios"]
    assert set(listed) == set(BUILT_IN)
    assert all(summary.endswith(".") for summary in listed.values())


def test_a_finding_is_printed_with_a_token_that_repeats_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = tmp_path / "found.html"
    arguments = ["explore", "fault-reclaim", "--defect", "B1", "--budget", "10"]
    assert main([*arguments, "--json", "--report", str(report)]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [one["property"] for one in found] == ["lost page"]
    assert found[0]["replay"] in report.read_text()
    assert main(["explore", "--replay", found[0]["replay"]]) == 1
    shown = capsys.readouterr().out
    assert "◀ switch" in shown and "✗ lost page" in shown and "sgx:ewb" in shown
    assert main(["explore", "--replay", found[0]["replay"], "--as-test"]) == 1
    assert "def test_fault_reclaim_with_b1()" in capsys.readouterr().out


def test_clean_code_has_no_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", "two-faults", "--budget", "20", "--matrix"]) == 0
    shown = capsys.readouterr().out
    assert "two-faults" in shown and "ELDU" in shown and "✗" not in shown


def test_a_scenario_of_the_user_is_explored(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_lost.py").write_text(
        '''
def lost_update(stage):
    """Two tasks count without a lock."""
    count = [0]

    def add():
        seen = count[0]
        stage.runtime.point("between")
        count[0] = seen + 1

    def check():
        assert count[0] == 2, f"lost update: {count[0]}"

    stage.task("first", add)
    stage.task("second", add)
    stage.check(check)
'''
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert (
        main(["explore", "mine_lost:lost_update", "--strategy", "bounded", "--budget", "99"]) == 1
    )
    assert "✗ invariant: lost update: 1" in capsys.readouterr().out


def test_results_are_appended_and_taken_up(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["explore", "two-faults", "--out", str(tmp_path / "c"), "--json", "--budget"]
    for budget in ("200", "400"):
        assert main([*arguments, budget]) == 0
        assert json.loads(capsys.readouterr().out)["schedules"] == int(budget)
    assert len((tmp_path / "c" / "units.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "scenario 'nothing': not known; softsgx explore --list has the names"),
        (["story:B99"], "scenario 'story:B99': no defect with a story"),
        (["no_such_module:f"], "scenario 'no_such_module:f': No module named"),
        (["softsgx.explore:missing"], "scenario 'softsgx.explore:missing': module"),
        (["--defect", "B5"], "defect 'B5': cannot be switched on"),
        (["--replay", "nonsense"], "token 'nonsense'…: not a token"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explore", "--budget", "1", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"softsgx: {message}")


@pytest.mark.parametrize("text", ["", "0", "0s", "fast", "-5", "5d"])
def test_an_invalid_budget_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["explore", f"--budget={text}"])
    assert ended.value.code == 2
    assert "write 60s, 5m, 2h, or a number" in capsys.readouterr().err
