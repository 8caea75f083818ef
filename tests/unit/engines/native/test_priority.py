"""The supervisor's priority while a program runs."""

from __future__ import annotations

import os

import pytest

from softsgx.engines.native.limits import with_raised_priority


def test_the_priority_is_raised_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [5]
    monkeypatch.setattr(os, "getpriority", lambda which, who: values[-1])
    monkeypatch.setattr(os, "setpriority", lambda which, who, value: values.append(value))
    with with_raised_priority():
        assert values == [5, -5]
    assert values == [5, -5, 5]
    with pytest.raises(KeyError), with_raised_priority():
        raise KeyError
    assert values == [5, -5, 5, -5, 5]


def test_without_permission_the_priority_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(_which: int, _who: int, value: int) -> None:
        asked.append(value)
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refuse)
    with pytest.raises(KeyError), with_raised_priority():
        raise KeyError
    assert len(asked) == 1
