"""Kills the child processes of a test that goes on long after its timeout: a pytest plugin.

pytest-timeout raises an exception in the test, once.  Where the test then waits for a child on its
way out, as the end of ``with subprocess.Popen(…)`` does, nothing else ends that wait.

A process beside pytest watches (``overdue_watcher.py``).  A thread would need the interpreter,
which a test can hold.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

__all__: list[str] = []

_GRACE_S = 60.0
_PROGRAM = str(Path(__file__).with_name("overdue_watcher.py"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--overdue-grace",
        type=float,
        default=_GRACE_S,
        metavar="SECONDS",
        help="kill the children of a test so long after its timeout (default: %(default).0f)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start the watcher now: standard error is not captured yet."""
    config.pluginmanager.register(_Watched(config.getoption("--overdue-grace")))


class _Watched:
    """Tells the watcher which test runs.

    Args:
        grace_s: time after its timeout that a test has to end.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        read, self._write = os.pipe()
        command = [sys.executable, "-IS", _PROGRAM, str(os.getpid())]
        subprocess.run(command, stdin=read, stdout=subprocess.DEVNULL, check=True)
        os.close(read)

    def pytest_unconfigure(self) -> None:
        os.close(self._write)

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> None:
        after_s = settings.timeout + self._grace_s
        self._tell({"test": item.nodeid, "after_s": after_s, "every_s": self._grace_s})

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_timeout_cancel_timer(self) -> None:
        self._tell({})

    def pytest_enter_pdb(self) -> None:
        """Do not watch: the test takes as long as its reader."""
        self._tell({})

    def _tell(self, message: dict[str, Any]) -> None:
        os.write(self._write, f"{json.dumps(message)}\n".encode())
