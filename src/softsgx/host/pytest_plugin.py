"""The pytest plugin: a fixture with a running platform, checked when the test ends.

Not found by itself, since pytest would then rewrite the assertions of all of softsgx::

    # conftest.py
    pytest_plugins = ["softsgx.host.pytest_plugin"]

    def test_my_library(sgx_platform):
        process = sgx_platform.process()

    @pytest.mark.sgx_platform(epc="112KiB")
    def test_my_library_under_pressure(sgx_platform): ...
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from softsgx.host.platform import Platform

__all__ = ["pytest_configure", "sgx_platform"]


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker that configures the fixture."""
    config.addinivalue_line(
        "markers", "sgx_platform(**config): fields of softsgx.PlatformConfig for the fixture"
    )


@pytest.fixture
def sgx_platform(request: pytest.FixtureRequest) -> Iterator[Platform]:
    """A started platform; at the end every count of it is compared with a recount."""
    # Imported here: a test run that uses no platform need not load one.
    from softsgx.host.platform import Platform

    marker = request.node.get_closest_marker("sgx_platform")
    keywords = marker.kwargs if marker else {}
    with Platform(**keywords) as platform:
        yield platform
        platform.check()
