"""The page that lists known defects says what the code says; --update-golden rewrites it."""

from __future__ import annotations

from pathlib import Path

import pytest

from softsgx.driver import DEFECTS

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "defects.md"

HEAD = """\
# Known defects of Linux's SGX code

By default softsgx has the fixed behaviour. `Platform(defects={"B1"})` brings one back, for tests
that must find it and for people who study it. B1–B36 were fixed at some time, or never merged;
L1–L13 were found by reading and are unconfirmed upstream. `tests/model/test_defects.py` shows each
with its name and its absence without.

| name | what goes wrong | switched on in | what the broken form does |
|---|---|---|---|
"""

TAIL = """
Names that cannot be switched on say why in the last column.
"""


def page() -> str:
    rows = [
        f"| {name} | {defect.symptom} | "
        f"{'—' if defect.home == 'none' else f'`{defect.home}`'} | {defect.how} |\n"
        for name, defect in DEFECTS.items()
    ]
    return HEAD + "".join(rows) + TAIL


def test_the_page_of_defects_is_what_the_code_says(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--update-golden"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page()


def test_all_49_are_listed_and_most_can_be_shown() -> None:
    assert list(DEFECTS) == [f"B{n}" for n in range(1, 37)] + [f"L{n}" for n in range(1, 14)]
    assert sum(defect.home != "none" for defect in DEFECTS.values()) >= 40
