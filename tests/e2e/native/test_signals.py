"""Signals to ``softsgx run``: the program gets those that it gets without softsgx, at any time.

Method: a command that is sent a signal at a chosen step of its start, of its run, or of its end.
"""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from tests.e2e.native.enclave import COMPILER, NativeBuilds
from tests.support.children import running
from tests.support.native import needs_tracing, needs_userfaultfd

pytestmark = needs_tracing

COMMAND = [sys.executable, "-m", "softsgx", "run", "--epc", "1MiB"]
NAMES = ["INT", "TERM", "HUP", "QUIT"]
TIMEOUT = shutil.which("timeout")

#: The command, which is sent a signal in the given call of itself.
_SIGNALLED = """
import os, sys
from importlib import import_module
place, name, number, group = sys.argv.pop(1).split()
module = import_module(place)
call = getattr(module, name)
def signalled(*arguments, **options):
    setattr(module, name, call)
    result = call(*arguments, **options)
    (os.killpg if int(group) else os.kill)(0 if int(group) else os.getpid(), int(number))
    return result
setattr(module, name, signalled)
from softsgx.cli import main
sys.exit(main())
"""

_BEFORE = [
    "softsgx.cli.run config_of",
    "softsgx.engines.native.run native_platform",
    "softsgx.engines.native.supervisor build_filter",
    "softsgx.engines.native.tracing.start Thread",
    "softsgx.engines.native.tracing.start finish_exec",
    "softsgx.engines.native.images install_vdso",
]


def signalled(
    place: str, name: str, *words: str, group: bool = False
) -> subprocess.CompletedProcess[str]:
    number = getattr(signal, f"SIG{name}")
    command = [sys.executable, "-c", _SIGNALLED, f"{place} {number:d} {group:d}", "run", *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, start_new_session=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "name"), [*zip(_BEFORE, [*NAMES, *NAMES], strict=False), (_BEFORE[2], "INT")]
)
def test_a_signal_before_the_program_runs_ends_it_before_its_first_step(
    place: str, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.json"
    words = ["--quiet", "--json", str(path), "--", "/bin/echo", "ran"]
    done = signalled(place, name, *words)
    assert done.returncode == -getattr(signal, f"SIG{name}")
    assert (done.stdout, done.stderr) == ("", "")  # the pipes end: there is no process left
    assert not path.exists() or json.loads(path.read_text())["signal"]


@pytest.mark.slow
@pytest.mark.parametrize("place", _BEFORE)
def test_a_key_before_the_program_runs_ends_it_before_its_first_step(place: str) -> None:
    done = signalled(place, "INT", "--quiet", "--", "/bin/echo", "ran", group=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", ["softsgx.report document", "softsgx.engines.native.run RunResult"]
)
def test_a_signal_behind_the_programs_end_ends_the_command_and_leaves_no_half_of_a_file(
    place: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.json"
    done = signalled(place, "TERM", "--json", str(path), "--", "/bin/echo", "ran")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "ran\n", "")
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", ["softsgx.report document", "softsgx.engines.native.run RunResult"]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_repetition_of_the_signal_that_ended_the_program_costs_no_report(
    place: str, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.json"
    words = ["--quiet", "--json", str(path), "--", "/bin/sh", "-c", f"kill -{name} $$"]
    assert signalled(place, name, *words).returncode == -getattr(signal, f"SIG{name}")
    assert json.loads(path.read_text())["signal"] == f"SIG{name}"


def test_a_signal_ignored_when_the_command_starts_is_ignored_by_the_program() -> None:
    shell = 'trap "" INT HUP; exec "$@"'
    script = "kill -INT $$; kill -HUP $$; exit 4"
    words = ["/bin/sh", "-c", shell, "sh", *COMMAND, "--quiet", "--", "/bin/sh", "-c", script]
    assert subprocess.run(words, check=False).returncode == 4


def said(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline().strip()


WAITS_FOR_A_SIGNAL = """
signal.pthread_sigmask(signal.SIG_BLOCK, [number])
print("ready", flush=True)
signal.sigwait([number])
print("got", flush=True)
input()
last = input()
print("again" if number in signal.sigpending() else last, flush=True)
raise SystemExit(9)
"""


@pytest.mark.parametrize("name", [*NAMES, "USR1"])
def test_a_signal_sent_to_the_command_alone_reaches_the_program_once(name: str) -> None:
    # Not a trap of a shell: its read waits on where the signal comes just before it.
    script = f"number = signal.SIG{name}" + WAITS_FOR_A_SIGNAL
    command = [*COMMAND, "--quiet", "--", sys.executable, "-S", "-c", f"import signal\n{script}"]
    pipe = subprocess.PIPE
    with running(command, stdin=pipe, stdout=pipe, text=True) as started:
        assert started.stdin is not None
        assert said(started.stdout) == "ready"
        started.send_signal(getattr(signal, f"SIG{name}"))
        assert said(started.stdout) == "got"
        started.stdin.write("one\ntwo\n")
        started.stdin.close()
        assert said(started.stdout) == "two"
        assert started.wait() == 9


@pytest.mark.parametrize("name", [*NAMES, "KILL", "SEGV"])
def test_the_command_ends_by_the_signal_that_ended_the_program(name: str) -> None:
    command = [*COMMAND, "--quiet", "--", "/bin/sh", "-c", f"kill -{name} $$"]
    assert subprocess.run(command, check=False).returncode == -getattr(signal, f"SIG{name}")


def test_a_signal_behind_the_end_of_the_first_process_reaches_those_that_run_on() -> None:
    waits = f"import signal\nnumber = signal.SIGTERM{WAITS_FOR_A_SIGNAL}"
    shell = '"$@" <&3 & exit 6'
    words = ["/bin/bash", "-c", shell, "bash", sys.executable, "-S", "-c", waits]
    outside = ["/bin/bash", "-c", 'exec 3<&0; exec "$@"', "bash", *COMMAND, "--quiet", "--"]
    pipe = subprocess.PIPE
    with running([*outside, *words], stdin=pipe, stdout=pipe, text=True) as started:
        assert said(started.stdout) == "ready"
        while Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text():
            pass
        started.send_signal(signal.SIGTERM)
        assert said(started.stdout) == "got"
        assert started.stdin is not None
        started.stdin.write("one\ntwo\n")
        started.stdin.close()
        assert said(started.stdout) == "two"
        assert started.wait() == 6


@pytest.mark.skipif(TIMEOUT is None, reason="needs timeout(1)")
@pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
def test_a_run_that_timeout_ends_writes_its_reports(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    program = ["sh", "-c", "echo ready; exec sleep 600"]
    command = [*COMMAND, "--quiet", "--json", str(path), "--force", "--", *program]
    for _ in range(2):  # the second signal comes before, at or after the program's end
        words = [str(TIMEOUT), "--signal", name, "600", *command]
        with running(words, group=True, stdout=subprocess.PIPE, text=True) as timeout:
            assert said(timeout.stdout) == "ready"
            timeout.send_signal(signal.SIGALRM)  # its timer's, now
            assert timeout.wait() == 124
        assert json.loads(path.read_text())["signal"] == f"SIG{name}"
        path.unlink()


@contextmanager
def in_terminal(*words: str) -> Iterator[tuple[int, int]]:
    """Run the command in a terminal of its own; yield its process and the terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(COMMAND[0], [*COMMAND, *words])
    try:
        yield pid, terminal
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
@pytest.mark.parametrize(("key", "name"), [(b"\x03", b"INT "), (b"\x1c", b"QUIT ")])
def test_a_key_of_the_terminal_reaches_the_program_once(
    builds: NativeBuilds, key: bytes, name: bytes
) -> None:
    with in_terminal("--quiet", "--", builds.host("keys")) as (pid, terminal):
        shown = b""
        while b"ready" not in shown:
            shown += os.read(terminal, 100)
        os.write(terminal, key)
        while name not in shown:
            shown += os.read(terminal, 100)
        os.write(terminal, b"\n\n")
        _, status = os.waitpid(pid, 0)
    shown += os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 9
    assert (shown.count(b"INT "), shown.count(b"QUIT ")) == (name == b"INT ", name == b"QUIT ")


def test_the_end_of_its_terminal_ends_the_program() -> None:
    program = ["sh", "-c", "echo ready; exec sleep 600"]
    with in_terminal("--", *program) as (pid, terminal):
        shown = b""
        while b"ready" not in shown:
            shown += os.read(terminal, 100)
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGHUP


PASSED_ON = [getattr(signal, f"SIG{name}") for name in [*NAMES, "USR1", "USR2"]]


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("run", ["--metrics", "0"]),
        ("run", ["--status", "--report", "out"]),
        ("run", ["--trace", "out"]),
        ("run", ["--inject", "power-loss@SIGUSR1"]),
        ("record", ["--output", "out"]),
        pytest.param("record", ["--as-enclave", "--output", "out"], marks=needs_userfaultfd),
    ],
    ids=lambda words: words if isinstance(words, str) else words[0],
)
def test_one_thread_at_most_takes_a_signal_from_the_program(
    verb: str, options: list[str], tmp_path: Path
) -> None:
    """Only the thread that passes a signal on, or uses it, may not block it.

    Another thread would run Python's handler, which waits for the main thread, which waits for
    the program.
    """
    if verb == "record":
        pytest.importorskip("pyarrow")
    if "--metrics" in options:
        pytest.importorskip("prometheus_client")
    command = [sys.executable, "-m", "softsgx", verb, "--epc", "1MiB", *options, "--"]
    program = ["sh", "-c", "echo ready; exec sleep 600"]
    pipe = subprocess.PIPE
    with running([*command, *program], stdout=pipe, stderr=pipe, text=True, cwd=tmp_path) as run:
        assert said(run.stdout) == "ready"
        threads = list(Path(f"/proc/{run.pid}/task").iterdir())
        blocked = [blocked_by(thread) for thread in threads]
        for number in PASSED_ON:
            assert len(threads) - sum(number in each for each in blocked) <= 1, number
        run.kill()


def blocked_by(thread: Path) -> set[int]:
    lines = dict(line.split(":", 1) for line in (thread / "status").read_text().splitlines())
    mask = int(lines["SigBlk"], 16)
    return {number for number in signal.valid_signals() if mask >> (number - 1) & 1}
