"""A program of which one thread runs shares the supervisor's processor, and does not see it.

Method: a Python program under the engine compares results of system calls with ``/proc``, which
has the real affinity.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from tests.support.native import needs_tracing

from softsgx.engines.native import run
from softsgx.engines.native.tracing.loop import Loop

pytestmark = [
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors"),
    needs_tracing,
]

PROGRAM = """
import os, sys, threading, time

def count():
    status = open("/proc/thread-self/status").read()
    mask = int(status.split("Cpus_allowed:")[1].split()[0].replace(",", ""), 16)
    return mask.bit_count()

out = open(sys.argv[1], "w")
asked, alone = len(os.sched_getaffinity(0)), count()
print("alone", asked, alone, file=out)
go, seen = threading.Event(), []
thread = threading.Thread(target=lambda: (go.wait(), seen.append(count())))
thread.start()
print("two", len(os.sched_getaffinity(0)), count(), file=out)
go.set()
thread.join()
print("second", seen[0], seen[0], file=out)
while len(os.listdir("/proc/self/task")) > 1:
    time.sleep(0.01)
for each in range(50):  # on a busy machine both may want to run for a while
    pid = os.fork()
    if not pid:
        time.sleep(0.1)
        os._exit(count())
    had = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if had == 1:
        break
print("child", asked, had, file=out)
end = time.monotonic() + 20
pid = os.fork()
had = count()
while had == 1 and time.monotonic() < end:
    had = count()
if not pid:
    more = time.monotonic() + 0.5
    while time.monotonic() < more:
        pass  # with its end the parent would have one processor again, perhaps before it looks
    os._exit(had)
print("parent", asked, had, file=out)  # the child may have ended meanwhile
print("busy", asked, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=out)
print("again", len(os.sched_getaffinity(0)), count(), file=out)
chosen = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {chosen})
print("chosen", len(os.sched_getaffinity(0)), count(), file=out)
os.sched_setaffinity(0, range(os.cpu_count()))
print("own", len(os.sched_getaffinity(0)), count(), file=out)
"""


def told(path: Path, **options: object) -> dict[str, tuple[int, int]]:
    """Run the program; return how many processors it was told of, and really had."""
    result = run([sys.executable, "-c", PROGRAM, str(path)], epc="1MiB", **options)  # type: ignore[arg-type]
    assert result.exit_code == 0
    rows = [line.split() for line in path.read_text().splitlines()]
    return {name: (int(asked), int(had)) for name, asked, had in rows}


def test_one_running_thread_has_one_processor_and_two_have_all_of_them(tmp_path: Path) -> None:
    ours = os.sched_getaffinity(0)
    told_of = told(tmp_path / "out")
    every = len(ours)
    assert told_of["alone"] == (every, 1)
    assert told_of["two"] == told_of["second"] == (every, every)
    assert told_of["child"] == (every, 1), "its parent waits for it"
    assert told_of["parent"] == told_of["busy"] == (every, every)
    assert told_of["again"] == (every, 1)
    assert told_of["chosen"] == (1, 1)
    assert told_of["own"] == (every, every), "the program has chosen itself, and alone still"
    assert os.sched_getaffinity(0) == ours


def test_processors_that_were_asked_for_are_left_alone(tmp_path: Path) -> None:
    ours = os.sched_getaffinity(0)
    told_of = told(tmp_path / "out", cpus=ours)
    assert told_of["alone"] == told_of["two"] == (len(ours), len(ours))
    assert os.sched_getaffinity(0) == ours


def test_the_program_keeps_its_priority(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before, during, serve = os.getpriority(os.PRIO_PROCESS, 0), [], Loop.run

    def noting(loop: Loop) -> None:
        during.append(os.getpriority(os.PRIO_PROCESS, 0))
        serve(loop)

    monkeypatch.setattr(Loop, "run", noting)
    result = run(["/bin/sh", "-c", "nice; nice & wait"], epc="1MiB")
    assert result.exit_code == 0
    assert capfd.readouterr().out.split() == [str(before)] * 2
    try:
        os.setpriority(os.PRIO_PROCESS, 0, before - 1)
    except PermissionError:
        assert during == [before]
    else:
        os.setpriority(os.PRIO_PROCESS, 0, before)
        assert during == [max(before - 10, -20)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
