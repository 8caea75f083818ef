"""What soaks have done adds up over runs, and nothing that failed is lost."""

from __future__ import annotations

from pathlib import Path

from tests.soak import record


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
