"""``softsgx run`` and ``softsgx doctor``: what is the program's own stays its own.

Goal: exit status, signals, files, refusals.  Method: a stand-in for the engine that lets enclaves
page on a real platform; the real engine is in ``tests/e2e``.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.support.children import running
from tests.support.driver import BASE, launch
from tests.support.live import runtime_directory

from softsgx import live
from softsgx.cli import doctor as doctor_command
from softsgx.cli import main
from softsgx.cli import run as run_command
from softsgx.engines.native import Finding, RunResult
from softsgx.engines.native.run import Observer
from softsgx.errors import NotRun
from softsgx.host import Platform, PlatformConfig
from softsgx.live import endpoint

FINE = [Finding("ptrace", True, True, "programs can be traced")]
WORSE = [*FINE, Finding("userfaultfd", False, False, "not usable; pager: mprotect")]
MISSING = [Finding("ptrace", False, True, "programs cannot be traced: allow ptrace"), *WORSE[1:]]


@dataclass
class Engine:
    """Stands in for the native engine; remembers how it was called."""

    exit_code: int = 0
    pid: int = 1
    during: Callable[[], object] = lambda: None
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __call__(
        self, argv: list[str], config: PlatformConfig, *, observer: Observer, **options: Any
    ) -> RunResult:
        self.calls.append({"argv": argv, "config": config, **options})
        with Platform(config, tracer=options["tracer"]) as platform:
            observer.attached(platform, "userfaultfd")
            observer.started(self.pid)
            process = platform.process(group=options["group"])
            made = launch(process, 30, base=BASE)
            thread = made.thread()
            for page in range(30):
                thread.store(made.data(page), b"x")
            thread.exit()
            self.during()
            process.exit()
            pages = platform.core.epc_pages
            return RunResult(self.exit_code, "userfaultfd", "events", pages, {}, {"ticks": 3})


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()
    monkeypatch.setattr(run_command, "run_natively", made)
    monkeypatch.setattr("softsgx.cli._program.requirements", lambda: FINE)
    return made


def run(*words: str) -> int:
    return main(["run", "--epc", "112KiB", *words])


@pytest.mark.parametrize(("code", "status"), [(0, 0), (3, 3), (255, 255), (-15, 143), (-9, 137)])
def test_the_exit_status_is_the_programs(engine: Engine, code: int, status: int) -> None:
    engine.exit_code = code
    assert run("--quiet", "--", "app") == status


def test_everything_after_the_dashes_is_the_programs(engine: Engine) -> None:
    run("--quiet", "--", "app", "--epc", "1", "--", "--json")
    assert engine.calls[0]["argv"] == ["app", "--epc", "1", "--", "--json"]


def test_options_of_the_program_need_no_dashes(engine: Engine) -> None:
    run("--quiet", "app", "--json", "x")
    assert engine.calls[0]["argv"] == ["app", "--json", "x"]


def test_the_summary_goes_to_stderr_alone(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--", "app")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "enclave 1 (" in printed.err
    assert "reloads; EWB" in printed.err


def test_quiet_says_nothing(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    run("--quiet", "--", "app")
    assert capsys.readouterr() == ("", "")


def test_json_holds_one_object(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert run("--quiet", "--json", str(path), "--", "app", "x") == 0
    document = json.loads(path.read_text())
    assert document["format"] == "softsgx-run/1"
    assert document["command"] == ["app", "x"]
    assert document["platform"]["epc_bytes"] == 112 << 10
    (enclave,) = document["enclaves"]
    assert enclave["evictions"] > 0
    assert enclave["peak_resident_bytes"] <= 112 << 10


def test_the_state_can_be_asked_for_while_the_program_runs(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with runtime_directory() as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
        found: list[dict[str, Any]] = []
        engine.during = lambda: found.append(live.ask(os.getpid()))
        assert run("--quiet", "--", "app", "x") == 0
        (state,) = found
        assert (state["verb"], state["command"]) == ("run", ["app", "x"])
        assert state["enclaves"][0]["evictions"] > 0
        assert list((directory / "softsgx").iterdir()) == [], "nothing is left"


def test_metrics_can_be_scraped_while_the_program_runs(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    scraped: list[str] = []

    def scrape() -> None:
        told.append(capsys.readouterr().err)
        url = told[0].removeprefix("softsgx: metrics at ").strip()
        with urllib.request.urlopen(url) as answer:
            scraped.append(answer.read().decode())

    engine.during = scrape
    assert run("--quiet", "--metrics", "0", "--", "app") == 0
    assert "softsgx_epc_size_bytes 114688.0" in scraped[0]


def test_metrics_at_a_port_that_is_taken_are_refused_before_the_program_runs(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run("--metrics", port, "--", "app") == 2
    assert not engine.calls
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"softsgx: --metrics {port}: ")


@pytest.mark.parametrize("quiet", [True, False])
def test_a_run_needs_no_directory_for_its_socket(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    monkeypatch.setattr(endpoint, "status_directories", lambda: [Path("/no/such/directory")])
    assert run(*["--quiet"][:quiet], "--", "app") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "status socket" in line]
    assert len(lines) == (not quiet)


@pytest.mark.parametrize(
    "words", [("--inject", "poison@x"), ("--inject", "init=SGX_SUCCESS@1"), ("--tick", "4")]
)
def test_what_cannot_be_injected_is_one_line_and_leaves_no_file(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, str]
) -> None:
    path = tmp_path / "trace"
    assert run(*words, "--trace", str(path), "--", "app") == 2
    assert not engine.calls
    assert not path.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert repr(words[1]) in line


@pytest.mark.parametrize("option", ["--json", "--trace", "--report"])
def test_a_file_that_is_there_is_refused_before_the_program_runs(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    path = tmp_path / "there"
    path.write_text("precious")
    assert run(option, str(path), "--", "app") == 2
    assert not engine.calls
    assert path.read_text() == "precious"
    assert f"{path}: exists; add --force" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--trace", "--report"])
def test_a_file_that_cannot_be_written_is_refused_before_the_program_runs(
    engine: Engine, tmp_path: Path, option: str
) -> None:
    assert run(option, str(tmp_path / "nowhere" / "file"), "--", "app") == 2
    assert not engine.calls


def test_outputs_that_would_be_lost_are_refused_before_the_program_runs(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").mkdir()
    path, again = tmp_path / "file", tmp_path / "x" / ".." / "file"
    assert run("--force", "--json", str(tmp_path), "--", "app") == 2
    assert run("--json", str(path), "--report", str(again), "--", "app") == 2
    assert run("--trace", "-", "--", "app") == 2
    with socket.socket(socket.AF_UNIX) as listener:  # root can write what is read-only
        listener.bind(str(tmp_path / "socket"))
    assert run("--json", str(tmp_path / "socket"), "--force", "--", "app") == 2
    directory, twice, dash, unwritable = capsys.readouterr().err.splitlines()
    assert directory.endswith(": is a directory; choose a file")
    assert twice.endswith(": given twice; choose another file")
    assert dash == "softsgx: -: only --json can be written to standard output; give a file"
    assert unwritable.endswith(
        "socket: cannot be written (No such device or address); choose another file"
    )
    assert not engine.calls
    assert not path.exists()


def test_a_dash_is_standard_output(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--quiet", "--json", "-", "--", "app") == 0
    assert json.loads(capsys.readouterr().out)["exit_status"] == 0


def test_a_full_disk_is_reported_and_the_status_stays_the_programs(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.exit_code = 3
    assert run("--quiet", "--force", "--json", "/dev/full", "--", "app") == 3
    assert capsys.readouterr().err == (
        "softsgx: /dev/full: No space left on device; it is not complete\n"
    )


def test_force_overwrites(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "there"
    path.write_text("old" * 10_000)
    assert run("--quiet", "--json", str(path), "--force", "--", "app") == 0
    assert json.loads(path.read_text())["exit_status"] == 0


def test_a_report_and_a_trace_are_written(engine: Engine, tmp_path: Path) -> None:
    page, trace = tmp_path / "run.html", tmp_path / "run.pftrace"
    assert run("--quiet", "--report", str(page), "--trace", str(trace), "--", "app") == 0
    assert "Resident in the EPC" in page.read_text()
    assert trace.stat().st_size > 10_000


def test_without_a_trace_there_is_no_tracer(engine: Engine) -> None:
    run("--quiet", "--", "app")
    assert engine.calls[0]["tracer"] is None


def test_the_program_runs_in_the_last_group_limited(engine: Engine) -> None:
    run("--quiet", "--limit", "jobs=106KiB", "--limit", "jobs/a=104KiB", "--", "app")
    (call,) = engine.calls
    assert call["group"] == "jobs/a"
    assert call["config"].group_max_pages("jobs") == 26
    assert call["config"].group_max_pages("jobs/a") == 26


def test_a_group_can_be_named(engine: Engine) -> None:
    limits = ("--limit", "jobs=106KiB", "--limit", "other=max")
    run("--quiet", *limits, "--group", "jobs", "--", "app")
    assert engine.calls[0]["group"] == "jobs"
    run("--quiet", *limits, "--group", "/", "--", "app")
    assert engine.calls[1]["group"] == "/"
    assert engine.calls[1]["config"].group_max_pages("other") is None


def test_a_group_that_is_not_configured_is_refused(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--limit", "jobs=106KiB", "--group", "typo", "--", "app") == 2
    told = capsys.readouterr().err
    assert told.startswith("softsgx: group typo: not configured (configured: jobs); add --limit")
    assert not engine.calls


def test_sizes_that_are_rounded_down_are_reported(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--epc", "3.3MiB", "--", "app")
    assert "softsgx: epc = '3.3MiB': rounded down to 844 pages (3376KiB)" in capsys.readouterr().err


def test_options_win_over_the_file(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "platform.toml"
    path.write_text('epc = "1GiB"\nseed = 9\n[groups.a]\nmax = "1MiB"\n')
    run("--quiet", "--config", str(path), "--limit", "b=104KiB", "--", "app")
    config = engine.calls[0]["config"]
    assert (config.section_bytes(), config.seed) == ([112 << 10], 9)
    assert (config.group_max_pages("a"), config.group_max_pages("b")) == (256, 26)


@pytest.mark.parametrize(
    "words",
    [
        ["--limit", "jobs", "--", "app"],
        ["--limit", "=1MiB", "--", "app"],
        ["--epc", "many", "--", "app"],
        ["--cpus", "0", "--", "app"],
        ["--cpus", "100000", "--", "app"],
        ["--pager", "magic", "--", "app"],
    ],
)
def test_impossible_options_are_refused(engine: Engine, words: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["run", *words])
    assert refused.value.code == 2
    assert not engine.calls


def test_a_program_is_needed(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert capsys.readouterr().err.startswith("softsgx: run: no program")


def test_a_program_that_cannot_start_is_reported_in_one_line_and_leaves_no_file(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def refuse(*_args: object, **_options: object) -> RunResult:
        raise NotRun("/no/app: No such file or directory", 127)

    monkeypatch.setattr(run_command, "run_natively", refuse)
    path = tmp_path / "run.json"
    assert run("--json", str(path), "--", "/no/app") == 127
    assert not path.exists()
    assert capsys.readouterr().err == "softsgx: /no/app: No such file or directory\n"


def test_a_machine_that_cannot_is_sent_to_the_doctor(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("softsgx.cli._program.requirements", lambda: MISSING)
    assert run("--", "app") == 125
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("softsgx: ptrace: programs cannot be traced")
    assert "softsgx doctor" in line
    assert not engine.calls


def test_strict_is_for_the_engine(engine: Engine) -> None:
    run("--quiet", "--", "app")
    run("--quiet", "--strict", "--", "app")
    assert [call.get("strict", False) for call in engine.calls] == [False, True]


@pytest.mark.parametrize("name", ["TERM", "USR1", "USR2", "INT", "QUIT", "HUP"])
def test_signals_are_passed_on(engine: Engine, name: str) -> None:
    number = getattr(signal, f"SIG{name}")
    with running(["sleep", "1000"]) as program:
        engine.pid = program.pid

        def during() -> None:
            os.kill(os.getpid(), number)
            program.wait(60)  # not in one call: another thread may receive the signal

        engine.during = during
        assert run("--quiet", "--", "app") == 0
        assert program.returncode == -number


def test_log_lines_of_a_run_begin_with_the_commands_name(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.during = lambda: logging.getLogger("softsgx.engines").warning("process 7 is ended")
    assert run("--quiet", "--", "app") == 0
    assert capsys.readouterr().err == "softsgx: process 7 is ended\n"


def test_handlers_are_as_before_afterwards(engine: Engine) -> None:
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    run("--quiet", "--", "app")
    assert before == {number: signal.getsignal(number) for number in signal.valid_signals()}


def test_a_status_line_is_taken_away_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shown = threading.Event()
    write = run_command._Watch._write

    def note(text: str) -> None:
        write(text)
        shown.set()

    monkeypatch.setattr(run_command, "_STATUS_AFTER_S", 0.0)
    monkeypatch.setattr(run_command._Watch, "_write", staticmethod(note))
    engine.during = lambda: shown.wait(30)
    assert run("--quiet", "--status", "--", "app") == 0
    printed = capfd.readouterr().err
    assert printed.startswith("\rsoftsgx: ")
    assert printed.endswith("\r\x1b[K")


def test_no_status_line_without_a_terminal(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_command, "_STATUS_AFTER_S", 0.0)
    run("--quiet", "--", "app")
    assert capfd.readouterr().err == ""


# --- thresholds ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "threshold", "status"),
    [
        (0, "evictions>0", 124),
        (0, "evictions>100000", 0),
        (3, "evictions>0", 3),
        (-15, "evictions>0", 143),
        (3, "exit_status==3", 3),
    ],
)
def test_a_threshold_changes_no_status_but_success(
    engine: Engine, code: int, threshold: str, status: int
) -> None:
    engine.exit_code = code
    assert run("--quiet", "--fail-if", threshold, "--", "app") == status


def test_each_threshold_that_is_exceeded_is_one_line_though_quiet(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("evictions>0", "evictions<0", "enclaves.eenter==1")
    options = [word for text in words for word in ("--fail-if", text)]
    assert run("--quiet", *options, "--", "app") == 124
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("softsgx: --fail-if 'evictions>0': verdict.evictions is ")
    assert second == "softsgx: --fail-if enclaves.eenter==1: enclaves.eenter is 1"


def test_a_threshold_on_no_field_is_refused_before_the_program_runs(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    assert run("--fail-if", "evicted>0", "--json", str(path), "--", "app") == 2
    assert not engine.calls
    assert not path.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert "no run has the field evicted" in line


# --- doctor -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("findings", "status", "engine_name"),
    [(FINE, 0, "native"), (WORSE, 0, "native"), (MISSING, 1, None)],
)
def test_doctor_says_whether_programs_can_be_run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    findings: list[Finding],
    status: int,
    engine_name: str | None,
) -> None:
    monkeypatch.setattr(doctor_command, "doctor", lambda: findings)
    monkeypatch.setattr(doctor_command, "choose_pager", lambda: "mprotect")
    assert main(["doctor", "--json"]) == status
    document = json.loads(capsys.readouterr().out)
    assert document["engine"] == engine_name
    assert document["pager"] == (engine_name and "mprotect")
    assert [finding["name"] for finding in document["findings"]] == [f.name for f in findings]
    assert main(["doctor"]) == status
    printed = capsys.readouterr().out
    assert all(finding.text.split(":")[0] in printed for finding in findings)
    last = "engine native, pager mprotect" if engine_name else "cannot run here; missing:"
    assert last in printed.splitlines()[-1]


def test_an_interrupt_before_the_program_starts_ends_the_command_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("softsgx.cli.run.check_machine", interrupted)
    assert main(["run", "--", "/bin/true"]) == 128 + signal.SIGINT
    assert capsys.readouterr() == ("", "")
