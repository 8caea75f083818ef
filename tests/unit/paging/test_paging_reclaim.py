"""Batches of reclaim, seen from the owner: which calls it gets, in which order, and refusals.

Owners are fakes that write down each call.
"""

from __future__ import annotations

import pytest
from tests.support.owners import FakeOwner, listed

from softsgx.paging import Clock, Counters, Fifo, Lru, Policy, SgxEpcPage
from softsgx.paging.reclaim import Batch, Pressure, Reclaimer
from softsgx.runtime import InlineRuntime

EPC_PAGES = 1 << 16


class Scene:
    def __init__(self, policy: Policy | None = None, *, ignore_poison: bool = False) -> None:
        runtime = InlineRuntime()
        self.lru = Lru(runtime)
        self.freed: list[SgxEpcPage] = []
        self.counters = Counters()
        self.reclaimer = Reclaimer(
            policy or Policy(),
            EPC_PAGES,
            runtime,
            free=self.freed.append,
            counters=self.counters,
            tracer=None,
            ignore_poison=ignore_poison,
        )

    def order(self) -> list[str]:
        return [page.owner.name for page in self.lru if isinstance(page.owner, FakeOwner)]


def test_an_owner_is_asked_in_the_order_of_the_contract() -> None:
    scene = Scene()
    log: list[str] = []
    (page,) = listed(scene.lru, FakeOwner("", log))
    assert scene.reclaimer.batch(scene.lru) == Batch(1, 1)
    assert log == ["get", "age", "prepare", "block", "write", "put"]
    assert scene.freed == [page] and not page.tracked


def test_every_page_is_blocked_before_any_is_written() -> None:
    scene = Scene()
    log: list[str] = []
    listed(scene.lru, *(FakeOwner(name, log) for name in "abc"))
    scene.reclaimer.batch(scene.lru)
    blocks = [at for at, call in enumerate(log) if call.endswith("block")]
    writes = [at for at, call in enumerate(log) if call.endswith("write")]
    assert max(blocks) < min(writes)


def test_every_page_is_pinned_before_any_is_looked_at() -> None:
    scene = Scene()
    log: list[str] = []
    listed(scene.lru, *(FakeOwner(name, log) for name in "ab"))
    scene.reclaimer.batch(scene.lru)
    assert log[:4] == ["a.get", "b.get", "a.age", "a.prepare"]


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        ({"young": 1}, ["get", "age", "put"]),
        ({"prepares": False}, ["get", "age", "prepare", "put"]),
        ({"blocks": False}, ["get", "age", "prepare", "block", "put"]),
        ({"writes": False}, ["get", "age", "prepare", "block", "write", "put"]),
    ],
)
def test_a_page_that_stays_goes_to_the_tail_and_its_owner_is_unpinned(
    change: dict[str, int], calls: list[str]
) -> None:
    scene = Scene()
    stays = FakeOwner("stays", **change)  # type: ignore[arg-type]
    young = FakeOwner("young", young=1)
    pages = listed(scene.lru, stays, young)
    assert scene.reclaimer.batch(scene.lru) == Batch(2, 0)
    assert stays.log == [f"stays.{call}" for call in calls]
    assert set(scene.order()) == {"stays", "young"}
    assert all(page.tracked and page.lru is scene.lru for page in pages)
    assert stays.pins == young.pins == 0 and not scene.freed


def test_young_pages_go_round_in_order() -> None:
    scene = Scene(Policy(scan_pages=2, batch_pages=2))
    listed(scene.lru, *(FakeOwner(name, young=1) for name in "abcd"))
    scene.reclaimer.batch(scene.lru)
    assert scene.order() == ["c", "d", "a", "b"]


def test_the_page_of_a_dying_owner_is_forgotten_and_never_touched() -> None:
    scene = Scene()
    owner = FakeOwner("", dying=True)
    (page,) = listed(scene.lru, owner)
    assert scene.reclaimer.batch(scene.lru) == Batch(1, 0)
    assert owner.log == ["get"]
    assert not page.tracked and page not in scene.lru and not scene.freed
    assert scene.counters.dying == 1


def test_at_most_a_batch_is_looked_at() -> None:
    scene = Scene()
    listed(scene.lru, *(FakeOwner(str(number)) for number in range(20)))
    assert scene.reclaimer.batch(scene.lru) == Batch(16, 16)
    assert scene.order() == ["16", "17", "18", "19"]


def test_a_forced_batch_reads_no_accessed_bits() -> None:
    scene = Scene()
    owner = FakeOwner("", young=100)
    listed(scene.lru, owner)
    assert scene.reclaimer.batch(scene.lru, force=True) == Batch(1, 1)
    assert "age" not in owner.log


def test_fifo_reads_no_accessed_bits() -> None:
    scene = Scene(Fifo())
    owner = FakeOwner("", young=100)
    listed(scene.lru, owner)
    assert scene.reclaimer.batch(scene.lru).freed == 1
    assert "age" not in owner.log


def test_the_clocks_hand_goes_on_until_the_batch_is_full() -> None:
    scene = Scene(Clock(batch_pages=2))
    young = [FakeOwner(f"y{number}", young=1) for number in range(30)]
    listed(scene.lru, *young, FakeOwner("a"), FakeOwner("b"), FakeOwner("c"))
    assert scene.reclaimer.batch(scene.lru) == Batch(32, 2)
    assert scene.order() == ["c", *(owner.name for owner in young)]


def test_the_clocks_hand_stops_after_one_round() -> None:
    scene = Scene(Clock())
    listed(scene.lru, *(FakeOwner(str(number), young=5) for number in range(30)))
    assert scene.reclaimer.batch(scene.lru) == Batch(30, 0)


def test_a_poisoned_page_in_a_batch_is_not_prepared_and_leaves_the_list() -> None:
    scene = Scene()
    owner = FakeOwner("")
    (page,) = listed(scene.lru, owner)
    page.poisoned = True
    assert scene.reclaimer.batch(scene.lru).freed == 0
    assert owner.log == ["get", "put"]
    assert not page.tracked and page not in scene.lru


def test_defect_l6_evicts_a_poisoned_page_of_a_batch() -> None:
    scene = Scene(ignore_poison=True)
    owner = FakeOwner("")
    (page,) = listed(scene.lru, owner)
    page.poisoned = True
    scene.reclaimer.batch(scene.lru)
    assert "write" in owner.log


def test_a_small_epc_is_emptied_a_page_at_a_time() -> None:
    policy = Policy()
    assert [policy.batch(pages) for pages in (12, 64, 256, 1 << 20)] == [1, 4, 16, 16]
    assert (policy.low(12), policy.high(12)) == (1, 2)
    assert (policy.low(512), policy.high(512)) == (32, 64)
    assert (policy.low(1 << 20), policy.high(1 << 20)) == (32, 64)


def test_pressure_forces_after_fruitless_passes_and_ends_when_all_was_tried() -> None:
    pressure = Pressure(2)
    for _ in range(2):
        assert not pressure.force
        pressure.account(Batch(16, 0))
    assert pressure.force and not pressure.exhausted(32)
    pressure.account(Batch(16, 0))
    assert not pressure.exhausted(32)
    pressure.account(Batch(16, 0))
    assert pressure.exhausted(32)
    pressure.account(Batch(16, 1))
    assert not pressure.force and not pressure.exhausted(32)


def test_pressure_without_patience_never_forces() -> None:
    pressure = Pressure(None)
    for _ in range(1000):
        pressure.account(Batch(16, 0))
    assert not pressure.force and not pressure.exhausted(1)
