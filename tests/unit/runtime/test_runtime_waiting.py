"""Locks, conditions and latches keep their promises on every runtime.

Method: small programs in which something goes wrong if the promise is broken, run on each runtime.
Nothing sleeps in real time for longer than a millisecond.
"""

from __future__ import annotations

import pytest

from softsgx.runtime import (
    Deadlock,
    InlineRuntime,
    Lock,
    Runtime,
    SeededRuntime,
    Task,
    ThreadsRuntime,
)

FOREVER_NS = 60_000_000_000
A_MOMENT_NS = 1_000_000


def test_a_lock_is_held_by_one_task_at_a_time(runtime: Runtime) -> None:
    lock = runtime.lock("epc")
    inside: list[str] = []
    entries = 0

    def work() -> None:
        nonlocal entries
        for _ in range(30):
            with lock:
                assert not inside, f"{runtime.task_name()} met {inside}"
                inside.append(runtime.task_name())
                runtime.point("inside")
                runtime.yield_now()
                entries += 1
                inside.pop()
            runtime.yield_now()

    def main() -> None:
        for task in [runtime.spawn(work, "worker") for _ in range(4)]:
            task.join()

    runtime.run(main)
    assert entries == 120


def test_a_lock_given_up_by_an_exception_is_free(runtime: Runtime) -> None:
    def main() -> None:
        lock = runtime.lock("epc")
        with pytest.raises(ZeroDivisionError), lock:
            _ = 1 // 0
        assert not lock.held()
        with lock:
            assert lock.held()

    runtime.run(main)


@pytest.mark.parametrize("second", ["acquire", "with"])
def test_taking_a_lock_twice_is_asserted_and_names_lock_and_task(
    runtime: Runtime, second: str
) -> None:
    def main() -> None:
        lock = runtime.lock("epc")
        lock.acquire()
        take = lock.acquire if second == "acquire" else lock.__enter__
        with pytest.raises(AssertionError, match="'epc' taken twice by task 'main'"):
            take()
        lock.release()

    runtime.run(main)


def test_only_the_holder_releases(runtime: Runtime) -> None:
    lock = runtime.lock("epc")

    def thief() -> None:
        lock.release()

    def main() -> None:
        with lock:
            task = runtime.spawn(thief, "thief")
            with pytest.raises(AssertionError, match="held by main, not by task 'thief'"):
                task.join()
            assert lock.held()
        with pytest.raises(AssertionError, match="held by None, not by task 'main'"):
            lock.release()

    runtime.run(main)


def test_leaving_a_section_whose_lock_was_released_inside_is_asserted(runtime: Runtime) -> None:
    lock = runtime.lock("epc")
    with pytest.raises(AssertionError, match="'epc' is held by None, not by task 'main'"), lock:
        lock.release()


def test_try_acquire_holds_what_is_free_and_never_waits(runtime: Runtime) -> None:
    lock = runtime.lock("epc")
    seen: list[bool] = []

    def other() -> None:
        seen.append(lock.try_acquire())

    def main() -> None:
        assert lock.try_acquire()
        runtime.spawn(other, "other").join()
        lock.release()
        runtime.spawn(other, "other").join()
        assert lock.held()

    runtime.run(main)
    assert seen == [False, True]


def test_everything_put_into_a_bounded_buffer_comes_out_as_often(runtime: Runtime) -> None:
    lock = runtime.lock("buffer")
    changed = runtime.condition(lock)
    buffer: list[int] = []
    taken: list[int] = []

    def produce() -> None:
        for item in range(20):
            with lock:
                while len(buffer) >= 2:
                    changed.wait()
                buffer.append(item)
                changed.notify_all()

    def consume() -> None:
        for _ in range(20):
            with lock:
                while not buffer:
                    changed.wait()
                taken.append(buffer.pop(0))
                changed.notify_all()

    def main() -> None:
        tasks = [runtime.spawn(produce, "put") for _ in range(2)]
        tasks += [runtime.spawn(consume, "take") for _ in range(2)]
        for task in tasks:
            task.join()

    runtime.run(main)
    assert sorted(taken) == sorted(2 * list(range(20)))


def test_a_notification_wakes_every_waiter_and_none_keeps_the_lock(runtime: Runtime) -> None:
    lock = runtime.lock("flag")
    raised = runtime.condition(lock)
    state = {"waiting": 0, "up": 0, "woken": 0}

    def waiter() -> None:
        with lock:
            state["waiting"] += 1
            raised.notify_all()
            while not state["up"]:
                assert raised.wait(FOREVER_NS)
            state["woken"] += 1

    def main() -> None:
        tasks = [runtime.spawn(waiter, "waiter") for _ in range(3)]
        with lock:
            while state["waiting"] < 3:
                raised.wait()
            state["up"] = 1
            raised.notify_all()
            assert state["woken"] == 0, "a waiter ran without the lock"
        for task in tasks:
            task.join()

    runtime.run(main)
    assert state["woken"] == 3


def test_a_wait_times_out_without_a_notification(runtime: Runtime) -> None:
    def main() -> None:
        lock = runtime.lock("flag")
        condition = runtime.condition(lock)
        before_ns = runtime.now_ns()
        with lock:
            assert not condition.wait(A_MOMENT_NS)
            assert lock.held()
        assert runtime.now_ns() - before_ns >= A_MOMENT_NS

    runtime.run(main)


def test_waiting_and_notifying_need_the_lock(runtime: Runtime) -> None:
    def main() -> None:
        lock = runtime.lock("flag")
        condition = runtime.condition(lock)
        with pytest.raises(AssertionError, match="'flag'"):
            condition.wait(A_MOMENT_NS)
        with pytest.raises(AssertionError, match="'flag'"):
            condition.notify_all()

    runtime.run(main)


def test_sleeping_takes_at_least_its_time_and_others_run_meanwhile(runtime: Runtime) -> None:
    log: list[str] = []

    def main() -> None:
        before_ns = runtime.now_ns()
        task = runtime.spawn(lambda: log.append("ran"), "other")
        runtime.sleep(A_MOMENT_NS)
        assert runtime.now_ns() - before_ns >= A_MOMENT_NS
        task.join()

    runtime.run(main)
    assert log == ["ran"]


def test_tasks_that_take_two_locks_in_opposite_order_are_reported(runtime: Runtime) -> None:
    pages, enclave = runtime.lock("pages"), runtime.lock("enclave")
    both = runtime.lock("both")
    started = runtime.condition(both)
    holding: list[str] = []

    def take(first: Lock, second: Lock) -> None:
        with first:
            with both:
                holding.append(runtime.task_name())
                started.notify_all()
                while len(holding) < 2:
                    started.wait()
            with second:
                pass

    def main() -> None:
        tasks = [
            runtime.spawn(lambda: take(pages, enclave), "reclaim"),
            runtime.spawn(lambda: take(enclave, pages), "fault"),
        ]
        failed = []
        for task in tasks:
            try:
                task.join()
            except Deadlock as error:
                failed.append(str(error))
        # One of the two is refused; the other then gets its lock.
        assert len(failed) == 1
        assert "reclaim waits for lock 'enclave', held by fault" in failed[0]
        assert "fault waits for lock 'pages', held by reclaim" in failed[0]

    runtime.run(main)


def test_a_wait_whose_lock_is_held_by_a_task_that_waits_for_it_is_refused(
    runtime: Runtime,
) -> None:
    outer, inner = runtime.lock("outer"), runtime.lock("inner")
    changed = runtime.condition(outer)
    state = {"waits": False, "blocks": False}

    def waiter() -> None:
        with outer, inner:
            state["waits"] = True
            while not state["blocks"]:
                changed.wait(A_MOMENT_NS)

    def blocker() -> None:
        with outer:
            state["blocks"] = True
            with inner:
                pass

    def main() -> None:
        first = runtime.spawn(waiter, "waiter")
        while not state["waits"]:
            runtime.yield_now()
        failed = []
        for task in [first, runtime.spawn(blocker, "blocker")]:
            try:
                task.join()
            except Deadlock as error:
                failed.append(str(error))
        # Whoever closes the cycle: the timeout, or on threads perhaps the blocker.
        assert len(failed) == 1
        assert "waiter waits for lock 'outer', held by blocker" in failed[0]
        assert "blocker waits for lock 'inner', held by waiter" in failed[0]
        assert not outer.held()
        assert not inner.held()

    runtime.run(main)


def test_tasks_that_join_each_other_are_reported(runtime: Runtime) -> None:
    lock = runtime.lock("tasks")
    tasks: list[Task] = []

    def join(index: int) -> None:
        with lock:
            task = tasks[index]
        task.join()

    def main() -> None:
        with lock:
            tasks.append(runtime.spawn(lambda: join(1), "first"))
            tasks.append(runtime.spawn(lambda: join(0), "second"))
        # Whichever is refused; the other one then joins a task that has failed.
        with pytest.raises(Deadlock, match="first waits for task 'second' to end"):
            tasks[0].join()
        with pytest.raises(Deadlock, match="second waits for task 'first' to end"):
            tasks[1].join()

    runtime.run(main)


def test_a_latch_excludes_other_threads() -> None:
    runtime = ThreadsRuntime()
    latch = runtime.latch()
    counter = 0

    def count() -> None:
        nonlocal counter
        for _ in range(200):
            with latch:
                before = counter
                runtime.yield_now()
                counter = before + 1

    def main() -> None:
        for task in [runtime.spawn(count, "count") for _ in range(3)]:
            task.join()

    runtime.run(main)
    assert counter == 600


def test_a_latch_lets_exceptions_through(runtime: Runtime) -> None:
    latch = runtime.latch()
    with pytest.raises(ZeroDivisionError), latch:
        _ = 1 // 0
    with latch:
        assert latch.held()


@pytest.mark.parametrize("where", ["point", "lock", "yield"])
def test_the_seeded_runtime_asserts_that_no_place_is_reached_with_a_latch_held(where: str) -> None:
    runtime = SeededRuntime(0)
    latch, lock = runtime.latch(), runtime.lock("epc")
    reach = {
        "point": lambda: runtime.point("EWB"),
        "lock": lock.acquire,
        "yield": runtime.yield_now,
    }[where]
    with latch, pytest.raises(AssertionError, match="with a latch held"):
        reach()


def test_the_seeded_runtime_asserts_that_a_latch_is_not_taken_twice() -> None:
    latch = SeededRuntime(0).latch()
    with latch, pytest.raises(AssertionError, match="taken while it is held"):
        latch.acquire()


def test_an_inline_lock_waits_for_a_holder_that_sleeps() -> None:
    clock = [0]
    runtime = InlineRuntime(
        clock_ns=lambda: clock[0], sleep_ns=lambda ns: clock.__setitem__(0, clock[0] + ns)
    )
    lock = runtime.lock("epc")
    log: list[str] = []

    def holder() -> None:
        with lock:
            runtime.sleep(100)
            log.append("holder")

    def main() -> None:
        runtime.spawn(holder, "holder")
        runtime.run_pending()
        with lock:
            log.append("main")
        assert clock[0] == 100

    runtime.run(main)
    assert log == ["holder", "main"]
