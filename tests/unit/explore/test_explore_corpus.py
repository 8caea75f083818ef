"""The corpus: a known defect is found by its scenario, and only when it is switched on."""

from __future__ import annotations

import pytest

from softsgx.defects import Defect
from softsgx.explore.corpus import HUNTED_IN, hunt

EXPRESSIBLE = [defect.value for defect in Defect if defect.can_be_switched_on]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_a_known_defect_is_found_and_only_when_it_is_on(name: str) -> None:
    result = hunt(name)
    assert result.finding is not None, f"{name}: nothing in {result.runs} schedules"
    assert result.finding.repeats
    assert not result.without, result.without[0].text
    assert result.seconds < 60


def test_only_defects_that_can_be_switched_on_are_hunted() -> None:
    assert set(HUNTED_IN) <= set(EXPRESSIBLE)
