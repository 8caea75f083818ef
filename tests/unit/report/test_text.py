"""Printed and written summaries equal the recorded ones, and fit the terminal.

``--update-golden`` records ``tests/golden/run-summary.txt`` and ``.json`` again.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.style import Style
from rich.text import Text
from tests.support.report import Story, enclave_summary, made_up, told

from softsgx.report import (
    RunSummary,
    cycles_text,
    document,
    seconds_text,
    status_line,
    summary_text,
)
from softsgx.sizes import size_text

GOLDEN = Path(__file__).parents[2] / "golden"
REFERENCE = Path(__file__).parents[3] / "docs" / "reference" / "run-json.md"


def printed(run: RunSummary, width: int = 80) -> str:
    return summary_text(run, width)


def many(enclaves: int) -> Story:
    story = Story()
    for _ in range(enclaves):
        made = story.enclave(4)
        story.touch(made)
        made.process.exit()
    return story


def compare(name: str, text: str, *, update: bool) -> None:
    path = GOLDEN / name
    if update:
        path.write_text(text)
    assert path.read_text() == text


def test_the_summary_reads_as_on_record(update_golden: bool) -> None:
    busy, idle = enclave_summary(1, busy=100), enclave_summary(3, busy=0, state="building")
    row = [enclave_summary(number, busy=number**5, state="killed") for number in range(2, 26)]
    runs = [made_up(), made_up(busy), made_up(busy, idle), made_up(*row, exit_code=-9)]
    text = "\n".join(printed(run) for run in runs)
    compare("run-summary.txt", text, update=update_golden)


def test_the_document_is_as_on_record(update_golden: bool) -> None:
    run = made_up(enclave_summary(1, busy=100), enclave_summary(3, busy=0, state="building"))
    text = json.dumps(document(run), indent=2) + "\n"
    compare("run-summary.json", text, update=update_golden)


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("enclaves", [0, 1, 4, 25])
def test_no_line_is_wider_than_the_terminal(width: int, enclaves: int) -> None:
    lines = printed(many(enclaves).summary(), width).splitlines()
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("enclaves", [0, 1, 3, 4, 25])
@pytest.mark.parametrize("width", [40, 80])
def test_styles_change_no_text(width: int, enclaves: int) -> None:
    run = many(enclaves).summary()
    styled = summary_text(run, width, styled=True)
    assert re.sub(r"\x1b\[\d+m", "", styled) == printed(run, width)
    for line in styled.splitlines():
        assert Text.from_ansi(line).plain == re.sub(r"\x1b\[\d+m", "", line)
    title = next(iter(Text.from_ansi(styled).spans))
    assert (title.start, title.style) == (0, Style(bold=True))


def test_a_command_that_is_too_long_for_a_line_is_wrapped() -> None:
    run = replace(made_up(), command=("/a/long/name" * 10, "x" * 100))
    assert max(map(len, printed(run).splitlines())) <= 80
    assert summary_text(run, 80, styled=True).count("\x1b[1m") <= 1


def test_more_enclaves_than_rows_are_counted() -> None:
    assert "and 5 more" in printed(many(25).summary())


def test_a_run_without_enclaves_says_so() -> None:
    assert "No enclave was created." in printed(Story().summary())


def test_what_has_no_price_is_named() -> None:
    assert "no figure is known: ETRACK, IPI rounds" in printed(told().summary())


def test_the_command_is_quoted_as_a_shell_would_take_it() -> None:
    assert "./app '--two words'" in printed(Story().summary())


def test_the_status_fits_one_line() -> None:
    story = Story()
    story.touch(story.enclave())
    line = status_line(story.collector)
    assert "1 enclave, " in line
    assert "of 112 KiB EPC" in line
    assert len(line) < 80


def keys(value: Any, prefix: str = "") -> set[str]:
    """The names in a document, without those that are data."""
    found: set[str] = set()
    if isinstance(value, dict):
        for name, inner in value.items():
            found.add(f"{prefix}{name}")
            if name not in ("counters", "counts", "faults_by_kind"):
                found |= keys(inner, f"{prefix}{name}.")
    elif isinstance(value, list):
        for inner in value:
            found |= keys(inner, prefix)
    return found


def test_every_name_in_the_document_is_in_the_reference() -> None:
    text = REFERENCE.read_text()
    missing = [
        name
        for name in keys(document(told().summary()))
        if f"`{name.rpartition('.')[2]}`" not in text
    ]
    assert not missing


@given(st.integers(0, 1 << 50))
def test_sizes_are_short_and_near(size: int) -> None:
    text = size_text(size)
    number, unit = text.split(" ")
    scale = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}[unit]
    assert abs(float(number) * scale - size) <= 0.0501 * scale
    assert len(text) <= 13


@given(st.integers(0, 10**14))
def test_cycles_are_short_and_near(cycles: int) -> None:
    text = cycles_text(cycles)
    scale = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}.get(text[-1], 1)
    number = float(text.rstrip(" kMGT"))
    assert abs(number * scale - cycles) <= 0.005 * cycles
    assert len(text) <= 6


def test_times_have_a_unit_that_suits_them() -> None:
    assert [seconds_text(s) for s in (0, 2.5e-5, 0.0815, 0.9996, 1.5, 75)] == [
        *("0 s", "25 µs", "81.5 ms", "1.00 s", "1.50 s", "75.00 s")
    ]
