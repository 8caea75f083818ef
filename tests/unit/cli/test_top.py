"""``softsgx top``: what it refuses, and what it prints when no program runs.

Goal: one line, and the status.  Method: the command in this process, with no directory of sockets.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from softsgx.cli import main
from softsgx.live import runs


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs, "status_directories", lambda: [tmp_path / "missing"])


@pytest.mark.parametrize("option", ["--once", "--json"])
def test_nothing_that_runs_is_one_line(capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert main(["top", option]) == 1
    assert capsys.readouterr() == (
        "",
        "softsgx: no program runs; start one with softsgx run -- PROGRAM\n",
    )


def test_a_process_that_is_no_run_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "4000000"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("softsgx: 4000000: not a run of softsgx; ")


def test_a_pipe_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.isatty", lambda _descriptor: False)
    assert main(["top"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("softsgx: standard output: ")


@pytest.mark.parametrize(
    "words", [["0"], ["-1"], ["x"], ["--interval", "0"], ["--interval", "nan"], ["--interval", "x"]]
)
def test_impossible_arguments_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["top", "--once", *words])
    assert ended.value.code == 2
