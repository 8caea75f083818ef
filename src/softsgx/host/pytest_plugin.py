"""The pytest plugin: fixtures with a simulated platform, and with real programs that use SGX.

With the distribution ``pytest-softsgx`` (``plugins/pytest-softsgx`` of a checkout), pytest loads it
automatically; otherwise name it in ``conftest.py``::

    pytest_plugins = ["softsgx.host.pytest_plugin"]

    def test_my_library(sgx_platform):
        process = sgx_platform.process()

    @pytest.mark.sgx_platform(epc="112KiB")
    def test_my_library_under_pressure(sgx_platform): ...

    def test_my_program_fits(sgx_run):
        done = sgx_run("./app", "--fast", epc="16MiB")
        assert done.returncode == 0 and not done.report["verdict"]["evictions"]

It is a separate distribution because pytest rewrites the assertions of every module of a
distribution with a plugin; softsgx has thousands of assertions, which are on in every run.  This
module has none, and pytest may find it in both ways at once: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from softsgx.host.platform import Platform

__all__ = ["SgxRun", "SgxRunner", "pytest_configure", "sgx_platform", "sgx_run"]

_TIMEOUT_S = 120.0


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker that configures the fixture."""
    config.addinivalue_line(
        "markers", "sgx_platform(**config): fields of softsgx.PlatformConfig for the fixture"
    )


@pytest.fixture
def sgx_platform(request: pytest.FixtureRequest) -> Iterator[Platform]:
    """A started platform; at the end its counts are checked against raw state."""
    # Imported here: a test run without a platform does not need it.
    from softsgx.host.platform import Platform

    marker = request.node.get_closest_marker("sgx_platform")
    keywords = marker.kwargs if marker else {}
    with Platform(**keywords) as platform:
        yield platform
        platform.check()


@dataclass(frozen=True, slots=True)
class SgxRun:
    """How a program ended.

    Attributes:
        returncode: the program's exit status, -n when signal n ended it.
        stdout, stderr: its output.
        report: the object that ``softsgx run --json`` writes.
    """

    returncode: int
    stdout: str
    stderr: str
    report: Mapping[str, Any]


class SgxRunner:
    """Runs programs under ``softsgx run``.

    Args:
        directory: for the reports.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._numbers = directory, count(1)

    def __call__(
        self,
        *argv: str | Path,
        epc: str | None = None,
        options: Sequence[str] = (),
        input: str | None = None,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = _TIMEOUT_S,
    ) -> SgxRun:
        """Run a program; return how it ended.

        A failing program does not fail the test: assert the ``returncode``.

        Args:
            argv: the program and its arguments.
            epc: size of the EPC.
            options: of ``softsgx run``, as on its command line.
            input: the program's standard input.
            cwd: its working directory.
            env: its environment instead of this process' own.
            timeout: seconds; a program that takes longer is killed.

        Raises:
            subprocess.TimeoutExpired: it took longer.
            Failed: the program could not be run; the test fails with the reason.
        """
        file = self._directory / f"run{next(self._numbers)}.json"
        size = [] if epc is None else ["--epc", epc]
        command = [sys.executable, "-m", "softsgx", "run", "--quiet", "--json", str(file)]
        done = subprocess.run(
            [*command, *size, *options, "--", *map(str, argv)],
            input=input,
            capture_output=True,
            text=True,
            cwd=cwd,
            env=env,
            timeout=timeout,
            check=False,
        )
        if not file.exists() or not file.read_bytes():  # the program did not run
            reason = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
            pytest.fail(f"sgx_run: {reason} (status {done.returncode})")
        report = json.loads(file.read_text())
        status = report["exit_status"]
        code = done.returncode if status is None else int(status)
        ended = code if status is not None or code < 0 else 128 - code
        return SgxRun(ended, done.stdout, done.stderr, report)


@pytest.fixture
def sgx_run(tmp_path_factory: pytest.TempPathFactory) -> SgxRunner:
    """Runs a program under ``softsgx run``: see :class:`SgxRunner`."""
    return SgxRunner(tmp_path_factory.mktemp("softsgx"))
