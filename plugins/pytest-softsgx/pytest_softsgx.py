"""What pytest finds: the fixtures of softsgx, from where they are."""

from softsgx.host.pytest_plugin import pytest_configure, sgx_platform, sgx_run

__all__ = ["pytest_configure", "sgx_platform", "sgx_run"]
