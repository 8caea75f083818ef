"""The page of known defects agrees with the code; --update-golden rewrites it."""

from __future__ import annotations

from pathlib import Path

import pytest

from softsgx.defects import Defect

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "defects.md"

HEAD = """\
# Known defects of Linux's SGX code

By default softsgx has the fixed behaviour. `Platform(defects={"B1"})`, or
`Platform(defects={Defect.PCMD_PAGE_TRUNCATED_WHILE_SHARED})` with `Defect` from `softsgx.defects`,
brings one back, for tests that must find it and for people who study it. B1–B36 were fixed at some
time, or never merged; L1–L13 were found by reading and are unconfirmed upstream.
`softsgx defects run B1` runs a small program with the defect and without it, and shows the property
that the defect violates and a schedule that does.

"""

SWITCHABLE = """\
| id | name | what goes wrong | package | what the broken form does | fix |
|---|---|---|---|---|---|
"""

OTHERS = """
The others cannot be switched on; a platform that is given one is refused:

| id | name | what goes wrong | why softsgx cannot express it | fix |
|---|---|---|---|---|
"""


def page() -> str:
    switchable = [
        f"| {defect} | `{defect.name}` | {defect.symptom} | `{defect.package}` |"
        f" {defect.explanation} | {defect.fix} |\n"
        for defect in Defect
        if defect.can_be_switched_on
    ]
    others = [
        f"| {defect} | `{defect.name}` | {defect.symptom} | {defect.explanation} | {defect.fix} |\n"
        for defect in Defect
        if not defect.can_be_switched_on
    ]
    return HEAD + SWITCHABLE + "".join(switchable) + OTHERS + "".join(others)


def test_the_page_of_defects_agrees_with_the_code(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--update-golden"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page()


def test_all_49_are_listed_and_most_can_be_shown() -> None:
    assert list(Defect) == [f"B{n}" for n in range(1, 37)] + [f"L{n}" for n in range(1, 14)]
    assert sum(defect.can_be_switched_on for defect in Defect) >= 40
