"""The seeded runtime: schedules are functions of their seed, can be replayed, steered and searched.

Method: programs with a known bug that needs a known interleaving.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest

from softsgx.runtime import (
    Deadlock,
    ExplorationFailed,
    Livelock,
    Pct,
    Policy,
    ReplayDiverged,
    Schedule,
    Script,
    ScriptNotFollowed,
    SeededRuntime,
    Uniform,
    Uninterrupted,
    explore,
    explore_all,
    minimise,
)


def counting(runtime: SeededRuntime, *, locked: bool, idle: int = 10) -> Callable[[], None]:
    """Two tasks add 1 to a counter, among other things; without the lock one may be lost."""
    lock = runtime.lock("counter")

    def main() -> None:
        counter = 0

        def add() -> None:
            nonlocal counter
            for _ in range(idle):
                runtime.point("before")
            if locked:
                lock.acquire()
            value = counter
            runtime.point("between")
            counter = value + 1
            if locked:
                lock.release()
            for _ in range(idle):
                runtime.point("after")

        for task in [runtime.spawn(add, "add") for _ in range(2)]:
            task.join()
        assert counter == 2, f"lost update: {counter}"

    return main


def lossy(runtime: SeededRuntime) -> Callable[[], None]:
    """The counter without its lock."""
    return counting(runtime, locked=False)


def sound(runtime: SeededRuntime) -> Callable[[], None]:
    """The counter with its lock."""
    return counting(runtime, locked=True)


def failing_run(policy: Policy, seeds: range = range(200)) -> SeededRuntime:
    """Return a runtime on which ``lossy`` has failed."""
    for seed in seeds:
        runtime = SeededRuntime(seed, policy=policy)
        try:
            runtime.run(lossy(runtime))
        except AssertionError:
            return runtime
    raise LookupError("no seed fails")


POLICIES = [Uniform(), Pct(3, 60), Uninterrupted()]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_the_same_seed_gives_the_same_schedule(policy: Policy) -> None:
    texts = []
    for _ in range(2):
        runtime = SeededRuntime(5, policy=policy)
        runtime.run(sound(runtime))
        texts.append(runtime.schedule.text())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("policy", POLICIES[:2], ids=repr)
def test_other_seeds_give_other_schedules(policy: Policy) -> None:
    assert explore(sound, range(20), policy=policy).distinct > 10


def test_the_schedule_does_not_depend_on_the_hash_seed_of_the_process() -> None:
    code = (
        "from softsgx.runtime import SeededRuntime\n"
        "r = SeededRuntime(3)\n"
        "def main():\n"
        "    locks = [r.lock(n) for n in 'abc']\n"
        "    def work():\n"
        "        for lock in locks:\n"
        "            with lock: r.yield_now()\n"
        "        r.sleep(r.random.randrange(9))\n"
        "    for task in [r.spawn(work, n) for n in ('x', 'y', 'z')]: task.join()\n"
        "r.run(main)\n"
        "print(r.schedule.text())\n"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(texts) == 1
    assert "acquire c" in texts.pop()


def test_a_failing_schedule_fails_again_when_replayed_from_its_text() -> None:
    failed = failing_run(Uniform())
    schedule = Schedule.parse(failed.schedule.text())
    assert schedule == failed.schedule
    again = SeededRuntime.replay(schedule)
    with pytest.raises(AssertionError, match="lost update"):
        again.run(lossy(again))
    assert again.schedule == schedule


def test_replaying_another_program_is_refused() -> None:
    runtime = SeededRuntime(0)
    runtime.run(sound(runtime))
    again = SeededRuntime.replay(runtime.schedule)
    with pytest.raises(ReplayDiverged, match="was recorded"):
        again.run(lossy(again))
    longer = Schedule(0, (*runtime.schedule, ("main", "more")))
    again = SeededRuntime.replay(longer)
    with pytest.raises(ReplayDiverged, match="the program ended after"):
        again.run(sound(again))


def test_a_schedule_whose_next_task_cannot_run_is_refused() -> None:
    runtime = SeededRuntime(0)
    runtime.run(sound(runtime))
    first, *_ = runtime.schedule
    again = SeededRuntime.replay(Schedule(0, (first, ("ghost", "end"))))
    with pytest.raises(ReplayDiverged, match="task 'ghost' cannot run after 'spawn add'"):
        again.run(sound(again))


def test_everything_a_task_does_about_other_tasks_is_a_place() -> None:
    runtime = SeededRuntime(0, policy=Uninterrupted())
    lock = runtime.lock("epc")
    condition = runtime.condition(lock)

    def reclaim() -> None:
        with lock:
            condition.notify_all()
        runtime.point("EWB")

    def main() -> None:
        task = runtime.spawn(reclaim, "reclaim")
        with lock:
            condition.wait()
        assert lock.try_acquire()
        lock.release()
        runtime.sleep(1)
        task.join()
        runtime.yield_now()

    runtime.run(main)
    assert runtime.schedule.steps == (
        ("main", "spawn reclaim"),
        ("main", "acquire epc"),
        ("main", "wait epc"),
        ("reclaim", "acquire epc"),
        ("reclaim", "notify epc"),
        ("reclaim", "release epc"),
        ("reclaim", "EWB"),
        ("reclaim", "end"),
        ("main", "release epc"),
        ("main", "try_acquire epc"),
        ("main", "release epc"),
        ("main", "sleep"),
        ("main", "join reclaim"),
        ("main", "yield"),
    )
    assert runtime.schedule.switches() == [("main", "wait epc"), ("reclaim", "end")]


def test_a_schedule_cut_short_is_replayed_as_far_as_it_goes() -> None:
    runtime = SeededRuntime(1)
    runtime.run(sound(runtime))
    cut = runtime.schedule[:10]
    again = SeededRuntime.replay(cut)
    again.run(sound(again))
    assert again.schedule[:10] == cut


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("", "line 1"), ("schedule of seed 1\nmain\tx\nnonsense\n", "line 3: 'nonsense'")],
)
def test_a_bad_schedule_text_is_refused_with_its_line(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Schedule.parse(text)


# Searching.


@pytest.mark.parametrize("policy", [None, partial(Pct, 2), partial(Pct, 3)])
def test_a_lost_update_is_found_within_few_seeds(
    policy: Callable[[int], Policy] | None,
) -> None:
    with pytest.raises(ExplorationFailed, match="lost update: 1") as caught:
        explore(partial(counting, locked=False, idle=3), range(100), policy=policy)
    assert isinstance(caught.value.error, AssertionError)
    assert caught.value.__cause__ is caught.value.error


def test_priorities_find_a_bug_of_depth_two_that_uniform_choice_misses() -> None:
    """One task must pass 40 places before another passes its first."""

    def program(runtime: SeededRuntime) -> Callable[[], None]:
        def main() -> None:
            log: list[str] = []

            def slow() -> None:
                for _ in range(40):
                    runtime.point("step")
                log.append("slow")

            def quick() -> None:
                runtime.point("step")
                log.append("quick")

            for task in [runtime.spawn(quick, "quick"), runtime.spawn(slow, "slow")]:
                task.join()
            assert log[0] == "quick", "slow was first"

        return main

    explore(program, range(50))
    with pytest.raises(ExplorationFailed, match="slow was first"):
        explore(program, range(50), policy=partial(Pct, 2))


def test_the_locked_counter_survives_every_search() -> None:
    explore(sound, range(50))
    explore(sound, range(50), policy=partial(Pct, 3))


def test_the_report_of_a_failure_repeats_it() -> None:
    with pytest.raises(ExplorationFailed) as caught:
        explore(
            lossy,
            range(100),
            policy=partial(Pct, 3),
            repeat="explore({program}, [{seed}], policy={policy})",
        )
    command = str(caught.value).splitlines()[-1].removeprefix("repeat: ")
    with pytest.raises(ExplorationFailed) as again:
        eval(command, {"explore": explore, "lossy": lossy, "Pct": Pct})
    assert str(again.value) == str(caught.value)
    replayed = SeededRuntime.replay(caught.value.schedule)
    with pytest.raises(AssertionError, match="lost update"):
        replayed.run(lossy(replayed))


def test_minimising_leaves_the_one_preemption_that_matters() -> None:
    failed = failing_run(Uniform())
    schedule = minimise(lossy, failed.schedule)
    switches = schedule.switches()
    assert len(failed.schedule.switches()) > 10
    # main waits; one task is stopped between reading and writing; the other ends; it goes on.
    assert len(switches) <= 5
    assert [where for task, where in switches if task != "main"].count("between") == 1
    again = SeededRuntime.replay(schedule)
    with pytest.raises(AssertionError, match="lost update"):
        again.run(lossy(again))


def test_a_schedule_that_does_not_fail_cannot_be_minimised() -> None:
    runtime = SeededRuntime(0)
    runtime.run(sound(runtime))
    with pytest.raises(AssertionError, match="does not make the program fail"):
        minimise(sound, runtime.schedule)


def test_all_schedules_of_two_tasks_with_two_places_are_tried() -> None:
    """Interleavings of aabb: 6; the bound cuts those that preempt more."""

    def program(logs: set[str], runtime: SeededRuntime) -> Callable[[], None]:
        def main() -> None:
            log: list[str] = []

            def work(letter: str) -> None:
                log.append(letter)
                runtime.point("half")
                log.append(letter)

            a = runtime.spawn(lambda: work("a"), "a")
            b = runtime.spawn(lambda: work("b"), "b")
            a.join()
            b.join()
            logs.add("".join(log))

        return main

    everything: set[str] = set()
    done = explore_all(partial(program, everything), preemptions=10)
    assert done.complete
    assert everything == {"aabb", "abab", "abba", "bbaa", "baba", "baab"}
    none: set[str] = set()
    explore_all(partial(program, none), preemptions=0)
    assert none == {"aabb", "bbaa"}


def test_exhaustive_search_finds_the_lost_update_and_clears_the_lock() -> None:
    few = partial(counting, idle=1)
    with pytest.raises(ExplorationFailed, match="lost update"):
        explore_all(partial(few, locked=False), preemptions=1)
    assert explore_all(partial(few, locked=True), preemptions=2).complete
    assert not explore_all(partial(few, locked=True), preemptions=2, max_runs=3).complete


# Steering.


def test_a_script_makes_its_scenario_happen() -> None:
    script = Script(("add", "between"), ("add#2", "end"))
    runtime = SeededRuntime(0, policy=script)
    with pytest.raises(AssertionError, match="lost update"):
        runtime.run(lossy(runtime))


def test_a_scripted_task_that_has_to_wait_is_an_error_unless_allowed() -> None:
    steps = (("add", "between"), ("add#2", "between"))
    runtime = SeededRuntime(0, policy=Script(*steps))
    with pytest.raises(ScriptNotFollowed, match="step 2: task 'add#2' cannot reach 'between'"):
        runtime.run(sound(runtime))
    runtime = SeededRuntime(0, policy=Script(*steps, strict=False))
    runtime.run(sound(runtime))


def test_a_script_that_the_program_does_not_reach_is_an_error() -> None:
    for step, state in [
        (("add", "nowhere"), "is at 'end'"),
        (("nobody", "between"), "was never spawned"),
    ]:
        runtime = SeededRuntime(0, policy=Script(step))
        with pytest.raises(ScriptNotFollowed, match=state):
            runtime.run(sound(runtime))


def test_a_script_matches_places_by_pattern_and_lets_sleepers_sleep() -> None:
    script = Script(("sleeper", "acquire *"), ("other", "end"))
    runtime = SeededRuntime(0, policy=script, point_ns=1)
    lock = runtime.lock("epc")
    log: list[str] = []

    def sleeper() -> None:
        runtime.sleep(10)
        log.append("awake")
        with lock:
            log.append("sleeper")

    def other() -> None:
        for _ in range(50):
            runtime.point("work")
        log.append("other")

    def main() -> None:
        for task in [runtime.spawn(sleeper, "sleeper"), runtime.spawn(other, "other")]:
            task.join()

    runtime.run(main)
    assert log == ["awake", "other", "sleeper"]


def test_a_task_the_script_has_stopped_stays_where_it_is() -> None:
    script = Script(("add", "between"), ("add#2", "between"), ("nobody", "x"))
    runtime = SeededRuntime(0, policy=script)
    with pytest.raises(ScriptNotFollowed, match="'nobody' cannot reach 'x': it was never spawned"):
        runtime.run(lossy(runtime))
    last = dict(runtime.schedule)
    assert last["add"] == last["add#2"] == "between"


# Time, limits.


def test_virtual_time_jumps_to_the_next_sleeper_when_no_task_can_run() -> None:
    runtime = SeededRuntime(0)
    log: list[tuple[int, str]] = []

    def sleeper(duration_ns: int) -> None:
        runtime.sleep(duration_ns)
        log.append((runtime.now_ns(), runtime.task_name()))

    def main() -> None:
        tasks = [runtime.spawn(partial(sleeper, ns), f"sleep{ns}") for ns in (30, 10, 20)]
        for _ in range(50):
            runtime.yield_now()
        assert runtime.now_ns() == 0, "time passed while somebody could run"
        for task in tasks:
            task.join()

    runtime.run(main)
    assert log == [(10, "sleep10"), (20, "sleep20"), (30, "sleep30")]


def test_with_a_price_per_place_sleepers_wake_while_others_run() -> None:
    runtime = SeededRuntime(0, point_ns=5)
    woken: list[int] = []

    def sleeper() -> None:
        runtime.sleep(100)
        woken.append(runtime.now_ns())

    def main() -> None:
        task = runtime.spawn(sleeper, "sleeper")
        while not woken:
            runtime.yield_now()
        task.join()

    runtime.run(main)
    assert woken[0] >= 100


def test_a_timeout_and_a_notification_exclude_each_other() -> None:
    def program(runtime: SeededRuntime) -> Callable[[], None]:
        lock = runtime.lock("flag")
        condition = runtime.condition(lock)
        flag: list[int] = []

        def waiter() -> None:
            with lock:
                notified = condition.wait(20)
                assert notified == bool(flag) or (not notified and flag), "woken by nobody"
                assert notified or runtime.now_ns() >= 20

        def main() -> None:
            task = runtime.spawn(waiter, "waiter")
            for _ in range(3):
                runtime.yield_now()
            with lock:
                flag.append(1)
                condition.notify_all()
            task.join()

        return main

    explore(program, range(200), point_ns=2)


def test_a_livelock_is_reported_with_the_last_places_of_each_task() -> None:
    runtime = SeededRuntime(0, step_limit=500)

    def politely(where: str) -> None:
        while True:
            runtime.point(where)
            runtime.yield_now()

    def main() -> None:
        runtime.spawn(partial(politely, "after you"), "left")
        runtime.spawn(partial(politely, "no, after you"), "right").join()

    with pytest.raises(Livelock) as caught:
        runtime.run(main)
    text = str(caught.value)
    assert text.startswith("livelock: 500 places passed")
    assert "left:" in text
    assert "right:" in text
    assert "no, after you" in text


@pytest.mark.parametrize("policy", [Uniform(), Pct(3, 100), Uninterrupted()], ids=repr)
def test_a_task_that_polls_and_yields_does_not_keep_others_from_running(policy: Policy) -> None:
    def program(runtime: SeededRuntime) -> Callable[[], None]:
        def main() -> None:
            flag: list[int] = []

            def setter() -> None:
                for _ in range(5):
                    runtime.point("work")
                flag.append(1)

            task = runtime.spawn(setter, "setter")
            while not flag:
                runtime.yield_now()
            task.join()

        return main

    explore(program, range(30), policy=policy, step_limit=5000)


def test_a_lock_cycle_is_found_although_others_could_still_run() -> None:
    """Philosophers: all have their left fork; a clock task would keep the program alive."""

    def program(runtime: SeededRuntime) -> Callable[[], None]:
        forks = [runtime.lock(f"fork{n}") for n in range(3)]

        def eat(n: int) -> None:
            with forks[n], forks[(n + 1) % 3]:
                pass

        def tick() -> None:
            while True:
                runtime.sleep(1)

        def main() -> None:
            runtime.spawn(tick, "clock", daemon=True)
            for task in [runtime.spawn(partial(eat, n), f"eat{n}") for n in range(3)]:
                task.join()

        return main

    with pytest.raises(ExplorationFailed) as caught:
        explore(program, range(500), policy=partial(Pct, 3), step_limit=2000)
    assert isinstance(caught.value.error, Deadlock)
    for n in range(3):
        assert f"eat{n} waits for lock 'fork{(n + 1) % 3}', held by eat{(n + 1) % 3}" in str(
            caught.value
        )
