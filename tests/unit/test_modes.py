"""``tools/dev.py modes``: its modes are those of the tests, and its table has what pytest reports.

Method: a report in pytest's format with a test of each outcome.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.support.modes import WORDS
from tools.modes import MODES, Mode, Result, main, read, table

_REPORT = """
<testsuites><testsuite>
<testcase classname="a" name="passes"/>
<testcase classname="a" name="is_skipped"><skipped message="why"/></testcase>
<testcase classname="a" name="fails"><failure message="why"/></testcase>
<testcase classname="b" name="has_no_program"><error message="why"/></testcase>
<testcase classname="b" name="passes_too"/>
</testsuite></testsuites>
"""


def test_every_mode_is_one_that_the_tests_know() -> None:
    assert len({mode.name for mode in MODES}) == len(MODES) == 18
    for mode in MODES:
        assert set(mode.native.split(",")) <= set(WORDS)


def test_a_mode_decides_whether_the_compiled_core_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTSGX_PURE", "1")
    assert "SOFTSGX_PURE" not in Mode("compiled", "mprotect", "stops").environment()
    assert Mode("pure", "mprotect", "stops").environment() == dict(os.environ)


def test_the_table_has_the_outcome_of_each_test(tmp_path: Path) -> None:
    (tmp_path / "report").write_text(_REPORT)
    mode, ended = Mode("pure", "mprotect", "stops"), Result(1, 61.6)
    read(ended, tmp_path / "report")
    *_head, row, first, second = table({mode: ended}).splitlines()
    assert row == "| pure | mprotect | stops | 2 | 1 | 2 | 62 |"
    assert [first, second] == [
        "FAILED pure-mprotect-stops: a::fails",
        "FAILED pure-mprotect-stops: b::has_no_program",
    ]
    cut = table({mode: Result(124, 3600)}).splitlines()[-1]
    assert cut == "| pure | mprotect | stops | 0 | 0 | ended with 124 | 3600 |"


def test_a_choice_that_no_mode_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--only", "fast"])
    assert refused.value.code == 2
    assert "'fast' is in no mode" in capsys.readouterr().err
