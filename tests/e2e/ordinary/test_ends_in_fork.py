"""A process that is killed inside fork: its exit status is no child, and its child runs.

Method: the recorder in a process of its own, where the parent is killed at the event of its first
fork, before the recorder asks for the child's id, or, with clone(2), when it asks for it first.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[3])]

from tests.e2e.ordinary.recording import COMPILER, compile_program, main, record
from tests.support.ends import kill_at_event
from tests.support.native import needs_tracing

from softsgx.engines.native import abi
from softsgx.engines.native.tracing.tracee import Stop
from softsgx.engines.ordinary import can_record
from softsgx.engines.ordinary.loop import Loop
from softsgx.engines.ordinary.program import ProgramThread

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    pytest.mark.skipif(not can_record(), reason="needs userfaultfd for accesses of system calls"),
    needs_tracing,
]


@pytest.mark.parametrize("when", ["reported", "handled"])
@pytest.mark.parametrize(
    ("call", "exit_code", "words"),
    [("fork", -9, [b"child"]), ("clone", 0, [b"child", b"child", b"parent"])],
)
def test_the_child_of_a_parent_that_is_killed_at_the_event_of_fork_runs(
    tmp_path: Path, call: str, when: str, exit_code: int, words: list[bytes]
) -> None:
    argv = [compile_program(tmp_path, "orphan"), call]
    result, output, _recorded = record(argv, epc=300 * 4096, by=(__file__, when, call))
    assert (result.exit_code, sorted(output.split())) == (exit_code, words)


def _kill_parents(when: str, call: str) -> None:
    """Let the parents be killed that make a child by ``call``; the program is not started yet."""
    event = {"fork": abi.PTRACE_EVENT_FORK, "clone": abi.PTRACE_EVENT_CLONE}[call]
    handle, stopped = Loop._handle, ProgramThread.stopped

    def killing(loop: Loop, thread: ProgramThread, stop: Stop) -> None:
        if when == "handled" and stop.event == event:
            kill_at_event(thread.tid)
        handle(loop, thread, stop)

    def told(thread: ProgramThread, status: int, fetched: int = 0) -> Stop:
        by_program = thread.holds is not None and thread.load().rdi & abi.CLONE_VM == 0
        if when == "reported" and status >> 16 == event and by_program:
            kill_at_event(thread.tid)
        return stopped(thread, status, fetched)

    patch = pytest.MonkeyPatch()
    patch.setattr(Loop, "_handle", killing)
    patch.setattr(ProgramThread, "stopped", told)


if __name__ == "__main__":
    _kill_parents(*sys.argv[1:3])
    main(sys.argv[3:])
