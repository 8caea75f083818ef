"""Options that all tests share."""

from __future__ import annotations

import pytest
from hypothesis import settings

# No deadline: the time of one example says more about the load of the machine than about the code.
settings.register_profile("softsgx", deadline=None)
settings.load_profile("softsgx")

pytest_plugins = ["softsgx.host.pytest_plugin"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="record tests/golden anew instead of comparing"
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether recorded results are to be written anew."""
    return bool(request.config.getoption("--update-golden"))
