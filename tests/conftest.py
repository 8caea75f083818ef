"""Options that all tests share."""

from __future__ import annotations

import signal

import pytest
from hypothesis import settings
from tests.support import modes
from tools import speedups as builder

from softsgx import compiled

# No deadline: the time of one example says more about the load of the machine than about the code.
settings.register_profile("softsgx", deadline=None)
# A quick run tries fewer examples, where a test does not say how many it needs.
settings.register_profile("quick", deadline=None, max_examples=30)

pytest_plugins = ["softsgx.host.pytest_plugin", "tests.support.overdue"]


def pytest_configure(config: pytest.Config) -> None:
    """Choose the number of examples, and the signals of programs that tests start.

    Programs get the signals of a terminal, not those of a shell's jobs.

    A shell without job control starts a command with ``&`` so that it ignores SIGINT and SIGQUIT,
    nohup one that ignores SIGHUP, and what is ignored stays ignored over execve.
    """
    _require_current_core()
    settings.load_profile("quick" if "not slow" in config.option.markexpr else "softsgx")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})  # in this thread alone
    mode = config.getoption("--native-mode")
    if mode:
        try:
            modes.apply_everywhere(mode)
        except ValueError as error:
            raise pytest.UsageError(f"--native-mode: {error}") from None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Let the threads of workers block SIGCHLD, as far as no test runs in them.

    Where another thread of the supervisor may take SIGCHLD, faults are signals and no events.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})


def _require_current_core() -> None:
    """Refuse a compiled core that was built from other sources: tests of it would mean nothing."""
    if compiled.speedups is not None and not builder.is_current():
        raise pytest.UsageError(
            f"{builder.TARGET}: was built from other sources; run python tools/dev.py core"
        )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="record tests/golden anew instead of comparing"
    )
    parser.addoption(
        "--native-mode",
        metavar="WORDS",
        help=f"run programs of the native engine in other modes: {', '.join(modes.WORDS)}",
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether recorded results are to be written anew."""
    return bool(request.config.getoption("--update-golden"))
