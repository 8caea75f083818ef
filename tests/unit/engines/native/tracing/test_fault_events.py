"""Stops, signals and each address space have their turn while faults arrive all the time.

Method: pipes in the place of userfaultfds; each holds more messages than are taken in a row.
"""

from __future__ import annotations

import os
import signal
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest

from softsgx import compiled
from softsgx.engines.native import kernel
from softsgx.engines.native.faults.plain import PlainFaults
from softsgx.engines.native.tracing.fault_events import MOST_IN_A_ROW, FaultEvents
from softsgx.engines.native.tracing.waits import Waits

FORMS = ["python"] if compiled.speedups is None else ["python", "c", "loop in c"]
MANY = 3 * MOST_IN_A_ROW + 1


class Space:
    """An address space whose threads touch many holes at once."""

    def __init__(self, server: Server) -> None:
        self.uffd, self._writer = os.pipe2(os.O_NONBLOCK)
        self._server, self.threads = server, self
        self.fault(MANY)
        server.faults.add(self.uffd, cast(Any, self))

    def fault(self, count: int) -> None:
        os.write(self._writer, struct.pack("<B7xQQI4x", 0x12, 0, 0x1000, 1) * count)

    def get(self, _tid: int) -> None:
        """As the threads of an address space: the thread of an event is asked for."""
        self._server.held.append(self)

    def values(self) -> list[object]:
        return []

    def close(self) -> None:
        os.close(self.uffd)
        os.close(self._writer)


class Server:
    """Takes what arrives, in one of the forms."""

    def __init__(self, form: str) -> None:
        self.faults, self.held, self._form = FaultEvents(), list[Space](), form
        self._ended: list[int] = []

    def end_child(self) -> None:
        """Give wait(2) something to report: other tests may have left children that run on."""
        child = os.posix_spawnp("true", ["true"], {})
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        self._ended.append(child)
        while signal.sigtimedwait({signal.SIGCHLD}, 0):  # unless another thread has taken it
            pass
        signal.pthread_kill(threading.get_ident(), signal.SIGCHLD)

    def close(self) -> None:
        for space in self.faults.images.values():
            cast(Any, space).close()
        self.faults.close()
        for child in self._ended:
            with suppress(ChildProcessError):  # the loop has received its end
                os.waitpid(child, 0)

    def next(self) -> Space | None:
        """Return whose fault is next; ``None``: a thread may have stopped."""
        self.faults.may_have_stopped = False
        if self._form == "loop in c":
            self._serve()
        else:
            event = self.faults.wait(1)
            if event is not None:
                self.faults.thread(event)
        return self.held.pop() if self.held else None

    def _serve(self) -> None:
        assert compiled.speedups is not None
        waits, none = Waits(), cast(Any, None)
        waits.faults = self.faults
        server: Any = SimpleNamespace(held=self.held, threads={})
        permits: Any = SimpleNamespace(_open=set(), _unused={}, _recorded=set())
        plain = PlainFaults(server, waits, none, permits, none, none)
        with suppress(ChildProcessError):  # it looks for stops
            compiled.speedups.serve_faults(plain)


@pytest.fixture(params=FORMS)
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    if request.param == "python":
        monkeypatch.setattr(kernel, "next_fault", kernel._next_fault)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    server = Server(request.param)
    yield server
    server.close()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_faults_of_each_address_space_are_served_soon(server: Server) -> None:
    spaces = [Space(server) for _ in range(2)]
    order = [server.next() for _ in range(2 * MOST_IN_A_ROW + 1)]
    assert {order[0], order[MOST_IN_A_ROW]} == set(spaces)
    changes = sum(one is not other for one, other in pairwise(order))
    assert changes == 2


def test_a_stop_is_seen_while_faults_arrive(server: Server) -> None:
    space = Space(server)
    assert server.next() is space
    server.end_child()
    order = [server.next() for _ in range(2 * MOST_IN_A_ROW)]
    assert None in order


def test_after_a_stop_others_are_looked_for_first(server: Server) -> None:
    space = Space(server)
    assert server.next() is space
    server.end_child()
    while server.next() is not None:
        pass
    assert server.faults.latest == -1


def test_a_descriptor_that_is_given_up_is_not_read(server: Server) -> None:
    space, other = Space(server), Space(server)
    first = server.next()
    assert first in (space, other)
    server.faults.remove(first.uffd)
    assert {server.next() for _ in range(MANY)} == {space, other} - {first}
    first.close()


def test_a_space_without_an_event_is_waited_for_with_the_others(server: Server) -> None:
    space = Space(server)
    assert {server.next() for _ in range(MANY)} == {space}
    server.end_child()
    assert server.next() is None
    space.fault(1)
    assert server.next() is space
