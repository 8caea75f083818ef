"""Colours and bold text go to terminals only, unless the user says otherwise."""

from __future__ import annotations

import io

import pytest

from softsgx.cli._common import takes_styles


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "terminal", "file"),
    [
        ({}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_styles_are_for_terminals_and_for_who_asks(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], terminal: bool, file: bool
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert takes_styles(Terminal()) is terminal
    assert takes_styles(io.StringIO()) is file
