"""``softsgx run`` on the real engine: its output matches the program's behaviour.

Goal: the command from its arguments to its files.  Method: a compiled program that pages inside an
enclave, started as a user starts it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.native.enclave import COMPILER, NativeBuilds

from softsgx.engines.native import doctor

DATA_PAGES = 100
EPC = "256KiB"
COMMAND = [sys.executable, "-m", "softsgx", "run"]

_LACKING = [finding.text for finding in doctor() if finding.needed and not finding.ok]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    pytest.mark.skipif(bool(_LACKING), reason=f"this machine cannot: {'; '.join(_LACKING)}"),
]


@pytest.fixture(scope="module")
def program(builds: NativeBuilds) -> list[str]:
    return [builds.host(), builds.enclave(DATA_PAGES)]


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, check=False, **options
    )


def test_paging_of_a_program_is_reported(program: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    done = run("--epc", EPC, "--json", str(path), "--", *program, "paging")
    assert (done.returncode, done.stdout) == (0, "")
    assert "The EPC was too small: " in done.stderr
    assert "enclave 1 (" in done.stderr
    document = json.loads(path.read_text())
    (enclave,) = document["enclaves"]
    # Three rounds, each of which writes and reads every page that does not fit.
    assert enclave["eenter"] == enclave["eexit"] == 3 * 2 * DATA_PAGES
    assert enclave["reloads"] >= 3 * 2 * (DATA_PAGES - 64)
    assert enclave["evictions"] >= enclave["reloads"]
    assert enclave["ewb"] >= enclave["evictions"]
    # What EENTER itself needs comes back without an exit.
    assert enclave["aex"] == enclave["eresume"] >= 3 * 2 * (DATA_PAGES - 64)
    assert enclave["peak_resident_bytes"] < 256 << 10 == document["platform"]["epc_bytes"]
    assert enclave["faults_by_kind"]["busy"] == 0, "ksgxd works ahead while the thread is stopped"
    assert enclave["state"] == "initialized"
    assert 0 < enclave["fault_seconds"] < document["wall_seconds"]
    counters = document["platform"]["counters"]
    assert counters["eldu"] - counters["secs_in"] - counters["va_in"] == enclave["reloads"]
    assert counters["etrack"] == enclave["etrack"]


def test_counts_with_a_trace_are_those_without(program: list[str], tmp_path: Path) -> None:
    found = []
    for name, options in (("plain", []), ("traced", ["--trace", str(tmp_path / "trace")])):
        path = tmp_path / name
        run("--epc", EPC, "--quiet", "--json", str(path), *options, "--", *program, "paging")
        found.append(json.loads(path.read_text())["enclaves"][0])
    plain, traced = found
    assert plain["eenter"] == traced["eenter"]
    assert abs(plain["reloads"] - traced["reloads"]) < 0.2 * plain["reloads"]
    assert (tmp_path / "trace").stat().st_size > 10_000


def test_a_report_shows_the_run(program: list[str], tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    run("--epc", EPC, "--quiet", "--report", str(page), "--", *program, "paging")
    assert "Resident in the EPC" in page.read_text()


def test_output_input_and_status_are_the_programs() -> None:
    script = "read x; echo got $x; echo bad >&2; exit 7"
    done = run("--quiet", "--", "sh", "-c", script, input="word\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, "got word\n", "bad\n")


@pytest.mark.parametrize("program", ["/no/such/program", "no-such-program", "/", "", "{}"])
def test_a_program_that_cannot_be_run_has_the_status_that_env_gives(
    program: str, tmp_path: Path
) -> None:
    name = program.format(tmp_path / "not-executable")
    (tmp_path / "not-executable").write_text("exit 5")
    plain = subprocess.run(["env", name], capture_output=True, check=False)
    done = run("--", name)
    assert done.returncode == plain.returncode in (126, 127)
    assert done.stderr.startswith(f"softsgx: {name or repr(name)}: ")
    assert done.stderr.count("\n") == 1


def test_a_script_that_names_no_interpreter_is_run_by_the_shell(tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_text("exit $1")
    path.chmod(0o755)
    assert run("--quiet", "--", str(path), "5").returncode == 5


@pytest.mark.parametrize("where", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>&1", "2>&1 | :"])
def test_the_status_is_the_programs_wherever_output_goes(where: str) -> None:
    line = f"{' '.join(COMMAND)} --json - -- sh -c 'exit 7' {where}"
    shell = ["/bin/bash", "-o", "pipefail", "-c", line]
    assert subprocess.run(shell, check=False).returncode == 7


def test_what_is_closed_is_closed_in_the_program() -> None:
    line = f"{' '.join(COMMAND)} --quiet -- sh -c '[ -e /proc/$$/fd/0 ] || exit 6' <&-"
    assert subprocess.run(["/bin/bash", "-c", line], check=False).returncode == 6
