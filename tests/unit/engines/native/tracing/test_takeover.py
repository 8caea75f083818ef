"""A thread that executes a program takes over the id of its leader, and is not taken for it.

Goal: no request that is meant for the leader reaches the new program, and the event of the program
is not lost.  Method: a real process in which a thread that is not the leader executes a program.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.support.native import needs_tracing

from softsgx.engines.native import abi, kernel, libc
from softsgx.engines.native.tracing import tasks
from softsgx.engines.native.tracing.fault_events import FaultEvent
from softsgx.engines.native.tracing.loop import Loop
from softsgx.engines.native.tracing.program import Process, ProgramThread
from softsgx.engines.native.tracing.tracee import Gone, Stop, Thread
from softsgx.engines.native.tracing.waits import Waits, let_end, stops_at_exit

pytestmark = needs_tracing

EXECUTED = abi.PTRACE_EVENT_EXEC << 16 | abi.SIGTRAP << 8 | 0x7F
PROGRAM = """
import os, sys, threading
print(flush=True)
sys.stdin.read(1)
threading.Thread(target=os.execv, args=("/bin/true", ["true"])).start()
threading.Event().wait()
"""


class Execution:
    """Two threads of a process, of which one waits in execve for the end of the other.

    Attributes:
        leader: at the stop before its end, which no wait has received yet.
        other: executes a program.
    """

    def __init__(self, process: subprocess.Popen[bytes], waits: Waits) -> None:
        self.waits, self.leader = waits, Thread(process.pid, waits)
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        libc.ptrace(abi.PTRACE_SEIZE, process.pid, 0, abi.TRACE_OPTIONS | abi.PTRACE_O_TRACEEXIT)
        process.stdin.write(b"x")
        process.stdin.flush()
        while self.leader.wait().event != abi.PTRACE_EVENT_CLONE:
            self.leader.resume()
        self.other = Thread(self.leader.event_message(abi.PTRACE_EVENT_CLONE), self.waits)
        self.leader.resume()
        self.other.wait()
        self.other.resume()
        self.leader.mid_call = False  # it has left the stop of clone
        _peek(process.pid, abi.PTRACE_EVENT_EXIT)

    def program_came(self) -> None:
        """Wait until the program is at the event of its execve; no wait receives that."""
        _peek(self.leader.tid, abi.PTRACE_EVENT_EXEC)

    def is_at_event(self) -> bool:
        """Whether the program is still at its event, which a wait has received."""
        former, info = ctypes.c_uint64(), abi.SigInfo()
        at = ctypes.addressof(info)
        if kernel.try_ptrace(abi.PTRACE_GETSIGINFO, self.leader.tid, 0, at) < 0:
            return False
        libc.ptrace(abi.PTRACE_GETEVENTMSG, self.leader.tid, 0, ctypes.addressof(former))
        return (info.code >> 8, former.value) == (abi.PTRACE_EVENT_EXEC, self.other.tid)


def _peek(tid: int, event: int) -> None:
    found = None
    while found is None:
        try:
            found = os.waitid(os.P_PID, tid, os.WSTOPPED | os.WNOWAIT | abi.WALL)
        except ChildProcessError:  # for a moment no thread has the id
            continue
    assert found.si_status == event << 8 | abi.SIGTRAP


@pytest.fixture
def execution() -> Iterator[Execution]:
    command, pipe = [sys.executable, "-S", "-c", PROGRAM], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        waits, tid, status = Waits(), 0, 0
        try:
            yield Execution(process, waits)
        finally:
            os.kill(
                process.pid, signal.SIGKILL
            )  # process.kill() waits, and takes a stop for the end
            while tid != process.pid or os.WIFSTOPPED(status):
                tid, status, _fetched = cast(Any, waits.next())
                let_end(tid)
            process.returncode = os.waitstatus_to_exitcode(status)


def _set_registers(thread: Thread) -> None:
    thread.load()
    thread.store()
    thread.flush()


def _set_xstate(thread: Thread) -> None:
    thread.set_xstate(bytes(4096))
    thread.flush()


def _make_call(thread: Thread) -> None:
    thread.at_call = True
    thread.finish_syscall()


REQUESTS: dict[str, Callable[[Thread], object]] = {
    "resume": Thread.resume,
    "step": Thread.step,
    "listen": Thread.listen,
    "registers": _set_registers,
    "xstate": _set_xstate,
    "mask": lambda thread: thread.set_sigmask(1),
    "information": lambda thread: thread.set_siginfo(abi.SigInfo()),
    "breakpoints": lambda thread: thread.set_breakpoints([4096]),
    "borrow": lambda thread: thread.borrow(4096, 4099, rax=abi.SYS_GETPID),
    "call": _make_call,
}


@pytest.mark.parametrize("request_of", REQUESTS.values(), ids=REQUESTS)
def test_no_request_to_a_leader_reaches_the_program_that_has_its_id(
    execution: Execution, request_of: Callable[[Thread], object]
) -> None:
    with pytest.raises(Gone):
        execution.other.wait()  # receives the leader's stop, and the program's event
    assert [tid for tid, _status in execution.waits.kept] == [execution.leader.tid] * 2
    with pytest.raises(Gone):
        request_of(execution.leader)
    assert execution.is_at_event()


@pytest.mark.parametrize("request_of", REQUESTS.values(), ids=REQUESTS)
def test_no_request_reaches_it_when_the_leader_has_received_its_own_end(
    execution: Execution, request_of: Callable[[Thread], object]
) -> None:
    with pytest.raises(Gone):
        execution.leader.wait()
    execution.program_came()
    assert not execution.waits.kept
    with pytest.raises(Gone):
        request_of(execution.leader)
    assert execution.waits.next() == (execution.leader.tid, EXECUTED, 0)
    assert execution.is_at_event()


def test_a_leader_that_has_ended_is_not_let_end_again(execution: Execution) -> None:
    with pytest.raises(Gone):
        execution.other.wait()
    tid, status, _fetched = cast(Any, execution.waits.next())
    assert (tid, stops_at_exit(status)) == (execution.leader.tid, True)
    let_end(tid)  # as the loop does at that stop
    assert execution.is_at_event()
    assert execution.waits.next() == (tid, EXECUTED, 0)


def test_a_leader_in_its_last_stop_can_end(execution: Execution) -> None:
    let_end(execution.leader.tid)
    execution.program_came()


def test_a_status_that_is_kept_again_stays_before_what_came_later() -> None:
    waits = Waits()
    for status in (1, 2, 3):
        waits.keep(status, status)
    waits.kept.append((2, 7))
    assert waits.of(2) == 2
    waits.keep(2, 2)
    waits.keep(4, 4)
    assert [status for tid, status in waits.kept if tid == 2] == [2, 7]
    assert waits.keeps(4) and not waits.keeps(5)


def _nothing(*_arguments: object) -> None:
    """Do nothing."""


def test_a_program_that_cannot_be_adopted_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    names = "before_resume", "background", "new_process", "thread_died", "thread_gone"
    lifecycle = SimpleNamespace(**dict.fromkeys(names, _nothing))
    permits = SimpleNamespace(ended=_nothing, settle=_nothing)
    transitions = SimpleNamespace(permits=permits, only_crosses=_nothing)
    loop = Loop(cast(Any, lifecycle), Waits(), cast(Any, transitions), {})
    process = Process(71, cast(Any, None))
    image = SimpleNamespace(watched=False, may_be_uninvolved=False, current=None)
    thread = SimpleNamespace(
        announces_end=False, tid=71, process=process, image=image, place=None, mid_call=True
    )
    loop.add(cast(ProgramThread, thread))

    def fails(_thread: Thread, _process: Process) -> Callable[[], None]:
        raise Gone(71)

    monkeypatch.setattr(loop, "executed", fails)
    monkeypatch.setattr(tasks, "is_32_bit", lambda _thread: False)
    monkeypatch.setattr(tasks, "kill", killed.append)
    loop.guard(cast(ProgramThread, thread), Stop(abi.SIGTRAP, abi.PTRACE_EVENT_EXEC, False))
    assert killed == [71]
    assert not loop.threads and not loop.failures.errors


@pytest.mark.parametrize("has_faults", [False, True])
def test_while_threads_stand_back_for_one_its_stops_come_first_and_faults_in_turn(
    monkeypatch: pytest.MonkeyPatch, has_faults: bool
) -> None:
    waits = Waits()
    names = "before_resume", "background", "new_process"
    loop = Loop(
        cast(Any, SimpleNamespace(**dict.fromkeys(names, _nothing))),
        waits,
        cast(Any, SimpleNamespace(permits=SimpleNamespace())),
        {},
    )
    stops, fault = [(71, 1, 0)], FaultEvent(3, 73, 0x1000, 0)
    resolved: list[FaultEvent] = []
    monkeypatch.setattr(
        Waits, "stop_of", lambda _waits, tid: stops.pop() if stops and tid == 71 else None
    )
    monkeypatch.setattr(Waits, "fault_now", lambda _waits: fault if has_faults else None)
    monkeypatch.setattr(Waits, "next_or_fault", lambda _waits, _until: (72, 2, 0))
    first, plain = SimpleNamespace(tid=71), SimpleNamespace(resolve=resolved.append)
    events = [loop._next_fairly(cast(Any, first), cast(Any, plain), None) for _ in range(5)]
    other = (72, 2, 0)
    if has_faults:
        assert events == [(71, 1, 0), None, other, None, other]
        assert resolved == [fault, fault]
    else:
        assert events == [(71, 1, 0), *[other] * 4]
