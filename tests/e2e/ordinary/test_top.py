"""``softsgx top`` and Prometheus beside ``record --as-enclave``.

Goal: they show the recorded program, with intervals and with an EPC, and change nothing of it.
Method: ``programs/waits.c`` uses 200 pages twice, then waits for a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.e2e.ordinary.recording import COMPILER, compile_program
from tests.support.live import SOFTSGX, Terminal, runtime_directory, top
from tests.support.native import needs_tracing

from softsgx.engines.ordinary import can_record

pytest.importorskip("pyarrow")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    pytest.mark.skipif(not can_record(), reason="needs userfaultfd for accesses of system calls"),
    needs_tracing,
]

PAGES = 200
EPC_BYTES = 600 << 10


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compile_program(tmp_path_factory.mktemp("top"), "waits")


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    with runtime_directory() as path:
        yield {**os.environ, "XDG_RUNTIME_DIR": str(path), "TERM": "xterm", "LANG": "C.UTF-8"}


class Recorded:
    """A recording whose program has used its pages and waits."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.pid = process, process.pid
        assert process.stdout is not None
        self.program = int(process.stdout.readline())

    def end(self) -> str:
        """Let the program end; return what the command has told."""
        told = self.process.communicate("\n")[1]
        assert self.process.returncode == 0
        return told


@contextmanager
def recorded(
    program: str, directory: Path, environment: dict[str, str], *options: str
) -> Iterator[Recorded]:
    command = [*SOFTSGX, "record", "--as-enclave", "--quiet", "-o", str(directory / "trace")]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*command, *options, "--", program],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=environment,
    ) as process:
        try:
            yield Recorded(process)
        finally:
            process.kill()


def state_of(run: Recorded, environment: dict[str, str]) -> dict[str, Any]:
    told = json.loads(top("--once", "--json", str(run.pid), env=environment).stdout)
    (state,) = told["runs"]
    found: dict[str, Any] = state
    return found


def test_a_recording_by_intervals_says_what_the_program_has_used(
    program: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    with recorded(program, tmp_path, environment) as run:
        state = state_of(run, environment)
        (space,) = state["enclaves"]
        assert (state["verb"], state["as_enclave"], state["epc"]) == ("record", True, None)
        assert (space["number"], space["pids"], space["name"]) == (0, [run.program], "waits")
        assert state["recording"]["interval_seconds"] == 0.01
        assert state["recording"]["used_bytes"] >= PAGES * 4096
        assert state["totals"]["faults"] == space["faults"] >= PAGES
        assert state["totals"]["fault_seconds"] > 0
        assert state["rates"]["faults_per_second"] > 0
        run.end()
    assert list(Path(environment["XDG_RUNTIME_DIR"]).rglob("*.sock")) == []


def test_a_recording_in_an_epc_says_what_was_paged(
    program: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    summary = tmp_path / "json"
    options = "--epc", str(EPC_BYTES), "--json", str(summary)
    with recorded(program, tmp_path, environment, *options) as run:
        state = state_of(run, environment)
        run.end()
    told = json.loads(summary.read_text())
    (space,) = state["enclaves"]
    assert state["epc"]["size_bytes"] == EPC_BYTES
    assert 0 < space["resident_bytes"] <= state["epc"]["used_bytes"] <= EPC_BYTES
    totals = state["totals"]
    assert totals["evictions"] >= space["evictions"] > 0
    assert totals["reloads"] == space["reloads"] > 0
    assert totals["evictions"] <= told["evictions"]
    # Each page is added once; all other loads are reloads.
    assert totals["reloads"] <= told["loads"] - told["pages"]
    assert [group["path"] for group in state["groups"]] == ["/"]


@pytest.mark.parametrize("columns", [50, 80])
@pytest.mark.parametrize("options", [(), ("--epc", str(EPC_BYTES))], ids=["intervals", "epc"])
def test_a_terminal_shows_the_recording_until_q(
    program: str,
    tmp_path: Path,
    environment: dict[str, str],
    options: tuple[str, ...],
    columns: int,
) -> None:
    with recorded(program, tmp_path, environment, *options) as run:
        terminal = Terminal(str(run.pid), env=environment, columns=columns)
        shown = terminal.until(str(run.program).encode())
        assert (b"EPC  " if options else b"used  ") in shown
        os.write(terminal.master, b"q")
        assert terminal.end() == 0
        run.end()


@pytest.mark.parametrize("options", [(), ("--epc", str(EPC_BYTES))], ids=["intervals", "epc"])
def test_prometheus_scrapes_the_recording(
    program: str, tmp_path: Path, environment: dict[str, str], options: tuple[str, ...]
) -> None:
    with recorded(program, tmp_path, environment, "--metrics", "0", *options) as run:
        assert run.process.stderr is not None
        url = run.process.stderr.readline().removeprefix("softsgx: metrics at ").strip()
        with urllib.request.urlopen(url) as answer:
            text = answer.read().decode()
        state = state_of(run, environment)
        run.end()
    samples = {
        sample.name: sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    info = samples["softsgx_run_info"].labels
    assert (info["verb"], info["program"]) == ("record", program)
    assert samples["softsgx_enclave_resident_bytes"].labels["pid"] == str(run.program)
    assert samples["softsgx_enclave_resident_bytes"].labels["name"] == "waits"
    accesses = samples["softsgx_recorded_accesses_total"].value
    assert accesses <= state["recording"]["accesses"]
    assert accesses >= (0 if options else PAGES), "what is in no ended interval is not counted yet"
    assert ("softsgx_epc_size_bytes" in samples) == bool(options)
    if options:
        # The program may load pages until it waits for its line.
        assert 0 < samples["softsgx_reloads_total"].value <= state["totals"]["reloads"]


def test_metrics_at_a_port_that_is_taken_end_the_command_before_the_program_starts(
    program: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    with recorded(program, tmp_path, environment, "--metrics", "0") as run:
        assert run.process.stderr is not None
        port = run.process.stderr.readline().rpartition(":")[2].partition("/")[0]
        command = [*SOFTSGX, "record", "--as-enclave", "-o", str(tmp_path / "other")]
        done = subprocess.run(
            [*command, "--metrics", port, "--", program],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        run.end()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"softsgx: --metrics {port}: ")
    assert done.stderr.count("\n") == 1
