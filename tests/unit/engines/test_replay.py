"""A replay begins with an empty EPC and ends with every page right, with any policy."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from softsgx import Platform
from softsgx.accesses import Trace
from softsgx.engines.replay import Replay
from softsgx.paging import Policy

PAGES = 150


@dataclass(frozen=True)
class SmallBatches(Policy):
    """One VA page is all that can leave at the end, and it has no slot to go to."""

    batch_pages: int = 4
    scan_pages: int = 64


@pytest.mark.parametrize("policy", [SmallBatches(), "linux", "clock", "lru", "fifo"])
def test_a_replay_begins_though_a_va_page_cannot_leave(policy: Policy | str) -> None:
    accesses = [(page * 7 % PAGES, page % 3 == 0) for page in range(600)]
    with Platform(epc="256KiB", policy=policy) as platform:
        replay = Replay(platform, PAGES)
        result = replay.run(Trace.of(accesses))
        replay.close()
        platform.check()
    assert result.misses >= PAGES
