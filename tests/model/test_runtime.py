"""Random programs of tasks: properties of the runtimes for all programs and schedules.

Method: Hypothesis draws programs of nested lock sections, waits, sleeps, yields and spawned tasks.
An interpreter runs one on a runtime and checks mutual exclusion with books of its own; its log
must be a function of program and seed, and its results the same on every runtime.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import factorial, prod
from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softsgx.runtime import (
    Deadlock,
    InlineRuntime,
    Pct,
    Policy,
    Runtime,
    SeededRuntime,
    Task,
    ThreadsRuntime,
    Uniform,
    Uninterrupted,
    explore_all,
)

LOCKS = 3

Body: TypeAlias = "tuple[Op, ...]"


@dataclass(frozen=True)
class Op:
    """One thing a task does; ``body`` is what it does inside, or what a spawned task does."""

    kind: str
    number: int = 0
    body: Body = ()


def bodies(leaves: st.SearchStrategy[Op]) -> st.SearchStrategy[Op]:
    inside = st.lists(leaves, max_size=4).map(tuple)
    number = st.integers(0, LOCKS - 1)
    return st.one_of(
        st.builds(Op, st.just("locked"), number, inside),
        st.builds(Op, st.just("locked"), number, inside),
        st.builds(Op, st.just("spawn"), st.just(0), inside),
    )


SIMPLE = st.one_of(
    st.builds(Op, st.sampled_from(["point", "yield", "draw"])),
    st.builds(Op, st.just("sleep"), st.integers(0, 3_000)),
    st.builds(Op, st.sampled_from(["try", "notify", "wait"]), st.integers(0, LOCKS - 1)),
)
OPS = st.recursive(SIMPLE, bodies, max_leaves=8)
PROGRAMS = st.lists(st.lists(OPS, max_size=5).map(tuple), min_size=1, max_size=4)
POLICIES = st.sampled_from([Uniform(), Pct(3, 60), Uninterrupted()])
SEEDS = st.integers(0, 2**32)


@dataclass
class Interpreter:
    """Runs a program on a runtime and keeps books of who holds and wants what.

    Args:
        runtime: any.
        ordered: whether locks are taken in order only, so that no deadlock is possible.
    """

    runtime: Runtime
    ordered: bool = True
    log: list[tuple[str, str]] = field(default_factory=list)
    draws: dict[str, list[int]] = field(default_factory=dict)
    entered: list[int] = field(default_factory=lambda: [0] * LOCKS)  # counted under each lock
    sections: Counter[str] = field(default_factory=Counter)  # the same, counted by each task
    holder: dict[int, str] = field(default_factory=dict)
    wants: dict[str, int] = field(default_factory=dict)
    forfeited: set[tuple[str, int]] = field(default_factory=set)
    cycles: int = 0

    def __post_init__(self) -> None:
        self.locks = [self.runtime.lock(f"lock{n}") for n in range(LOCKS)]
        self.conditions = [self.runtime.condition(lock) for lock in self.locks]

    def main(self, program: list[Body]) -> None:
        self.join([self.start(f"task{n}", body) for n, body in enumerate(program)])
        assert not self.holder
        assert sum(self.entered) == self.sections.total(), "a section was lost: two tasks were in"

    def start(self, name: str, body: Body) -> Task:
        return self.runtime.spawn(partial(self.task, name, body), name)

    def join(self, tasks: list[Task]) -> None:
        for task in tasks:
            try:
                task.join()
            except Deadlock:
                assert self.cycles, "a deadlock where the books show none"

    def task(self, name: str, body: Body) -> None:
        assert self.runtime.task_name() == name
        children: list[Task] = []
        try:
            self.execute(name, name, body, (), children)
        finally:
            self.join(children)

    def execute(
        self, me: str, path: str, body: Body, held: tuple[int, ...], children: list[Task]
    ) -> None:
        runtime = self.runtime
        for index, op in enumerate(body):
            inner = f"{path}.{index}"
            self.log.append((inner, op.kind))
            match op.kind:
                case "point":
                    runtime.point("point")
                case "yield":
                    runtime.yield_now()
                case "sleep":
                    before_ns = runtime.now_ns()
                    runtime.sleep(op.number)
                    assert runtime.now_ns() >= before_ns + op.number
                case "draw":
                    self.draws.setdefault(me, []).append(runtime.random.randrange(1000))
                case "spawn":
                    children.append(self.start(inner, op.body))
                case "notify" if op.number in held:
                    self.conditions[op.number].notify_all()
                case "wait" if op.number in held:
                    # Taking an outer lock again would be out of order.
                    if not self.ordered or op.number == held[-1]:
                        self.wait(me, op.number)
                case "try" if op.number not in held:
                    if self.locks[op.number].try_acquire():
                        self.enter(me, op.number)
                        self.leave(me, op.number)
                        self.locks[op.number].release()
                case "locked" if op.number not in held:
                    if not self.ordered or all(op.number > other for other in held):
                        self.locked(me, inner, op, held, children)

    def wait(self, me: str, lock: int) -> None:
        # The lock is given up meanwhile, and taken again unless that is refused.
        del self.holder[lock]
        self.wants[me] = lock
        try:
            self.conditions[lock].wait(2_000)
        except Deadlock:
            self.refused(me)
            self.forfeited.add((me, lock))
            raise
        finally:
            del self.wants[me]
        assert lock not in self.holder, f"{me} woke while {self.holder} held the lock"
        self.holder[lock] = me

    def locked(
        self, me: str, path: str, op: Op, held: tuple[int, ...], children: list[Task]
    ) -> None:
        self.wants[me] = op.number
        try:
            self.locks[op.number].acquire()
        except Deadlock:
            self.refused(me)
            raise
        finally:
            del self.wants[me]
        self.enter(me, op.number)
        try:
            self.execute(me, path, op.body, (*held, op.number), children)
        finally:
            self.leave(me, op.number)
            self.locks[op.number].release()

    def enter(self, me: str, lock: int) -> None:
        assert lock not in self.holder, f"{me} and {self.holder[lock]} both hold lock {lock}"
        self.holder[lock] = me
        self.sections[me] += 1
        before = self.entered[lock]
        self.runtime.point("entered")
        self.entered[lock] = before + 1

    def leave(self, me: str, lock: int) -> None:
        if (me, lock) not in self.forfeited:
            assert self.holder.pop(lock) == me
        self.forfeited.discard((me, lock))

    def refused(self, me: str) -> None:
        """Follow the books from ``me``: they must lead back to ``me``."""
        assert not self.ordered, f"{me} was refused a lock although all are taken in order"
        self.cycles += 1
        task, seen = me, set[str]()
        while task not in seen:
            seen.add(task)
            assert task in self.wants, f"{me} was refused, but {task} waits for no lock"
            task = self.holder[self.wants[task]]
        assert task == me, f"{me} was refused for a cycle of others"


def seeded(program: list[Body], runtime: SeededRuntime, *, ordered: bool = True) -> Interpreter:
    interpreter = Interpreter(runtime, ordered=ordered)
    runtime.run(lambda: interpreter.main(program))
    return interpreter


@pytest.mark.slow
@settings(deadline=None)
@given(program=PROGRAMS, seed=SEEDS, policy=POLICIES, point_ns=st.sampled_from([0, 100]))
def test_a_history_is_a_function_of_program_seed_and_policy(
    program: list[Body], seed: int, policy: Policy, point_ns: int
) -> None:
    first = SeededRuntime(seed, policy=policy, point_ns=point_ns)
    second = SeededRuntime(seed, policy=policy, point_ns=point_ns)
    assert seeded(program, first).log == seeded(program, second).log
    assert first.schedule.text() == second.schedule.text()
    assert first.now_ns() == second.now_ns()


@pytest.mark.slow
@settings(deadline=None)
@given(program=PROGRAMS, seed=SEEDS, policy=POLICIES, point_ns=st.sampled_from([0, 100]))
def test_a_replayed_schedule_gives_the_recorded_history(
    program: list[Body], seed: int, policy: Policy, point_ns: int
) -> None:
    recorded = SeededRuntime(seed, policy=policy, point_ns=point_ns)
    log = seeded(program, recorded).log
    again = SeededRuntime.replay(recorded.schedule, point_ns=point_ns)
    assert seeded(program, again).log == log
    assert again.schedule == recorded.schedule


@pytest.mark.slow
@settings(deadline=None)
@given(program=PROGRAMS, seed=SEEDS, policy=POLICIES)
def test_what_tasks_draw_and_enter_does_not_depend_on_runtime_or_schedule(
    program: list[Body], seed: int, policy: Policy
) -> None:
    program = [without_try(body) for body in program]
    reference = seeded(program, SeededRuntime(seed, policy=Uninterrupted()))
    other = seeded(program, SeededRuntime(seed, policy=policy))
    inline = Interpreter(InlineRuntime(seed))
    inline.runtime.run(lambda: inline.main(program))
    assert reference.draws == other.draws == inline.draws
    assert reference.sections == other.sections == inline.sections
    assert Counter(reference.log) == Counter(other.log) == Counter(inline.log)


@settings(max_examples=20, deadline=None)
@given(program=PROGRAMS, seed=SEEDS)
def test_threads_do_the_same_work(program: list[Body], seed: int) -> None:
    program = [without_try(body) for body in program]
    reference = seeded(program, SeededRuntime(seed))
    threads = Interpreter(ThreadsRuntime(seed))
    threads.runtime.run(lambda: threads.main(program))
    assert threads.draws == reference.draws
    assert threads.sections == reference.sections


def without_try(body: Body) -> Body:
    """Leave out what depends on the schedule by its nature."""
    return tuple(Op(op.kind, op.number, without_try(op.body)) for op in body if op.kind != "try")


@pytest.mark.slow
@settings(deadline=None)
@given(program=PROGRAMS, seed=SEEDS, policy=POLICIES)
def test_a_task_is_refused_a_lock_exactly_when_it_would_wait_for_itself(
    program: list[Body], seed: int, policy: Policy
) -> None:
    # A cycle not refused would end as a deadlock of everybody, which main does not expect.
    seeded(program, SeededRuntime(seed, policy=policy), ordered=False)
    inline = Interpreter(InlineRuntime(seed), ordered=False)
    inline.runtime.run(lambda: inline.main(program))


@settings(max_examples=20, deadline=None)
@given(program=PROGRAMS, seed=SEEDS)
def test_threads_that_would_wait_for_themselves_are_refused(program: list[Body], seed: int) -> None:
    threads = Interpreter(ThreadsRuntime(seed), ordered=False)
    threads.runtime.run(lambda: threads.main(program))


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (3, 1), (3, 2), (1, 1, 1), (2, 1, 2)])
def test_an_exhaustive_search_finds_every_interleaving(sizes: tuple[int, ...]) -> None:
    logs: set[str] = set()

    def program(runtime: SeededRuntime) -> Callable[[], None]:
        log: list[str] = []

        def work(task: int) -> None:
            for step in range(sizes[task]):
                if step:
                    runtime.point("next")
                log.append(str(task))

        def main() -> None:
            tasks = [runtime.spawn(partial(work, n), f"task{n}") for n in range(len(sizes))]
            for task in tasks:
                task.join()
            logs.add("".join(log))

        return main

    # Before all have been spawned fewer can run, but they can also wait until then.
    assert explore_all(program, preemptions=20, max_runs=100_000).complete
    assert len(logs) == factorial(sum(sizes)) // prod(map(factorial, sizes))
