"""A fixture with every runtime, for tests that must pass on all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from softsgx.runtime import (
    InlineRuntime,
    Pct,
    Runtime,
    SeededRuntime,
    ThreadsRuntime,
    Uninterrupted,
)

MakeRuntime = Callable[[], Runtime]

RUNTIMES: dict[str, MakeRuntime] = {
    "inline": partial(InlineRuntime, 7),
    "threads": partial(ThreadsRuntime, 7, grace_ns=2_000_000_000),
    "uniform": partial(SeededRuntime, 7),
    "pct": lambda: SeededRuntime(7, policy=Pct(3, 100)),
    "uninterrupted": lambda: SeededRuntime(7, policy=Uninterrupted()),
}


@pytest.fixture(params=RUNTIMES)
def make_runtime(request: pytest.FixtureRequest) -> MakeRuntime:
    """Make a new runtime of each kind."""
    return RUNTIMES[request.param]


@pytest.fixture
def runtime(make_runtime: MakeRuntime) -> Runtime:
    """One runtime of each kind."""
    return make_runtime()
