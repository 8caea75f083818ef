"""When ticks are due, and what ends a wait for the program."""

from __future__ import annotations

import os
import signal
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from softsgx.engines.native.injections import (
    EINIT_OUTCOMES,
    INJECTIONS,
    Injections,
    tick_period_ns,
)
from softsgx.engines.native.injector import Ticks
from softsgx.engines.native.tracing.waits import Waits

PERIOD_NS = 4_000_000
GUIDE = Path(__file__).parents[4] / "docs" / "how-to" / "faults.md"


def test_the_guide_names_no_option_that_is_not_there() -> None:
    words = GUIDE.read_text().split()
    asked = [after for word, after in pairwise(words) if word == "--inject"]
    ticks = [after for word, after in pairwise(words) if word == "--tick" and after[0].isdigit()]
    assert len(asked) > len(INJECTIONS)
    assert ticks
    Injections.of(asked)
    for tick in ticks:
        tick_period_ns(tick)


def test_every_failure_of_einit_is_in_the_guide() -> None:
    guide = GUIDE.read_text()
    assert [name for name in EINIT_OUTCOMES if name not in guide] == []


def test_no_tick_is_due_while_no_processor_is_inside() -> None:
    ticks = Ticks(PERIOD_NS)
    assert not ticks.is_due(10**12)
    assert ticks.arm(0, inside=False) is None
    assert not ticks.is_due(10**12)


def test_a_processor_that_comes_in_meets_the_next_tick_and_none_of_those_before() -> None:
    ticks = Ticks(PERIOD_NS)
    assert ticks.arm(5 * PERIOD_NS, inside=True) == 6 * PERIOD_NS
    assert not ticks.is_due(6 * PERIOD_NS - 1)
    assert ticks.is_due(6 * PERIOD_NS)
    assert ticks.arm(9 * PERIOD_NS + 1, inside=True) == 10 * PERIOD_NS


@pytest.mark.parametrize(
    ("text", "period_ns"), [("4ms", 4_000_000), ("1500us", 1_500_000), ("1s", 10**9)]
)
def test_a_period_has_a_unit(text: str, period_ns: int) -> None:
    assert tick_period_ns(text) == period_ns


@pytest.fixture
def child() -> int:  # ends when it is killed
    pid = os.fork()
    if not pid:
        signal.pause()
        os._exit(0)
    return pid


def test_a_wait_ends_at_its_time_or_with_a_signal_or_with_a_child(child: int) -> None:
    now = [0]

    def clock() -> int:
        now[0] += 1_000_000
        return now[0]

    waits = Waits({signal.SIGUSR1}, clock)
    with waits.signals_blocked():
        assert waits.next(until_ns=3_000_000) is None
        assert not waits.received()
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        assert waits.next() is None
        assert waits.received()
        assert not waits.received()
        os.kill(child, signal.SIGKILL)
        assert waits.next() == (child, signal.SIGKILL, 0)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)  # forgotten, not deadly
