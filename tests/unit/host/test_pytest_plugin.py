"""The fixture that other projects' tests use."""

from __future__ import annotations

import pytest

import softsgx


def test_the_fixture_is_a_running_platform(sgx_platform: softsgx.Platform) -> None:
    assert sgx_platform.driver is not None
    assert sgx_platform.config == softsgx.PlatformConfig()


@pytest.mark.sgx_platform(epc="112KiB", seed=5)
def test_the_marker_configures_it(sgx_platform: softsgx.Platform) -> None:
    assert sgx_platform.core.epc_pages == 28
    assert sgx_platform.config.seed == 5


def test_the_package_names_only_what_it_has() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Platfrom'"):
        softsgx.Platfrom  # noqa: B018
