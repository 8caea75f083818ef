"""Limits hold for all users of the EPC: groups on a running platform.

Method: processes in a tree of groups build enclaves larger than their limits and use them; they
must read what they wrote, and the groups' files must be correct at each step.
"""

from __future__ import annotations

import errno

import pytest
from tests.support.driver import Launched, launch, pattern

from softsgx.cgroup import VictimKilled, read_file, write_file
from softsgx.host import Platform
from softsgx.trace import Event
from softsgx.userland import Signal, SoftThread

PAGE = 4096


def write_all(enclave: Launched, thread: SoftThread, salt: int) -> None:
    for number in range(enclave.data_pages):
        thread.store(enclave.data(number), pattern(salt + number)[:64])


def assert_kept(enclave: Launched, thread: SoftThread, salt: int) -> None:
    for number in range(enclave.data_pages):
        assert thread.load(enclave.data(number), 64) == pattern(salt + number)[:64]


def limited(platform: Platform, path: str, pages: int) -> None:
    write_file(platform.cgroups.find(path), "misc.max", f"sgx_epc {pages * PAGE}")


def test_a_limit_at_the_grandparent_holds_for_two_leaves_together_and_shares_evenly() -> None:
    with Platform(epc="2MiB", processors=2, groups={"top": {"max": "320KiB"}}) as platform:
        used = []
        for number, path in enumerate(("top/mid/a", "top/mid/b")):
            enclave = launch(platform.process(group=path), 60)
            thread = enclave.thread(number, tcs=0)
            write_all(enclave, thread, number * 1000)
            used.append((enclave, thread, number * 1000))
        top = platform.cgroups.find("top")
        for _round in range(3):
            for number in range(60):  # in turn, so that both ask for as much
                for enclave, thread, salt in used:
                    assert thread.load(enclave.data(number), 64) == pattern(salt + number)[:64]
                    assert top.usage_pages <= 80
        shares = [platform.cgroups.find(f"top/mid/{name}").usage_pages for name in "ab"]
        assert max(shares) - min(shares) <= 16, f"one sibling was starved: {shares}"
        assert top.events_local > 0 == platform.cgroups.find("top/mid/a").events_local
        platform.check()


def test_other_groups_lose_nothing_to_one_that_is_at_its_limit() -> None:
    groups = {"small": {"max": "160KiB"}}
    with Platform(epc="2MiB", processors=2, groups=groups) as platform:
        calm = launch(platform.process(group="calm"), 50)
        calm_thread = calm.thread(0, tcs=0)
        write_all(calm, calm_thread, 0)
        before = platform.cgroups.find("calm").usage_pages
        busy = launch(platform.process(group="small"), 100)
        thread = busy.thread(1, tcs=0)
        write_all(busy, thread, 500)
        assert_kept(busy, thread, 500)
        assert platform.cgroups.find("calm").usage_pages == before
        assert platform.cgroups.find("small").usage_pages <= 40
        assert read_file(platform.cgroups.find("small"), "misc.peak") == f"sgx_epc {40 * PAGE}\n"


def test_a_limit_lowered_live_is_met_by_the_next_charges_and_nothing_is_lost() -> None:
    with Platform(epc="2MiB", groups={"jobs": {}}) as platform:
        enclave = launch(platform.process(group="jobs"), 100)
        thread = enclave.thread()
        write_all(enclave, thread, 7)
        jobs = platform.cgroups.find("jobs")
        assert jobs.usage_pages > 100
        limited(platform, "jobs", 30)
        for _round in range(3):
            assert_kept(enclave, thread, 7)
        # Pages in use are not taken away; what faults in again has to fit.
        jobs_core = platform.core
        jobs_core.reclaim(jobs, force=True)
        for _round in range(20):
            jobs_core.reclaim(jobs, force=True)
        assert_kept(enclave, thread, 7)
        assert jobs.usage_pages <= 30
        platform.check()


def test_pages_stay_charged_to_the_group_they_came_from_until_they_come_back() -> None:
    with Platform(epc="2MiB", groups={"from": {}, "to": {}}) as platform:
        process = platform.process(group="from")
        enclave = launch(process, 20)
        thread = enclave.thread()
        write_all(enclave, thread, 3)
        source, target = platform.cgroups.find("from"), platform.cgroups.find("to")
        charged = source.usage_pages
        process.group = target
        assert_kept(enclave, thread, 3)
        assert (source.usage_pages, target.usage_pages) == (charged, 0)
        for _round in range(20):
            platform.core.reclaim(source, force=True)
        assert_kept(enclave, thread, 3)
        assert target.usage_pages >= 20
        platform.check()


def test_a_group_without_room_for_one_enclave_refuses_it_with_enomem() -> None:
    with Platform(epc="2MiB") as platform:
        platform.cgroups.make("tiny").max_pages = 1
        process = platform.process(group="tiny")
        with pytest.raises(OSError, match=r".") as refused:
            launch(process, 4)
        assert refused.value.errno == errno.ENOMEM
        process.exit()
        assert platform.cgroups.root.usage_pages == 0


def test_a_page_that_never_fits_is_refused_once_before_and_once_after_reclaim() -> None:
    with Platform(epc="2MiB") as platform:
        platform.cgroups.make("tiny").max_pages = 1
        with pytest.raises(OSError, match=r"."):
            launch(platform.process(group="tiny"), 4)
        tiny = platform.cgroups.find("tiny")
        assert (tiny.events_local, tiny.events) == (2, 2)


def test_a_group_far_smaller_than_its_enclave_is_enough_since_secs_and_va_can_leave() -> None:
    with Platform(epc="2MiB", groups={"tight": {"max": "100KiB"}}) as platform:
        enclave = launch(platform.process(group="tight"), 200)
        thread = enclave.thread()
        write_all(enclave, thread, 11)
        assert_kept(enclave, thread, 11)
        assert platform.cgroups.find("tight").peak_pages <= 25


def test_as_a_last_resort_the_largest_enclave_of_the_group_dies_and_is_named() -> None:
    heard: list[Event] = []
    # Nothing can be written back, so nothing can leave but by force.
    platform = Platform(
        epc="2MiB",
        processors=2,
        backing_limit=0,
        kill=True,
        tracer=heard.append,
    )
    platform.cgroups.make("jobs").max_pages = 24
    with platform:
        bystander = launch(platform.process(group="other"), 30)
        witness = bystander.thread(1, tcs=0)
        write_all(bystander, witness, 5)
        small = launch(platform.process(group="jobs"), 1)
        victim = launch(platform.process(group="jobs"), 9)
        thread = victim.thread()
        write_all(victim, thread, 1)
        newcomer = launch(platform.process(group="jobs"), 8)
        killed = [event for event in heard if isinstance(event, VictimKilled)]
        assert [(event.group, event.victim) for event in killed] == [
            ("/jobs", repr(victim.enclave))
        ]
        with pytest.raises(Signal):
            thread.load(victim.data(0), 8)
        thread.abandon()
        assert not small.enclave.dead
        assert not newcomer.enclave.dead
        assert_kept(bystander, witness, 5)


def test_the_core_keeps_its_accounts_while_the_driver_is_unloaded() -> None:
    with Platform(epc="1MiB", groups={"jobs": {"max": "128KiB"}}) as platform:
        process = platform.process(group="jobs")
        enclave = launch(process, 50)
        with pytest.raises(OSError, match="in use"):
            platform.unload("driver")
        enclave.thread().exit()
        process.exit()
        platform.unload("driver")
        assert platform.cgroups.root.usage_pages == sum(platform.core.counters.held.values())
        platform.load("driver")
        again = launch(platform.process(group="jobs"), 50)
        thread = again.thread()
        write_all(again, thread, 9)
        assert_kept(again, thread, 9)
        platform.check()
