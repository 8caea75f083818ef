"""Races in rounds on one state, as ``softsgx explore`` runs them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from softsgx.runtime import (
    Deadlock,
    Lock,
    Replay,
    SeededRuntime,
    Stretches,
    Systematic,
    Uniform,
    Uninterrupted,
)


def _two(runtime: SeededRuntime, log: list[str]) -> dict[str, Callable[[], None]]:
    lock = runtime.lock("l")

    def run(name: str) -> None:
        for _ in range(3):
            with lock:
                log.append(f"{name} {runtime.random.random()}")

    return {name: (lambda name=name: run(name)) for name in ("a", "b")}  # type: ignore[misc]


def test_a_round_depends_on_its_seed_and_not_on_earlier_rounds() -> None:
    runtime, log = SeededRuntime(0), list[str]()
    runs = _two(runtime, log)
    rounds = []
    for seed in (5, 6, 7, 5):
        runtime.restart(seed, Uniform())
        log.clear()
        runtime.race(runs)
        rounds.append((runtime.schedule, tuple(log)))
    assert rounds[0] == rounds[3]
    assert rounds[0] != rounds[1]
    runtime.close()


def test_a_race_is_replayed_on_another_runtime() -> None:
    runtime = SeededRuntime(0)
    runtime.restart(9, Uniform())
    runtime.race(_two(runtime, []))
    schedule = runtime.schedule
    other = SeededRuntime(9, policy=Replay(schedule))
    other.race(_two(other, []))
    assert other.schedule == schedule
    other.close()  # the policy says that every step has happened


def test_quiet_code_is_no_part_of_the_schedule() -> None:
    runtime = SeededRuntime(0)
    lock = runtime.lock("l")
    with runtime.quiet(), lock:
        runtime.point("setup")
    assert not len(runtime.schedule)
    runtime.race({"a": lambda: runtime.point("here")})
    assert runtime.schedule.steps == (("main", "race"), ("a", "here"), ("a", "end"))


def test_a_quiet_wait_lets_other_tasks_run() -> None:
    runtime, done = SeededRuntime(0), list[str]()
    with runtime.quiet():
        runtime.spawn(lambda: done.append("other"), "other").join()
    assert done == ["other"]


def test_the_first_error_ends_a_race() -> None:
    runtime, log = SeededRuntime(0, policy=Uninterrupted()), list[str]()

    def fail() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"), runtime:
        runtime.race({"a": fail, "b": lambda: log.append("b ran")})
    assert not log


def test_tasks_that_wait_for_each_other_are_a_deadlock_of_the_race() -> None:
    def nest(outer: Lock, inner: Lock) -> Callable[[], None]:
        def run() -> None:
            with outer, inner:
                pass

        return run

    found = 0
    for seed in range(20):
        runtime = SeededRuntime(seed)
        one, two = runtime.lock("one"), runtime.lock("two")
        try:
            with runtime:
                runtime.race({"a": nest(one, two), "b": nest(two, one)})
        except Deadlock:
            found += 1
    assert found


def test_a_watch_sees_every_place_and_may_end_the_race() -> None:
    runtime, seen = SeededRuntime(0), list[int]()

    def watch() -> None:
        seen.append(1)
        assert len(seen) < 4, "seen enough"

    def pass_points() -> None:
        for _ in range(9):
            runtime.point("p")

    with pytest.raises(AssertionError, match="seen enough"), runtime:
        runtime.race({"a": pass_points}, watch=watch)
    assert len(runtime.schedule) == 4


def test_parts_of_a_search_find_together_what_one_search_finds() -> None:
    def schedules(part: tuple[int, int], bound: int | None) -> set[object]:
        found: set[object] = set()
        search = Systematic(bound, part=part)
        while (policy := search.next()) is not None:
            runtime = SeededRuntime(0)
            runtime.restart(0, policy)
            runtime.race(
                {"a": lambda r=runtime: r.point("x"), "b": lambda r=runtime: r.point("y")}  # type: ignore[misc]
            )
            found.add(runtime.schedule)
            search.ran(runtime.policy)
            runtime.close()
        return found

    for bound in (None, 0, 1):
        whole = schedules((0, 1), bound)
        parts = [schedules((number, 3), bound) for number in range(3)]
        assert set.union(*parts) == whole
    assert len(schedules((0, 1), None)) == 6  # two steps each: 4 over 2


def test_stretches_of_a_schedule_repeat_it() -> None:
    runtime = SeededRuntime(0)
    runtime.restart(3, Uniform())
    runtime.race(_two(runtime, []))
    other = SeededRuntime(0)
    other.restart(3, Stretches(runtime.schedule.stretches()))
    other.race(_two(other, []))
    assert other.schedule == runtime.schedule


def test_a_race_in_quiet_code_is_scheduled() -> None:
    runtime = SeededRuntime(0)
    with runtime.quiet():
        runtime.point("before")
        runtime.race({"a": lambda: runtime.point("here")})
        runtime.point("after")
        runtime.race({"b": lambda: None})
    assert [step for step in runtime.schedule if step[0] != "main"] == [
        ("a", "here"),
        ("a", "end"),
        ("b", "end"),
    ]
