"""The cost of a runtime's waiting functions when no task has to wait.

Prints one JSON object: nanoseconds for ``with lock``, ``with latch``, ``point`` and a task switch
on each runtime, beside ``threading.Lock`` and an empty Python context manager in the same run.  The
cost of an empty loop is subtracted; both are the lowest of several repetitions.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType

from softsgx.runtime import (
    InlineRuntime,
    Pct,
    Runtime,
    SeededRuntime,
    ThreadsRuntime,
)

ROUNDS = 20_000
REPETITIONS = 15

MakeRuntime = Callable[[], Runtime]

RUNTIMES: dict[str, MakeRuntime] = {
    "inline": InlineRuntime,
    "threads": ThreadsRuntime,
    "seeded uniform": partial(SeededRuntime, 0, step_limit=sys.maxsize),
    "seeded pct": lambda: SeededRuntime(0, policy=Pct(3, ROUNDS), step_limit=sys.maxsize),
}


class _Empty:
    def __enter__(self) -> None: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def lowest_ns(run: Callable[[int], None]) -> float:
    """Return the nanoseconds of one round; ``run`` receives the number of rounds."""
    busy_ns: list[int] = []
    empty_ns: list[int] = []
    for _ in range(REPETITIONS):
        start_ns = time.perf_counter_ns()
        run(ROUNDS)
        middle_ns = time.perf_counter_ns()
        for _ in range(ROUNDS):
            pass
        busy_ns.append(middle_ns - start_ns)
        empty_ns.append(time.perf_counter_ns() - middle_ns)
    return round((min(busy_ns) - min(empty_ns)) / ROUNDS, 1)


def enter(lock: AbstractContextManager[object], rounds: int) -> None:
    """Enter and leave ``rounds`` times."""
    for _ in range(rounds):
        with lock:
            pass


def points(runtime: Runtime, rounds: int) -> None:
    """Reach ``rounds`` places."""
    for _ in range(rounds):
        runtime.point("place")


def switches(make: MakeRuntime, rounds: int) -> None:
    """Let two tasks take turns, ``rounds`` times in all."""
    runtime = make()

    def work() -> None:
        for _ in range(rounds // 2):
            runtime.yield_now()

    def main() -> None:
        for task in [runtime.spawn(work, "task") for _ in range(2)]:
            task.join()

    runtime.run(main)


def main() -> None:
    """Measure and print."""
    figures: dict[str, dict[str, float]] = {
        "beside": {
            "with threading.Lock": lowest_ns(partial(enter, threading.Lock())),
            "with empty": lowest_ns(partial(enter, _Empty())),
        }
    }
    for name, make in RUNTIMES.items():
        figures[name] = {
            "with lock": lowest_ns(partial(enter, make().lock("epc"))),
            "with latch": lowest_ns(partial(enter, make().latch())),
            "point": lowest_ns(partial(points, make())),
            "yield, two tasks": lowest_ns(partial(switches, make)),
        }
    print(json.dumps({"unit": "ns", **figures}, indent=2))


if __name__ == "__main__":
    main()
