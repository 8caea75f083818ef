"""Tasks start, end and fail on every runtime, and nothing they raise is lost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import greenlet
import pytest
from greenlet import GreenletExit

from softsgx.runtime import (
    Deadlock,
    InlineRuntime,
    Runtime,
    SeededRuntime,
    ThreadsRuntime,
    Uninterrupted,
)

FOREVER_NS = 60_000_000_000
COOPERATIVE = pytest.mark.parametrize("make", [InlineRuntime, partial(SeededRuntime, 0)])


def boom(text: str = "boom") -> None:
    raise ValueError(text)


def test_run_returns_what_main_returned(runtime: Runtime) -> None:
    assert runtime.run(lambda: 42) == 42


def test_a_task_knows_its_name_and_a_second_of_the_name_gets_a_number(runtime: Runtime) -> None:
    names: list[str] = []

    def main() -> None:
        assert runtime.task_name() == "main"
        tasks = [runtime.spawn(lambda: names.append(runtime.task_name()), "fault") for _ in "ab"]
        for task in tasks:
            task.join()
        assert [task.name for task in tasks] == ["fault", "fault#2"]
        assert runtime.task_name() == "main"

    runtime.run(main)
    assert sorted(names) == ["fault", "fault#2"]


def test_join_raises_the_tasks_exception_and_close_then_does_not(runtime: Runtime) -> None:
    def main() -> None:
        task = runtime.spawn(boom, "bad")
        with pytest.raises(ValueError, match="boom"):
            task.join()
        assert task.done()

    runtime.run(main)


def test_close_raises_the_exception_of_a_task_that_was_not_joined(runtime: Runtime) -> None:
    with pytest.raises(ValueError, match="boom"):
        runtime.run(lambda: runtime.spawn(boom, "bad", daemon=True))


def test_close_raises_all_of_several_errors(runtime: Runtime) -> None:
    def main() -> None:
        for text in ("one", "two"):
            runtime.spawn(partial(boom, text), "bad", daemon=True)

    with pytest.raises(ExceptionGroup) as caught:
        runtime.run(main)
    assert sorted(str(error) for error in caught.value.exceptions) == ["one", "two"]


def test_an_error_of_main_takes_the_errors_of_tasks_along(runtime: Runtime) -> None:
    lock = runtime.lock("turn")
    failed = runtime.condition(lock)
    state = {"failing": False}

    def bad() -> None:
        with lock:
            state["failing"] = True
            failed.notify_all()
        boom()

    def main() -> None:
        task = runtime.spawn(bad, "bad")
        while not task.done():
            runtime.yield_now()
        raise KeyError("main")

    with pytest.raises(KeyError) as caught:
        runtime.run(main)
    assert caught.value.__notes__ == ["a task also raised ValueError('boom')"]


@pytest.mark.parametrize(
    "make",
    [InlineRuntime, partial(SeededRuntime, 0), partial(ThreadsRuntime, grace_ns=200_000_000)],
)
def test_a_task_left_waiting_is_an_error_that_names_it_and_what_it_waits_for(
    make: Callable[[], Runtime],
) -> None:
    runtime = make()
    lock = runtime.lock("never")
    condition = runtime.condition(lock)
    unwound: list[str] = []

    def forgotten() -> None:
        try:
            with lock:
                condition.wait()
        finally:
            unwound.append(runtime.task_name())

    def main() -> None:
        runtime.spawn(forgotten, "forgotten")
        runtime.sleep(1_000)

    with pytest.raises(AssertionError, match=r"forgotten.*a notification under lock 'never'"):
        runtime.run(main)
    assert unwound == ["forgotten"]


@pytest.mark.parametrize("where", ["condition", "sleep", "lock", "join"])
def test_a_daemon_is_killed_where_it_waits_and_unwinds(runtime: Runtime, where: str) -> None:
    lock = runtime.lock("never")
    condition = runtime.condition(lock)
    entered = runtime.lock("entered")
    began = runtime.condition(entered)
    log: list[str] = []

    def daemon() -> None:
        try:
            with entered:
                log.append("began")
                began.notify_all()
            match where:
                case "condition":
                    with lock:
                        condition.wait()
                case "sleep":
                    runtime.sleep(FOREVER_NS)
                case "join":
                    runtime.spawn(lambda: runtime.sleep(FOREVER_NS), "sleeper", daemon=True).join()
                case _:
                    with lock:
                        condition.wait()
        except GreenletExit:
            log.append("killed")
            raise
        log.append("went on")

    def main() -> None:
        with entered:
            runtime.spawn(daemon, "ksgxd", daemon=True)
            if where == "lock":
                runtime.spawn(daemon, "ksgxd", daemon=True)
            while "began" not in log:
                began.wait()

    runtime.run(main)
    assert set(log) == {"began", "killed"}


def test_daemons_that_can_run_do_so_before_they_are_killed(runtime: Runtime) -> None:
    lock = runtime.lock("work")
    more = runtime.condition(lock)
    todo = [1, 2, 3]
    done: list[int] = []

    def worker() -> None:
        with lock:
            while True:
                while not todo:
                    more.wait()
                done.append(todo.pop())
                runtime.point("worked")

    def main() -> None:
        runtime.spawn(worker, "worker", daemon=True)
        with lock:
            todo.append(4)
            more.notify_all()
        if runtime.concurrent:
            while len(done) < 4:
                runtime.yield_now()

    runtime.run(main)
    assert sorted(done) == [1, 2, 3, 4]


def test_a_task_spawns_tasks_that_outlive_it(runtime: Runtime) -> None:
    log: list[str] = []
    grandchildren = []

    def grandchild() -> None:
        runtime.yield_now()
        log.append("grandchild")

    def child() -> None:
        grandchildren.append(runtime.spawn(grandchild, "grandchild"))
        log.append("child")

    def main() -> None:
        runtime.spawn(child, "child").join()
        grandchildren[0].join()

    runtime.run(main)
    assert sorted(log) == ["child", "grandchild"]


def test_nothing_is_spawned_after_the_end(runtime: Runtime) -> None:
    runtime.run(lambda: None)
    with pytest.raises(AssertionError, match="closed"):
        runtime.spawn(boom, "late")


@pytest.mark.parametrize("make", [InlineRuntime, partial(SeededRuntime, 0, policy=Uninterrupted())])
def test_a_task_that_never_ran_never_runs_after_main_has_failed(
    make: Callable[[], Runtime],
) -> None:
    runtime = make()
    log: list[str] = []

    def main() -> None:
        runtime.spawn(lambda: log.append("ran"), "late")
        raise KeyError("at once")

    with pytest.raises(KeyError):
        runtime.run(main)
    assert log == []


def test_what_a_task_draws_depends_on_seed_and_name_only(runtime: Runtime) -> None:
    draws: dict[str, list[float]] = {}

    def draw() -> None:
        numbers = draws.setdefault(runtime.task_name(), [])
        for _ in range(3):
            numbers.append(runtime.random.random())
            runtime.yield_now()
            numbers += [runtime.random.randrange(1000), runtime.random.gauss(0, 1)]

    def main() -> None:
        tasks = [runtime.spawn(draw, "draw") for _ in range(3)]
        draw()
        for task in tasks:
            task.join()

    runtime.run(main)
    alone = SeededRuntime(7)
    expected: dict[str, list[float]] = {}

    def draw_alone() -> None:
        numbers = expected.setdefault(alone.task_name(), [])
        for _ in range(3):
            numbers.append(alone.random.random())
            numbers += [alone.random.randrange(1000), alone.random.gauss(0, 1)]

    def main_alone() -> None:
        draw_alone()
        for _ in range(3):
            alone.spawn(draw_alone, "draw").join()

    alone.run(main_alone)
    assert draws == expected
    assert len({tuple(numbers) for numbers in draws.values()}) == 4


def test_run_pending_gives_every_task_its_turn_until_all_wait() -> None:
    runtime = InlineRuntime()
    log: list[str] = []
    lock = runtime.lock("work")
    more = runtime.condition(lock)

    def worker() -> None:
        with lock:
            while True:
                log.append("turn")
                runtime.yield_now()
                more.wait()

    with runtime:
        runtime.spawn(worker, "worker", daemon=True)
        assert log == []
        runtime.run_pending()
        runtime.run_pending()
        assert log == ["turn"]
        with lock:
            more.notify_all()
        runtime.run_pending()
        assert log == ["turn", "turn"]


def test_tasks_of_run_pending_take_turns_and_main_waits_for_all_of_them() -> None:
    clock = [0]
    runtime = InlineRuntime(clock_ns=lambda: clock[0])
    lock = runtime.lock("work")
    log: list[str] = []

    def worker(name: str) -> None:
        for _ in range(2):
            log.append(name)
            runtime.yield_now()
        with lock:
            log.append(f"{name} last")
            runtime.yield_now()

    def late() -> None:
        runtime.sleep(100)
        log.append("late")

    def child() -> None:
        log.append("child")
        runtime.spawn(lambda: log.append("grandchild"), "grandchild")

    with runtime:
        for name in ("a", "b"):
            runtime.spawn(partial(worker, name), name)
        runtime.spawn(late, "late", daemon=True)
        runtime.spawn(child, "child")
        runtime.run_pending()
        assert log == [*"ab", "child", *"ab", "grandchild", "a last", "b last"]
        log.clear()
        runtime.run_pending()
        assert log == []
        clock[0] = 100
        runtime.run_pending()
        assert log == ["late"]


def test_a_yielding_task_of_run_pending_runs_on_unless_another_task_can() -> None:
    """Each switch costs as much as a page of a batch, and ksgxd yields after each batch."""
    runtime = InlineRuntime()
    switches: list[str] = []

    def worker() -> None:
        for _ in range(5):
            runtime.yield_now()

    with runtime:
        runtime.spawn(worker, "worker")
        former = greenlet.settrace(lambda event, _targets: switches.append(event))
        try:
            runtime.run_pending()
        finally:
            greenlet.settrace(former)
        assert switches == ["switch", "switch"]


def test_main_takes_its_turn_again_after_run_pending() -> None:
    runtime = InlineRuntime()
    log: list[str] = []

    def worker() -> None:
        for _ in range(2):
            log.append("worker")
            runtime.yield_now()

    with runtime:
        runtime.spawn(worker, "first")
        runtime.run_pending()
        log.clear()
        runtime.spawn(worker, "second")
        for _ in range(3):
            runtime.yield_now()
            log.append("main")
        assert log == ["worker", "main", "worker", "main", "main"]


def test_main_waits_for_time_and_notifications_as_ever_after_run_pending() -> None:
    clock = [0]

    def sleep(duration_ns: int) -> None:
        clock[0] += duration_ns

    runtime = InlineRuntime(clock_ns=lambda: clock[0], sleep_ns=sleep)
    lock = runtime.lock("work")
    changed = runtime.condition(lock)

    def main() -> None:
        runtime.spawn(lambda: None, "task")
        runtime.run_pending()
        runtime.sleep(100)
        assert clock == [100]
        with lock:
            changed.wait()

    with pytest.raises(Deadlock, match="main waits for a notification"):
        runtime.run(main)


def test_run_pending_does_not_wait_for_the_clock() -> None:
    def sleep(_duration_ns: int) -> None:
        raise AssertionError("main can run, and the runtime sleeps")

    runtime = InlineRuntime(clock_ns=lambda: 0, sleep_ns=sleep)
    with runtime:
        runtime.spawn(partial(runtime.sleep, 100), "sleeper", daemon=True)
        runtime.run_pending()
        runtime.run_pending()


def test_run_pending_wakes_only_sleepers_whose_time_has_come() -> None:
    clock = [0]
    runtime = InlineRuntime(clock_ns=lambda: clock[0])
    log: list[str] = []

    def sleeper() -> None:
        runtime.sleep(100)
        log.append("awake")

    with runtime:
        task = runtime.spawn(sleeper, "sleeper")
        runtime.run_pending()
        clock[0] = 99
        runtime.run_pending()
        assert not task.done()
        clock[0] = 100
        runtime.run_pending()
        assert task.done()
    assert log == ["awake"]


@COOPERATIVE
def test_an_interrupt_in_a_task_reaches_main_at_once(make: Callable[[], Runtime]) -> None:
    runtime = make()

    def interrupted() -> None:
        raise KeyboardInterrupt

    def main() -> None:
        runtime.spawn(interrupted, "task").join()

    with pytest.raises(KeyboardInterrupt):
        runtime.run(main)


@COOPERATIVE
def test_everybody_waiting_is_a_deadlock_that_names_everybody(make: Callable[[], Runtime]) -> None:
    runtime = make()
    lock = runtime.lock("flag")
    condition = runtime.condition(lock)

    def waiter() -> None:
        with lock:
            condition.wait()

    def main() -> None:
        task = runtime.spawn(waiter, "ksgxd", daemon=True)
        runtime.spawn(boom, "fault")
        task.join()

    with pytest.raises(Deadlock) as caught:
        runtime.run(main)
    text = str(caught.value)
    assert "main waits for task 'ksgxd' to end" in text
    assert "ksgxd waits for a notification under lock 'flag'" in text
    assert "fault has raised ValueError('boom')" in text
    assert isinstance(caught.value.__cause__, ValueError)


@COOPERATIVE
def test_a_deadlock_that_main_swallows_is_raised_again_at_the_end(
    make: Callable[[], Runtime],
) -> None:
    runtime = make()
    lock = runtime.lock("flag")

    def main() -> None:
        with lock:
            try:
                runtime.condition(lock).wait()
            except Deadlock:
                return

    with pytest.raises(Deadlock):
        runtime.run(main)


def test_a_threads_task_that_neither_ends_nor_waits_is_named() -> None:
    runtime = ThreadsRuntime(grace_ns=20_000_000)
    stop: list[bool] = []

    def spin() -> None:
        while not stop:
            runtime.yield_now()

    with pytest.raises(AssertionError, match="tasks left: spin is running"):
        runtime.run(lambda: runtime.spawn(spin, "spin"))
    stop.append(True)


def test_a_failure_that_was_taken_is_raised_nowhere_else() -> None:
    runtime = InlineRuntime()

    def fail() -> None:
        raise ValueError("in a task")

    task = runtime.spawn(fail, "failing")
    runtime.run_pending()
    ((name, error),) = runtime.take_failures()
    assert (name, str(error)) == ("failing", "in a task")
    assert not runtime.take_failures()
    task.join()
    runtime.close()
