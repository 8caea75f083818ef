"""The tour lists what the machine reported, in the order of the eviction protocol."""

from __future__ import annotations

import json

import pytest

from softsgx.cli import main
from softsgx.sim import paging_tour


def steps(title: str) -> list[tuple[str, str]]:
    (chapter,) = (c for c in paging_tour() if c.title.startswith(title))
    return [(line.what, line.result) for line in chapter.lines]


def test_eviction_needs_block_then_track_then_an_exit() -> None:
    refused = steps("EWB refuses")
    assert [result for what, result in refused if what == "EWB"] == [
        "SGX_PAGE_NOT_BLOCKED",
        "SGX_NOT_TRACKED",
        "SGX_NOT_TRACKED",
    ]
    left = [step[0] for step in steps("An interrupt makes")]
    assert left[:2] == ["AEX", "EWB"]


def test_the_same_seed_gives_the_same_tour() -> None:
    assert paging_tour(3) == paging_tour(3)
    assert paging_tour(3) != paging_tour(4)


def test_the_tour_prints_every_chapter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tour"]) == 0
    printed = capsys.readouterr().out
    assert all(chapter.title in printed for chapter in paging_tour())
    assert "protects nothing" in printed


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tour", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["chapters"]) == len(paging_tour())
