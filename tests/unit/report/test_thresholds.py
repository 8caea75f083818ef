"""Thresholds: every field of a run's document can be compared, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.support.report import enclave_summary, made_up, told

from softsgx.errors import SoftSgxError
from softsgx.report import Threshold, document


def made() -> dict[str, Any]:
    return document(made_up(enclave_summary(1, busy=0), enclave_summary(2, busy=3)))


@pytest.mark.parametrize(
    ("text", "exceeded"),
    [
        ("evictions>0", "verdict.evictions is 132"),
        ("evictions>132", None),
        ("evictions>=132", "verdict.evictions is 132"),
        ("verdict.reloads<124", "verdict.reloads is 123"),
        ("epc==small", "verdict.epc is small"),
        ("epc != small", None),
        ("enclaves.reloads>100", "enclaves.reloads is 123"),
        ("enclaves.reloads==0", "enclaves.reloads is 0"),
        ("enclaves.faults_by_kind.augment>=3", "enclaves.faults_by_kind.augment is 3"),
        ("groups.refused>9", None),
        ("groups.max_bytes<2MiB", "groups.max_bytes is 1048576"),
        ("platform.peak_epc_bytes<=1MiB", "platform.peak_epc_bytes is 1048576"),
        ("platform.counters.held.reg==0", "platform.counters.held.reg is 0"),
        ("injected.ticks>1000", "injected.ticks is 1234"),
        ("wall_seconds>1.5", "wall_seconds is 1.875"),
        ("exit_status!=0", None),
        ("silicon.counts.ewb>100", "silicon.counts.ewb is 132"),
        ("signal==SIGSEGV", None),
    ],
)
def test_a_threshold_is_exceeded_by_what_the_document_has(text: str, exceeded: str | None) -> None:
    assert Threshold.parse(text).exceeded(made()) == exceeded


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        for element in value:
            yield from leaves(element, path)
    elif isinstance(value, dict):
        for name, inside in value.items():
            yield from leaves(inside, f"{path}.{name}" if path else name)
    else:
        yield path, value


def test_every_field_of_a_real_run_can_be_named() -> None:
    for path, value in leaves(document(told().summary())):
        if value is not None:
            word = value or "none" if isinstance(value, str) else int(value)
            assert Threshold.parse(f"{path}=={word}").field


def test_a_count_that_is_not_there_is_zero() -> None:
    threshold = Threshold.parse("silicon.counts.eaug<1")
    assert threshold.exceeded(document(told().summary())) == "silicon.counts.eaug is 0"


def test_a_field_that_is_null_satisfies_nothing() -> None:
    for text in ("groups.max_bytes>=0", "groups.max_bytes<1"):
        run = {"groups": [{"max_bytes": None}]}
        assert Threshold.parse(text).exceeded(run) is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("evictions", "write FIELD>VALUE"),
        ("evictions>", "write FIELD>VALUE"),
        (">0", "write FIELD>VALUE"),
        ("evictons>0", "did you mean verdict.evictions?"),
        ("enclaves.reload>0", "did you mean enclaves.reloads?"),
        ("verdict.nonsense.x>0", "no run has the field verdict.nonsense.x"),
        ("evictions>many", "'many' is not a number or a size"),
        ("evictions==many", "'many' is not a number or a size"),
        ("epc>small", "epc is a word; compare it by == or !="),
        ("platform>3", "platform is no single value"),
    ],
)
def test_what_no_run_can_have_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(SoftSgxError) as refused:
        Threshold.parse(text)
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)
