"""``softsgx plan``: its text, its JSON, and what it refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.accesses import hot_and_cold, trace_of

from softsgx.accesses import write_trace
from softsgx.cli import main


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plan") / "app.trace"
    write_trace(path, trace_of(hot_and_cold(1, 300, 3000), seconds=0.05))
    return str(path)


def test_the_text_begins_with_the_answer_and_fits_80_columns(
    trace: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", trace, "--policy", "lru,s3fifo,opt"]) == 0
    text = capsys.readouterr().out
    assert "of EPC keep the slowdown under 10 %" in " ".join(text.split("\n")[:2])
    assert "sgx.intel.com/epc: " in text and "misc.max" in text
    assert "s3fifo" in text and "estimated" in text
    assert max(map(len, text.splitlines())) <= 80


def test_json_has_the_answer_and_says_what_each_price_is_based_on(
    trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", trace, "--json", "-", "--epc", "400KiB:2MiB"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == "softsgx-plan/1"
    sizes = [size["epc_bytes"] for size in document["sizes"]]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (400 << 10, 2 << 20)
    assert document["recommendation"]["epc_bytes"] in sizes
    bases = {price["event"]: price["basis"] for price in document["costs"]["prices"]}
    assert (bases["swap"], bases["eenter"], bases["ewb"]) == ("read", "read", "estimated")
    assert document["traces"][0]["footprint_pages"] == 300
    resident = document["residency"]["resident"]
    assert len(resident) == len(document["residency"]["page_bins"])


def test_json_goes_to_a_file_beside_the_text(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    assert main(["plan", trace, "--json", str(path), "--epc", "1MiB"]) == 0
    assert json.loads(path.read_text())["sizes"][0]["epc_bytes"] == 1 << 20
    assert "of EPC" in capsys.readouterr().out
    assert main(["plan", trace, "--json", str(path)]) == 2
    assert "exists; add --force" in capsys.readouterr().err


def test_a_range_in_which_no_size_is_enough_ends_with_1(
    trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", trace, "--epc", "100KiB:200KiB", "--target-slowdown", "1.01"]) == 1
    assert "No size up to 200 KiB" in capsys.readouterr().out


def test_a_profile_of_ones_own_changes_the_slowdown(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = tmp_path / "mine.toml"
    costs.write_text("hertz = 2.6e9\n[prices.swap]\nlow = 1\ntypical = 4\nhigh = 8\n")
    arguments = ["plan", trace, "--epc", "400KiB", "--json", "-"]
    main(arguments)
    ours = json.loads(capsys.readouterr().out)["sizes"][0]
    main([*arguments, "--costs", str(costs)])
    mine = json.loads(capsys.readouterr().out)
    assert mine["sizes"][0]["loads"] == ours["loads"]
    assert mine["sizes"][0]["typical_cycles"] < ours["typical_cycles"] / 1000
    assert "measured" in mine["costs"]["basis"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--epc", "4KiB:8KiB"], "too small for an enclave"),
        (["--epc", "2MiB:1MiB"], "give the smaller size first"),
        (["--epc", "much"], "size 'much'"),
        (["--policy", "random"], "policy 'random': unknown"),
        (["--limit", "a"], "write GROUP=SIZE"),
        (["--limit", "a=8KiB"], "limit of a"),
        (["--costs", "abacus"], "costs = 'abacus': not known"),
        (["--costs", "no/such.toml"], "no/such.toml: No such file"),
        (["--target-slowdown", "1"], "not above 1"),
        (["--run-time", "-3"], "--run-time -3"),
        (["--group", "a", "--group", "b"], "2 groups for 1 trace(s)"),
        (["--batch", "0"], "give a number of pages"),
        (["--json", "no/such/plan.json"], "no/such/plan.json: cannot be written"),
    ],
)
def test_bad_input_is_refused_in_one_line_with_2(
    trace: str, arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: object = main(["plan", trace, *arguments])
    except SystemExit as ended:  # argparse
        status = ended.code
    assert status == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert problem in last


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"hello\n"])
def test_a_file_that_is_no_trace_is_refused_in_one_line_with_2(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.trace"
    path.write_bytes(content)
    assert main(["plan", str(path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("softsgx: ") and str(path) in line


def test_help_teaches_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = capsys.readouterr().out
    assert "softsgx record -o app.trace -- ./app" in text
    assert "softsgx plan app.trace " in text
