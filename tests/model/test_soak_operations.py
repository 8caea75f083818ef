"""The soak of operations counts what it does, plays a seed again, and reduces what fails."""

from __future__ import annotations

import re

import pytest
from tests.model import test_random_programs as programs
from tests.soak import operations
from tests.soak.operations import HISTORIES, Tally, play

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", HISTORIES)
def test_a_history_does_operations_and_is_the_same_for_a_seed(name: str) -> None:
    tallies = [Tally(), Tally()]
    for tally in tallies:
        play(name, 6, tally)
    assert tallies[0]["operations"] > 300
    assert tallies[0]["leaf calls"] > 200
    if "threads" not in name and name != "core at once":  # threads are scheduled by others
        assert tallies[0] == tallies[1]


def test_a_fault_is_reduced_to_the_steps_that_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = programs.World.do

    def planted(self: programs.World, kind: str, number: int, value: int) -> None:
        honest(self, kind, number, value)
        assert kind != "remap", "planted"

    monkeypatch.setattr(programs.World, "do", planted)
    with pytest.raises(AssertionError, match="planted") as found:
        operations.run(0, 17 * 100)
    assert len(re.findall(r"\('remap', \d+, \d+\)", str(found.value))) == 1
    assert "--history 'world' --seed 1700" in str(found.value)
