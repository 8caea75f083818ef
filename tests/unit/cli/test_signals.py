"""Signals of a command that runs a program, with the program's process only.

Method: signals to this process before, while and after a child runs in the context of ``waiting``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from softsgx.cli._signals import EndedBySignal, ProgramSignals

NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1]
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
    with signals.waiting(), subprocess.Popen([sys.executable, "-S", "-c", PROGRAM]) as child:
        signals.started(child.pid)
        yield child
        child.kill()
        child.wait()


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", NUMBERS)
def test_one_repetition_of_a_signal_that_the_program_got_is_dropped_after_its_end(
    number: int,
) -> None:
    with ProgramSignals(frozenset()) as signals:
        with program(signals) as child:
            send(number)
            assert -child.wait() == number
        send(number)
        with pytest.raises(EndedBySignal) as ended:
            send(number)
    assert ended.value.number == number


@pytest.mark.parametrize("number", NUMBERS)
def test_a_repetition_that_comes_between_the_programs_end_and_the_reports_is_dropped(
    number: int,
) -> None:
    with ProgramSignals(frozenset()) as signals:
        with program(signals) as child:
            send(number)
            child.wait()
            send(number)  # the thread that passes signals on finds no program
        with pytest.raises(EndedBySignal):
            send(number)


def test_a_signal_of_another_number_after_the_programs_end_ends_the_command() -> None:
    with ProgramSignals(frozenset()) as signals:
        with program(signals) as child:
            send(signal.SIGTERM)
            child.wait()
        with pytest.raises(EndedBySignal) as ended:
            send(signal.SIGINT)
    assert ended.value.number == signal.SIGINT


def test_a_signal_that_never_reached_the_program_ends_the_command() -> None:
    with ProgramSignals(frozenset()) as signals:
        with program(signals):
            pass
        with pytest.raises(EndedBySignal):
            send(signal.SIGTERM)


def test_the_signal_that_ended_the_program_is_dropped_once_whoever_sent_it() -> None:
    with ProgramSignals(frozenset()) as signals:
        with program(signals) as child:
            child.terminate()  # as a sender to the process group, which signals each process
            signals.ended(child.wait())
        send(signal.SIGTERM)
        with pytest.raises(EndedBySignal):
            send(signal.SIGTERM)
