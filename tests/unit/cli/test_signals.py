"""Signals of a command that runs a program, with the program's process only.

Method: signals to a process before, while and after a child runs in the context of ``waiting``.
Each scene has a process of its own (``signal_scenes.py`` says why).
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.children import running

ROOT = Path(__file__).parents[3]
NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1]


def play(scene: str, number: int) -> None:
    """Play a scene; nothing of it is left when this returns or raises."""
    command = [sys.executable, "-m", "tests.unit.cli.signal_scenes", scene, f"{number:d}"]
    with running(command, group=True, cwd=ROOT, stderr=subprocess.PIPE, text=True) as child:
        _, said = child.communicate()
        assert child.returncode == 0, said


@pytest.mark.parametrize("number", NUMBERS)
def test_one_repetition_of_a_signal_that_the_program_got_is_dropped_after_its_end(
    number: int,
) -> None:
    play("repeated", number)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_repetition_that_comes_between_the_programs_end_and_the_reports_is_dropped(
    number: int,
) -> None:
    play("repeated_early", number)


def test_a_signal_of_another_number_after_the_programs_end_ends_the_command() -> None:
    play("other", signal.SIGINT)


def test_a_signal_that_never_reached_the_program_ends_the_command() -> None:
    play("never_reached", signal.SIGTERM)


def test_the_signal_that_ended_the_program_is_dropped_once_whoever_sent_it() -> None:
    play("sent_to_both", signal.SIGTERM)
