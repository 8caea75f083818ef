"""The process that kills the children of an overdue test; ``overdue.py`` starts it.

It is no child of pytest, since tests wait for any child, and it ends with pytest.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

__all__ = ["descendants"]


def descendants(pid: int) -> set[int]:
    """Return the processes that ``pid`` or one of these has started or traces, without ``pid``."""
    owners = dict(_owners())
    found, new = {pid}, {pid}
    while new:
        new = {each for each, owned_by in owners.items() if owned_by & new} - found
        found |= new
    return found - {pid}


def _owners() -> Iterator[tuple[int, set[int]]]:
    """Yield each process with its parent and the tracer of its first thread."""
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/status") as file:
            lines = dict(line.split(":", 1) for line in file)
            yield int(name), {int(lines["PPid"]), int(lines["TracerPid"])} - {0}


def _command_of(pid: int) -> str:
    """Return the command line of a process, empty if it has ended."""
    with suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def _kill_children(pid: int, test: str) -> None:
    commands = {each: _command_of(each) for each in sorted(descendants(pid))}
    for each in commands:
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    killed = "; ".join(f"{each} {command}" for each, command in commands.items() if command)
    if killed:
        os.write(2, f"\n{test}: does not end after its timeout; killed: {killed}\n".encode())


def _watch(pid: int) -> None:
    """Serve pytest, whose process is ``pid``, until it closes the pipe or ends."""
    end = os.pidfd_open(pid)  # forks of tests have the pipe, too
    told: dict[str, Any] = {}
    due_s, rest = 0.0, b""
    while True:
        left_s = max(0.0, due_s - time.monotonic()) if told else None
        ready = select.select([0, end], [], [], left_s)[0]
        if not ready:
            _kill_children(pid, told["test"])
            due_s = time.monotonic() + told["every_s"]  # the test may start others
            continue
        received = b"" if end in ready else os.read(0, 1 << 16)
        if not received:
            return
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            told = json.loads(line)
            due_s = time.monotonic() + told.get("after_s", 0.0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, for pytest
    if os.fork() == 0:
        _watch(int(sys.argv[1]))
