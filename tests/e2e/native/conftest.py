"""A quick run starts real programs with one pager, a full run with both; all tests share builds."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.e2e.native.enclave import NativeBuilds

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and "mprotect" in item.name:
            item.add_marker(pytest.mark.exhaustive)


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> NativeBuilds:
    """Programs and enclaves, each built once."""
    return NativeBuilds(tmp_path_factory)
