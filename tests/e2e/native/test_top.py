"""``softsgx top`` beside real runs, in a pseudo-terminal and in pipes.

Goal: it shows what runs, leaves the terminal as it was, and ends with the runs.  Method: a program
that pages, then waits for a line; the terminal's settings before and after.  Other runs of this
user may be there, too.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.e2e.native.enclave import COMPILER, compile_host, write_enclave
from tests.support import children
from tests.support.live import ALTERNATE_OFF, SOFTSGX, Terminal, runtime_directory, top
from tests.support.native import needs_tracing

pytestmark = [
    pytest.mark.slow,
    needs_tracing,
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
]

DATA_PAGES = 100


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("top")
    enclave = write_enclave(directory / "enclave", DATA_PAGES)
    return [str(compile_host(directory)), str(enclave), "waits"]


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    with runtime_directory() as path:
        yield {**os.environ, "XDG_RUNTIME_DIR": str(path), "TERM": "xterm", "LANG": "C.UTF-8"}


class Running:
    """A run whose program has paged and waits."""

    def __init__(self, words: list[str], environment: dict[str, str]) -> None:
        command = [*SOFTSGX, "run", "--quiet", "--epc", "256KiB", "--limit", "jobs=200KiB", "--"]
        self.process = subprocess.Popen(
            [*command, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.pid = self.process.pid
        assert self.process.stdout is not None
        self.program = int(self.process.stdout.readline())

    def end(self) -> int:
        self.process.communicate("\n")
        return self.process.returncode


@contextmanager
def running(
    words: list[str], environment: dict[str, str], many: int = 1
) -> Iterator[list[Running]]:
    with ExitStack() as stack:
        found = []
        for _ in range(many):
            run = Running(words, environment)
            stack.enter_context(run.process)
            stack.callback(run.process.kill)
            found.append(run)
        yield found


def test_top_says_what_the_run_itself_says_at_its_end(
    words: list[str], environment: dict[str, str]
) -> None:
    with running(words, environment) as (run,):
        document = json.loads(top("--once", "--json", str(run.pid), env=environment).stdout)
        (state,) = document["runs"]
        (enclave,) = state["enclaves"]
        assert (state["pid"], enclave["pids"]) == (run.pid, [run.program])
        assert enclave["name"] == Path(words[0]).name
        assert enclave["group"] == "/jobs"
        assert state["totals"]["reloads"] >= 3 * 2 * (DATA_PAGES - 64)
        assert state["rates"]["faults_per_second"] > 0
        assert run.end() == 0
    assert top("--once", str(run.pid), env=environment).returncode == 2


@pytest.mark.parametrize("columns", [60, 80])
def test_a_terminal_shows_the_run_until_q(
    words: list[str], environment: dict[str, str], columns: int
) -> None:
    with running(words, environment) as (run,):
        terminal = Terminal(str(run.pid), env=environment, columns=columns)
        shown = terminal.until(str(run.program).encode())
        assert b"VA pages" in shown
        os.write(terminal.master, b"q")
        assert terminal.end() == 0
        assert run.end() == 0


def test_control_c_and_sigterm_leave_the_terminal_as_it_was(
    words: list[str], environment: dict[str, str]
) -> None:
    with running(words, environment) as (run,):
        terminal = Terminal(str(run.pid), env=environment)
        terminal.until(str(run.program).encode())
        os.write(terminal.master, b"\x03")
        assert terminal.end() == 0
        terminal = Terminal(str(run.pid), env=environment)
        terminal.until(str(run.program).encode())
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end() == -signal.SIGTERM


def test_a_run_that_ends_while_it_is_shown_ends_the_drawing(
    words: list[str], environment: dict[str, str]
) -> None:
    with running(words, environment) as (run,):
        terminal = Terminal(str(run.pid), env=environment)
        terminal.until(str(run.program).encode())
        assert run.end() == 0
        assert terminal.end() == 0
    # The enclave may be gone already at the last look, the run itself is not.
    after = terminal.seen.partition(ALTERNATE_OFF)[2]
    assert f"{run.pid} run: ".encode() in after, "the last look stays on the terminal"
    assert b"all programs have ended" in after


def test_a_run_that_is_killed_ends_the_stream(
    words: list[str], environment: dict[str, str]
) -> None:
    with running(words, environment) as (run,):
        command = [*SOFTSGX, "top", "--json", "--interval", "0.05", str(run.pid)]
        with children.running(command, stdout=subprocess.PIPE, env=environment) as stream:
            assert stream.stdout is not None
            lines: list[Any] = [json.loads(stream.stdout.readline()) for _ in range(3)]
            run.process.kill()
            lines += map(json.loads, stream.stdout)
        assert stream.returncode == 0
        times = [line["runs"][0]["elapsed_seconds"] for line in lines if line["runs"]]
        assert times == sorted(times)
    assert list(Path(environment["XDG_RUNTIME_DIR"]).rglob("*.sock")) == []


def test_one_of_two_runs_can_be_chosen(words: list[str], environment: dict[str, str]) -> None:
    with running(words, environment, 2) as (first, second):
        both = json.loads(top("--once", "--json", env=environment).stdout)
        assert {state["pid"] for state in both["runs"]} >= {first.pid, second.pid}
        one = json.loads(top("--once", "--json", str(second.pid), env=environment).stdout)
        assert [state["pid"] for state in one["runs"]] == [second.pid]
        none = top("--once", "1", env=environment)
        assert none.returncode == 2
        assert none.stderr.startswith("softsgx: 1: not a run of softsgx; ")
        assert none.stderr.count("\n") == 1


def test_prometheus_scrapes_what_the_run_says_at_its_end(
    words: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    options = ["--quiet", "--epc", "256KiB", "--metrics", "0", "--json", str(tmp_path / "json")]
    with children.running(
        [*SOFTSGX, "run", *options, "--", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        program = process.stdout.readline().strip()
        url = process.stderr.readline().removeprefix("softsgx: metrics at ").strip()
        with urllib.request.urlopen(url) as answer:
            text = answer.read().decode()
        process.communicate("\n")
    samples = {
        sample.name: sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    document = json.loads((tmp_path / "json").read_text())
    assert samples["softsgx_epc_size_bytes"].value == 256 << 10
    assert samples["softsgx_enclave_resident_bytes"].labels["pid"] == program
    assert samples["softsgx_reloads_total"].value == document["enclaves"][0]["reloads"] > 0


def test_a_program_that_is_recorded_is_shown_too(
    words: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    command = [*SOFTSGX, "record", "--quiet", "-o", str(tmp_path / "trace"), "--", *words]
    with children.running(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        program = int(process.stdout.readline())
        found = top("--once", "--json", str(process.pid), env=environment)
        process.communicate("\n")
    (state,) = json.loads(found.stdout)["runs"]
    assert (state["verb"], state["pid"]) == ("record", process.pid)
    assert state["enclaves"][0]["pids"] == [program]
    assert process.returncode == 0
    assert list(Path(environment["XDG_RUNTIME_DIR"]).rglob("*.sock")) == []


def test_output_that_is_no_terminal_is_refused(environment: dict[str, str]) -> None:
    done = top(env=environment)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_a_program_finds_nothing_of_the_socket(environment: dict[str, str]) -> None:
    script = "ls -l /proc/self/fd; ls $XDG_RUNTIME_DIR/softsgx"
    done = subprocess.run(
        [*SOFTSGX, "run", "--quiet", "--", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    descriptors, name = done.stdout.rsplit("\n", 2)[:2]
    assert re.fullmatch(r"\d+\.sock", name), "the socket is there when the program starts"
    assert "socket:" not in descriptors
