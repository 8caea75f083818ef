"""``softsgx record`` on the real engine: its file is readable, its status is the program's.

Method: a compiled program that uses pages of an enclave as its arguments say, started as a user
starts it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.native.enclave import COMPILER, compile_host, write_enclave
from tests.support.native import needs_tracing

from softsgx.accesses import read_trace
from softsgx.errors import SoftSgxError

DATA_PAGES = 24
COMMAND = [sys.executable, "-m", "softsgx", "record"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    needs_tracing,
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("record")
    enclave = write_enclave(directory / "enclave", DATA_PAGES)
    return [str(compile_host(directory, "recorded")), str(enclave)]


def record(*words: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, check=False, cwd=cwd, **options
    )


@pytest.mark.parametrize(
    ("options", "precision", "epc_pages", "interval_ns"),
    [
        ([], "intervals", 23936, 10_000_000),
        (["--interval", "50ms", "--epc", "1MiB"], "intervals", 256, 50_000_000),
        (["--precision", "faults"], "faults", 256, 0),
        (["--precision", "faults", "--epc", "100KiB"], "faults", 25, 0),
    ],
)
def test_the_file_and_the_summary_agree(
    program: list[str],
    tmp_path: Path,
    options: list[str],
    precision: str,
    epc_pages: int,
    interval_ns: int,
) -> None:
    words = " ".join(f"p{page} g{page}" for page in range(DATA_PAGES)).split()
    done = record("--json", "-", *options, "--", *program, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    trace = read_trace(tmp_path / "recorded.trace")
    info, counts = trace.info, summary["trace"]
    assert (info.precision, info.epc_pages) == (precision, epc_pages)
    assert (info.interval_ns, info.complete) == (interval_ns, True)
    assert [enclave.name for enclave in info.enclaves] == ["recorded 1"]
    assert counts["accesses"] == len(trace.accesses) >= DATA_PAGES
    assert counts["writes"] == int(trace.accesses.writes.sum())
    assert counts["bytes"] == (tmp_path / "recorded.trace").stat().st_size
    assert counts["enclaves"] == 1
    assert 0 < summary["overhead"]["share_of_wall"] < 1
    assert f"recorded.trace: {counts['accesses']:,} accesses" in done.stderr
    assert "next: softsgx plan recorded.trace" in done.stderr


def test_what_was_written_is_readable_when_the_recorder_is_killed(
    program: list[str], tmp_path: Path
) -> None:
    pipe, copy = tmp_path / "pipe", tmp_path / "copy"
    os.mkfifo(pipe)
    words = [*COMMAND, "--force", "-o", str(pipe), "--", *program, "p0", "g1", "r"]
    with (
        subprocess.Popen(words, stderr=subprocess.PIPE, start_new_session=True) as recorder,
        pipe.open("rb", buffering=0) as source,
        copy.open("ab", buffering=0) as kept,
    ):
        while accesses_of(copy) < 100:
            kept.write(source.read(1 << 16))
        recorder.kill()
        assert recorder.wait() == -9
        assert recorder.stderr is not None
        recorder.stderr.read()  # ends when the program has ended, which has it too
        kept.write(source.read())
    trace = read_trace(copy)
    assert not trace.info.complete
    assert len(trace.accesses) >= 100
    assert [enclave.name for enclave in trace.info.enclaves] == ["recorded 1"]


def accesses_of(path: Path) -> int:
    try:
        return len(read_trace(path).accesses)
    except SoftSgxError:  # not even the schema is there
        return 0


def test_a_program_that_is_killed_leaves_a_complete_file(
    program: list[str], tmp_path: Path
) -> None:
    done = record("-o", "trace", "--", *program, "g0", "k", cwd=tmp_path)
    assert done.returncode == -9
    assert read_trace(tmp_path / "trace").info.complete


def test_a_program_without_enclaves_has_an_empty_trace(tmp_path: Path) -> None:
    done = record("-o", "trace", "--", "sh", "-c", "echo here; exit 7", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (7, "here\n")
    assert "used no enclave" in done.stderr
    assert len(read_trace(tmp_path / "trace").accesses) == 0


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["--", "/no/such/program"], 127, "/no/such/program: "),
        (["--interval", "2s", "--", "true"], 2, "--interval '2s': "),
        (["--precision", "faults", "--interval", "2ms", "--", "true"], 2, "--interval: "),
        (["-o", "-", "--", "true"], 2, "-: "),
        (["-o", "no/such/directory", "--", "true"], 2, "no/such/directory: "),
        ([], 2, "record: no program; "),
    ],
)
def test_a_refusal_is_one_line_and_leaves_no_file(
    tmp_path: Path, words: list[str], status: int, told: str
) -> None:
    done = record(*words, cwd=tmp_path)
    assert done.returncode == status
    assert done.stderr.startswith(f"softsgx: {told}")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    (tmp_path / "true.trace").write_text("kept")
    done = record("--", "true", cwd=tmp_path)
    assert done.returncode == 2
    assert "true.trace: exists; add --force" in done.stderr
    assert (tmp_path / "true.trace").read_text() == "kept"
