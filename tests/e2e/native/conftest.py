"""A quick run starts real programs with one pager, a full run with both; all tests share builds.

In a mode that has one pager or is strict (``tests.support.modes``), cases of a test that differ in
that alone would be the same: only the first of them runs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.e2e.native.enclave import NativeBuilds
from tests.support import modes

from softsgx.engines.native import PAGERS

HERE = Path(__file__).parent
#: Parameters of tests that these words of a mode decide.
DECIDED = {"pager": PAGERS, "strict": ("strict",)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: set[str] = set()
    for item in items:
        if HERE not in item.path.parents:
            continue
        if "mprotect" in item.name:
            item.add_marker(pytest.mark.exhaustive)
        case = _case(item)
        if case in seen:
            item.add_marker(pytest.mark.skip(reason="this mode makes it the same as another case"))
        elif case:
            seen.add(case)


def _case(item: pytest.Item) -> str:
    """Return what an item runs in this mode; empty: the mode decides none of its parameters."""
    callspec = getattr(item, "callspec", None)
    given = {} if callspec is None else callspec.params
    decided = {name for name, words in DECIDED.items() if name in given and modes.has(*words)}
    if not decided:
        return ""
    rest = {name: value for name, value in given.items() if name not in decided}
    return f"{item.location[0]} {getattr(item, 'originalname', item.name)} {rest}"


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> NativeBuilds:
    """Programs and enclaves, each built once."""
    return NativeBuilds(tmp_path_factory)
