"""A quick run starts real programs with one pager, the whole one with both."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and "mprotect" in item.name:
            item.add_marker(pytest.mark.exhaustive)
