"""A process with a thread that has ended inside fork may leave a child that no event reports."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from softsgx.engines.native import abi
from softsgx.engines.native.tracing.loop import Loop
from softsgx.engines.native.tracing.stopped import StoppedThread
from softsgx.engines.native.tracing.tracee import Gone
from softsgx.engines.native.tracing.waits import Waits

EXITED, KILLED = 3 << 8, 9


class Thread:
    """A thread at the event of its end, in system call ``number``; ``None``: it was let go."""

    def __init__(self, number: int | None) -> None:
        self.tid, self.number = 7, number
        self.process = SimpleNamespace(pid=7, ended_in_fork=False)

    def load(self) -> Any:
        if self.number is None:
            raise Gone(self.tid)
        return SimpleNamespace(orig_rax=self.number)


class NotingLoop(Loop):
    """Notes for which ends it looks for all children."""

    def __init__(self) -> None:
        self.looked: list[bool] = []
        self.statuses = {}
        self.failures = SimpleNamespace(reaped=lambda _tid: None)  # type: ignore[assignment]
        self._waits = SimpleNamespace(unreported={}, kept=[])  # type: ignore[assignment]

    def _die(self, thread: Any) -> None:
        pass

    def _forget(self, thread: Any) -> None:
        pass

    def _adopt_orphans(self, parent: Any, *, killed: bool) -> None:
        self.looked.append(killed)


@pytest.mark.parametrize("status", [EXITED, KILLED])
@pytest.mark.parametrize(
    ("number", "inside"),
    [
        (abi.SYS_FORK, True),
        (abi.SYS_VFORK, True),
        (abi.SYS_CLONE, True),
        (abi.SYS_CLONE3, True),
        (abi.SYS_GETPID, False),
        ((1 << 64) - 1, False),
        (None, True),
    ],
)
def test_its_children_are_looked_for_when_it_is_gone(
    number: int | None, inside: bool, status: int
) -> None:
    loop, thread = NotingLoop(), Thread(number)
    loop._announced_end(thread)  # type: ignore[arg-type]
    other = Thread(abi.SYS_GETPID)
    other.process = thread.process
    loop._announced_end(other)  # type: ignore[arg-type]
    assert thread.process.ended_in_fork == inside
    loop._gone(thread, status)  # type: ignore[arg-type]
    assert loop.looked == ([True] if inside or status == KILLED else [])


def test_an_end_during_a_request_may_have_been_inside_fork() -> None:
    loop, thread = NotingLoop(), Thread(abi.SYS_GETPID)
    loop.threads = {7: thread}  # type: ignore[dict-item]
    loop._note(Gone(8))
    assert not thread.process.ended_in_fork
    loop._note(Gone(7))
    assert thread.process.ended_in_fork


@pytest.mark.parametrize("event", [abi.PTRACE_EVENT_FORK, abi.PTRACE_EVENT_CLONE])
@pytest.mark.parametrize("at", [abi.PTRACE_EVENT_FORK, abi.PTRACE_EVENT_EXIT])
def test_the_exit_status_of_a_killed_parent_is_no_child(event: int, at: int) -> None:
    class Parent(StoppedThread):
        def _request(self, request: int, address: int, data: int) -> None:
            if request == abi.PTRACE_GETEVENTMSG:
                ctypes.c_uint64.from_address(data).value = 123
            else:
                self.info.code = at << 8 | abi.SIGTRAP

    parent = Parent(7, Waits())
    if at == event:
        assert parent.event_message(event) == 123
    else:
        with pytest.raises(Gone):
            parent.event_message(event)
