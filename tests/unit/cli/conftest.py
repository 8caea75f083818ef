"""Commands that generate a key get the tests' own: generating one takes longer than most tests."""

from __future__ import annotations

import pytest
from tests.support.enclave_files import key

from softsgx.cli import build, sign
from softsgx.userland import enclave


@pytest.fixture
def fresh_keys() -> None:
    """A test that asks for this generates its keys."""


@pytest.fixture(autouse=True)
def one_key(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "fresh_keys" not in request.fixturenames:
        for module in (build, sign, enclave):
            monkeypatch.setattr(module, "new_key", key)
