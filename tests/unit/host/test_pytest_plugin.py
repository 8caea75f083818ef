"""The fixtures that other projects' tests use, and how pytest finds them."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tests.support.native import needs_tracing

import softsgx
from softsgx.host.pytest_plugin import SgxRunner

ROOT = Path(__file__).parents[3]
PLUGIN = ROOT / "plugins" / "pytest-softsgx"


def test_the_fixture_is_a_running_platform(sgx_platform: softsgx.Platform) -> None:
    assert sgx_platform.driver is not None
    assert sgx_platform.config == softsgx.PlatformConfig()


@pytest.mark.sgx_platform(epc="112KiB", seed=5)
def test_the_marker_configures_it(sgx_platform: softsgx.Platform) -> None:
    assert sgx_platform.core.epc_pages == 28
    assert sgx_platform.config.seed == 5


def test_the_package_names_only_what_it_has() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Platfrom'"):
        softsgx.Platfrom  # noqa: B018


@pytest.mark.slow
@needs_tracing
def test_a_program_is_run_with_its_input_and_a_report(sgx_run: SgxRunner) -> None:
    script = "read word; echo got $word; echo bad >&2; exit 7"
    done = sgx_run("sh", "-c", script, input="it\n", epc="1MiB")
    assert (done.returncode, done.stdout, done.stderr) == (7, "got it\n", "bad\n")
    assert done.report["platform"]["epc_bytes"] == 1 << 20
    assert done.report["exit_status"] == 7


@pytest.mark.slow
@needs_tracing
def test_a_signal_that_ends_the_program_is_reported_as_subprocess_does(sgx_run: SgxRunner) -> None:
    done = sgx_run("sh", "-c", "kill -TERM $$")
    assert done.returncode == -15
    assert done.report["signal"] == "SIGTERM"


def test_a_program_that_cannot_be_run_fails_the_test_with_the_reason(sgx_run: SgxRunner) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"^sgx_run: .*seven"):
        sgx_run("true", epc="seven")


USER = """
import sys
from _pytest.assertion.rewrite import AssertionRewritingHook

def test_platform(sgx_platform):
    process = sgx_platform.process()
    assert process is not None
    rewritten = [name for name, module in sys.modules.items() if name.partition(".")[0] == "softsgx"
                 and isinstance(module.__spec__.loader, AssertionRewritingHook)]
    assert rewritten == []

def test_run(sgx_run):
    assert callable(sgx_run)
"""


def installed(site: Path) -> None:
    """Put the plugin where pip would, without building it."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    info = site / f"pytest_softsgx-{project['version']}.dist-info"
    info.mkdir(parents=True)
    info.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    (points,) = project["entry-points"]["pytest11"].items()
    info.joinpath("entry_points.txt").write_text(f"[pytest11]\n{points[0]} = {points[1]}\n")
    modules = list(PLUGIN.glob("*.py"))
    for module in modules:
        site.joinpath(module.name).write_text(module.read_text())
    record = [*(module.name for module in modules), f"{info.name}/METADATA"]
    info.joinpath("RECORD").write_text("".join(f"{name},,\n" for name in record))


@pytest.mark.slow
@pytest.mark.parametrize("named", ["", 'pytest_plugins = ["softsgx.host.pytest_plugin"]'])
def test_pytest_finds_the_plugin_and_rewrites_no_assertion_of_the_package(
    tmp_path: Path, named: str
) -> None:
    """Also where a ``conftest.py`` names the module that pytest has found already."""
    site, tests = tmp_path / "site", tmp_path / "tests"
    installed(site)
    tests.mkdir()
    tests.joinpath("conftest.py").write_text(named)
    tests.joinpath("test_user.py").write_text(USER)
    path = os.pathsep.join([str(site), str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", str(tests)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr
