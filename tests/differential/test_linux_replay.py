"""The compiled replay of Linux's policy does what the EPC core does, page by page.

Random enclaves, groups, limits and policies: counts, resident pages and the order of each LRU list
are equal after each part of a history.  The readable replay through the core is compared with a
platform, whose driver, leaves and encryption are real.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.accesses import scene_of
from tests.support.going import with_ends

from softsgx.arch import PAGE_BYTES, Attributes, AttributesFlags, Secs
from softsgx.driver import FaultResult
from softsgx.host import Platform
from softsgx.image import SECINFO_RW, Blob, SignOptions, sign_plan, throwaway_key
from softsgx.paging import EpcCore, Fifo, LinuxPolicy, Prefetching
from softsgx.plan.core_replay import CoreReplay
from softsgx.plan.linux_replay import LinuxReplay
from softsgx.plan.scene import ENDS, GOES, LINUX, Epc
from softsgx.runtime import InlineRuntime

_BASE, _READ = 0x7000_0000_0000, 1
_PATHS = ("/", "/a", "/b", "/a/x", "/c")
_POLICIES = (
    LINUX,
    LINUX,
    LinuxPolicy(evict_va=False, batch_pages=4, scan_pages=64),
    LinuxPolicy(evict_va=False, batch_pages=1, scan_pages=1, low_pages=1, high_pages=2),
    Fifo(evict_va=False),
    Prefetching(evict_va=False),
    Prefetching(evict_va=False, window_pages=40, low_pages=1, high_pages=2),
)


def run_both(readable: CoreReplay, compiled: LinuxReplay, parts: list[NDArray[np.uint32]]) -> None:
    """Replay parts of a trace by both; they agree after each."""
    for part in parts:
        readable.run(part.tolist())
        compiled.run(part)
        assert readable.counts() == compiled.counts()
        assert (readable.resident() == compiled.resident()).all()
        assert readable.order() == compiled.order()


@pytest.mark.parametrize("seed", range(60))
def test_both_replays_do_the_same(seed: int) -> None:
    chance = random.Random(seed)
    count = chance.randint(1, 4)
    sizes = [chance.choice((1, 5, 30, 100, 300, 600, 1500)) for _ in range(count)]
    groups = [chance.choice(_PATHS) for _ in range(count)]
    scene = scene_of(chance, sizes, groups, chance.choice((200, 2000)))
    limits = {
        path: chance.choice((25, 40, 100, 129, 200, 400))
        for path in ("/a", "/b", "/a/x")
        if chance.random() < 0.5
    }
    pages = chance.choice((6, 10, 25, 30, 64, 128, 300, 1000, 3000))
    epc = Epc(pages, limits, chance.choice(_POLICIES))
    readable, compiled = CoreReplay(scene, epc), LinuxReplay(scene, epc)
    (accesses,) = scene.parts
    run_both(readable, compiled, np.array_split(accesses, 4))
    if readable.possible:
        readable.core.check_invariants()
    readable.close()


@pytest.mark.parametrize("seed", range(40))
def test_both_replays_do_the_same_where_pages_go_and_enclaves_end(seed: int) -> None:
    chance = random.Random(seed)
    count = chance.randint(1, 4)
    sizes = [chance.choice((1, 5, 30, 100, 600, 1500)) for _ in range(count)]
    groups = [chance.choice(_PATHS) for _ in range(count)]
    scene = scene_of(chance, sizes, groups, chance.choice((200, 2000)))
    limits = {path: chance.choice((25, 40, 129, 400)) for path in ("/a", "/b") if seed % 3 == 0}
    epc = Epc(chance.choice((10, 25, 64, 128, 300, 1000)), limits, chance.choice(_POLICIES))
    records = with_ends(chance, scene, chance.choice((0.02, 0.2, 0.6)), chance.choice((0, 0.01)))
    readable, compiled = CoreReplay(scene, epc), LinuxReplay(scene, epc)
    run_both(readable, compiled, np.array_split(records, 7))
    if readable.possible:
        readable.core.check_invariants()
        assert readable.counts().accesses == int((records < GOES).sum())
    readable.close()


def test_an_enclave_that_has_ended_leaves_no_page_in_the_epc() -> None:
    scene = scene_of(random.Random(1), [700, 40], ["/", "/"], 10)
    for replay in (CoreReplay(scene, Epc(2000)), LinuxReplay(scene, Epc(2000))):
        every = np.arange(740, dtype=np.uint32)
        replay.run(every)
        peak = replay.counts().peaks[0]
        assert peak == 740 + 2 + 3, "two SECS, and VA pages for 701 and 41 slots"
        gone = np.concatenate((every[:700] | GOES, np.array([GOES | ENDS]))).astype(np.uint32)
        replay.run(gone)
        replay.run(every[:700])
        assert replay.counts().peaks[0] == peak, "what the enclave had was free again"
        assert replay.counts().made == 740 + 700
        assert replay.counts().evictions == 0
        replay.close()


def _evict_all(core: EpcCore) -> None:
    while core.root.has_reclaimable():
        core.reclaim(force=True)


class _Enclave:
    """An enclave of a platform whose pages are accessed through its page tables."""

    def __init__(self, platform: Platform, runtime: InlineRuntime, pages: int) -> None:
        flags = AttributesFlags.MODE64BIT | AttributesFlags.DEBUG
        plan = Blob().heap(pages).plan()
        attributes = Attributes(flags=flags, xfrm=3)
        secs = Secs(size=plan.size, base=_BASE, ssa_frame_size=1, attributes=attributes)
        self._runtime, self._process = runtime, platform.process()
        fd = self._process.open()
        self._process.create(fd, secs.pack())
        self._process.add_pages(fd, 0, bytes(pages * PAGE_BYTES), SECINFO_RW, measure=False)
        options = SignOptions(attributes=flags.value)
        self._process.init(fd, sign_plan(plan, throwaway_key(), options).pack())
        self._process.mmap(fd, _BASE, plan.size, 3)
        self.pages = self._process.enclave_file(fd).enclave.pages

    def close(self) -> None:
        self._process.exit()

    def access(self, index: int) -> None:
        """Read a page; ksgxd runs after a fault."""
        addr, mm, ptes = _BASE + index * PAGE_BYTES, self._process.mm, self._process.ptes
        faults = ptes.entry(addr) is None
        while ptes.entry(addr) is None:
            assert mm.fault(addr, _READ, self._process) is not FaultResult.SIGBUS
        ptes.translate(addr, _READ, user=True)
        if faults:
            self._runtime.run_pending()


@pytest.mark.parametrize(("epc_pages", "pages"), [(128, 300), (200, 700), (1100, 1400)])
def test_the_readable_replay_keeps_the_pages_that_a_platform_keeps(
    epc_pages: int, pages: int
) -> None:
    chance = random.Random(epc_pages)
    scene = scene_of(chance, [pages], ["/"], 1500)
    replay = CoreReplay(scene, Epc(epc_pages))
    replay.run(range(pages))
    runtime = InlineRuntime()
    with Platform(epc=epc_pages * PAGE_BYTES, policy=LINUX, runtime=runtime) as platform:
        enclave = _Enclave(platform, runtime, pages)
        for core in (replay.core, platform.core):
            _evict_all(core)
        (accesses,) = scene.parts
        for page in accesses.tolist():
            replay.run([page])
            enclave.access(page)
            resident = [entry.epc is not None for entry in enclave.pages.values()]
            assert resident == replay.resident().tolist()
        assert replay.core.free_pages == platform.core.free_pages
        enclave.close()
    replay.close()
