"""Scenes of ``test_signals.py``: a command that receives signals and runs a program.

``python -m tests.unit.cli.signal_scenes SCENE NUMBER`` plays one; a broken claim is an exception.
The process has the threads of a command only.  In a worker of pytest-xdist, the kernel may give a
signal that is sent to the process to a thread of execnet; then Python's handler waits for the main
thread, which waits in waitpid(2).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.support.children import running

from softsgx.cli._signals import EndedBySignal, ProgramSignals

__all__ = ["SCENES"]

PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())  # blocked by the command, as the engine has it
while True:
    signal.pause()
"""


@contextmanager
def program(signals: ProgramSignals) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program that waits for a signal; it has ended when the context ends."""
    with signals.waiting(), running([sys.executable, "-S", "-c", PROGRAM]) as child:
        signals.started(child.pid)
        yield child
        child.kill()
        child.wait()


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def repeated(number: int) -> None:
    """One repetition of a signal that the program got is dropped after its end."""
    with ProgramSignals(frozenset()) as signals:
        with program(signals) as child:
            send(number)
            assert -child.wait() == number
        send(number)
        with pytest.raises(EndedBySignal) as ended:
            send(number)
    assert ended.value.number == number


def repeated_early(number: int) -> None:
    """A repetition that comes between the program's end and the reports is dropped."""
    with ProgramSignals(frozenset()) as signals:
        with program(signals) as child:
            send(number)
            child.wait()
            send(number)  # the thread that passes signals on finds no program
        with pytest.raises(EndedBySignal):
            send(number)


def other(number: int) -> None:
    """A signal of another number after the program's end ends the command."""
    with ProgramSignals(frozenset()) as signals:
        with program(signals) as child:
            send(signal.SIGTERM)
            child.wait()
        with pytest.raises(EndedBySignal) as ended:
            send(number)
    assert ended.value.number == number


def never_reached(number: int) -> None:
    """A signal that never reached the program ends the command."""
    with ProgramSignals(frozenset()) as signals:
        with program(signals):
            pass
        with pytest.raises(EndedBySignal):
            send(number)


def sent_to_both(number: int) -> None:
    """The signal that ended the program is dropped once, also if it was not passed on."""
    with ProgramSignals(frozenset()) as signals:
        with program(signals) as child:
            child.send_signal(
                number
            )  # as a sender to the process group, which signals each process
            signals.ended(child.wait())
        send(number)
        with pytest.raises(EndedBySignal):
            send(number)


SCENES = {
    scene.__name__: scene
    for scene in (repeated, repeated_early, other, never_reached, sent_to_both)
}


def _main(scene: str, number: int) -> None:
    # The tests may run in the background of a shell, which ignores the signals of keys.
    for each in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(each, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    assert os.listdir("/proc/self/task") == [str(os.getpid())], "another thread may take signals"
    SCENES[scene](number)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
