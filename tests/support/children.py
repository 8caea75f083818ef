"""Child processes that end with the block that uses them, also when it raises."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["end", "running"]


@contextmanager
def running(
    command: Sequence[str | os.PathLike[str]], *, group: bool = False, **options: Any
) -> Iterator[subprocess.Popen[Any]]:
    """Start a child; wait for its end behind the block, and kill it first if the block raises.

    ``with subprocess.Popen(…)`` waits also behind a failed assertion, for a child that may never
    end.  The kernel kills what a killed supervisor traces.

    Args:
        command: the program and its arguments.
        group: give the child a session of its own, and kill its process group.
        options: of :class:`subprocess.Popen`.
    """
    with subprocess.Popen(command, start_new_session=group, **options) as child:
        try:
            yield child
        except BaseException:
            end(child)
            with suppress(ProcessLookupError):
                if group:
                    os.killpg(child.pid, signal.SIGKILL)
            raise


def end(child: subprocess.Popen[Any]) -> None:
    """Kill a child that this process may trace.

    ``child.kill()`` looks for an end first.  It takes a stop of a tracee for one, such as that for
    SIGCHLD when a grandchild was killed, and sends no signal then: the tracee stays stopped.
    """
    if child.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
