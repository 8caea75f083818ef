"""The entry point for pytest: it exports the fixtures of softsgx."""

from softsgx.host.pytest_plugin import pytest_configure, sgx_platform, sgx_run

__all__ = ["pytest_configure", "sgx_platform", "sgx_run"]
