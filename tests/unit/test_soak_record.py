"""The records of soaks add up over runs, and no failure is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.soak import Found, record, repeat


def test_runs_add_up_by_kind_and_commit(tmp_path: Path) -> None:
    file = str(tmp_path / "soak")
    for kind, seed, commit, done in (
        ("parsers", 1000, "a", {"inputs": 5}),
        ("parsers", 2000, "b", {"inputs": 7}),
        ("lifetimes", 3000, "b", {"lives": 2}),
    ):
        record.write(file, record.slice_done(kind, seed, commit, done))
    record.write(file, record.slice_done("parsers", 4000, "b", {}, "status 1: it broke"))
    totals = record.totals(record.read(file))
    assert totals["done"] == {"inputs": 12, "lives": 2}
    assert totals["by_commit"] == {"a": {"inputs": 5}, "b": {"inputs": 7, "lives": 2}}
    assert totals["seeds"] == {"parsers": [1000, 4000, 3], "lifetimes": [3000, 3000, 1]}
    assert totals["failed"] == ["parsers 4000"]


def test_a_history_that_fails_is_named_by_its_own_seed_and_what_was_done_before_counts() -> None:
    def history(seed: int) -> dict[str, int]:
        assert seed < 12, "it broke"
        return {"steps": 5}

    with pytest.raises(Found, match="it broke") as found:
        repeat(60, 10, history)
    assert (found.value.seed, found.value.done) == (12, {"steps": 10})


def test_one_history_runs_however_short_the_time() -> None:
    assert repeat(0, 7, lambda seed: {"seeds": seed}) == {"seeds": 7}
