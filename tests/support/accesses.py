"""Made-up accesses of enclaves that run side by side."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from softsgx.accesses import VERSION, Chunk, Trace, TracedEnclave, TraceInfo
from softsgx.plan.scene import Scene, SceneEnclave

__all__ = ["hot_and_cold", "scene_of", "trace_of"]


def scene_of(
    chance: random.Random, sizes: Sequence[int], groups: Sequence[str], accesses: int
) -> Scene:
    """Return accesses to enclaves of given pages; four fifths go to a part of each."""
    enclaves: list[SceneEnclave] = []
    for at, (pages, group) in enumerate(zip(sizes, groups, strict=True)):
        first = enclaves[-1].first + enclaves[-1].pages if enclaves else 0
        enclaves.append(SceneEnclave(0, f"enclave {at}", first, pages, group))
    hot = chance.choice((0.05, 0.3, 0.9))
    pages_used = []
    for _ in range(accesses):
        enclave = chance.choice(enclaves)
        part = max(1, int(enclave.pages * hot)) if chance.random() < 0.8 else enclave.pages
        pages_used.append(enclave.first + chance.randrange(part))
    return Scene(tuple(enclaves), [np.array(pages_used, np.uint32)])


def hot_and_cold(seed: int, pages: int, accesses: int) -> list[int]:
    """Return page numbers: each page once, then nine tenths of the accesses to a quarter."""
    chance = random.Random(seed)
    used = list(range(pages))
    while len(used) < accesses:
        used.append(chance.randrange(pages // 4 if chance.random() < 0.9 else pages))
    return used


def trace_of(
    used: Sequence[int],
    *,
    seconds: float = 1.0,
    timed: bool = True,
    interval_ns: int = 0,
    complete: bool = True,
    user_ns: int = 0,
) -> Trace:
    """Return a trace of one enclave, whose accesses are evenly spread over a time."""
    info = TraceInfo(
        version=VERSION,
        precision="intervals" if interval_ns else "accesses",
        interval_ns=interval_ns,
        epc_pages=0,
        program="./app",
        page_bytes=4096,
        timed=timed,
        enclaves=(TracedEnclave(0, "app.sgxs", max(used, default=0) + 1, 1),),
        complete=complete,
        user_ns=user_ns,
    )
    count = len(used)
    times = np.linspace(0, seconds * 1e9, count).astype(np.uint64)
    return Trace(
        info,
        Chunk(
            np.zeros(count, np.uint16),
            np.array(used, np.uint32),
            np.zeros(count, np.uint8),
            times if timed else np.arange(count, dtype=np.uint64),
        ),
    )
