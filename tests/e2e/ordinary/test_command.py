"""``softsgx record --as-enclave``: output, trace and refusals of the command.

Goal: the program's output and status are the command's, and the file has what the summary says.
Method: the command in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.native.test_unsupervised import executing, forking
from tests.support.native import needs_tracing

from softsgx.engines.ordinary import can_record

pytest.importorskip("pyarrow")

pytestmark = [
    pytest.mark.skipif(not can_record(), reason="needs userfaultfd for accesses of system calls"),
    needs_tracing,
]


def command(*arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    argv = [sys.executable, "-m", "softsgx", "record", "--as-enclave", *arguments]
    return subprocess.run(argv, input=given, capture_output=True, check=False)


@pytest.mark.slow
def test_the_trace_has_what_the_summary_says_and_the_output_is_the_program_s(
    tmp_path: Path,
) -> None:
    from softsgx.accesses import read_trace

    trace, summary = tmp_path / "sort.trace", tmp_path / "sort.json"
    lines = b"".join(b"%d\n" % (number * 7919 % 10007) for number in range(3000))
    done = command("-o", str(trace), "--json", str(summary), "--", "sort", "-n", given=lines)
    assert done.returncode == 0
    assert done.stdout == b"".join(sorted(lines.splitlines(keepends=True), key=int))
    told, found = json.loads(summary.read_bytes()), read_trace(trace)
    assert found.info.complete
    assert found.info.precision == "intervals"
    assert [(each.name, each.pages > 0) for each in found.info.enclaves] == [("sort", True)]
    assert told["trace"]["accesses"] == len(found.accesses.pages)
    assert told["pages"] == len(set(found.accesses.pages.tolist()))
    assert told["trace"]["writes"] == int(found.accesses.writes.sum())
    assert b"pages" in done.stderr


@pytest.mark.slow
def test_the_trace_says_what_processor_time_the_program_has_used(tmp_path: Path) -> None:
    from softsgx.accesses import open_trace

    # The end of the interpreter takes processor time, too: the program ends without it.
    loop = "import os; sum(range(3 * 10**6)); os.write(1, b'%f' % os.times().user); os._exit(0)"
    done = command("-o", str(tmp_path / "a.trace"), "--", sys.executable, "-c", loop)
    with open_trace(tmp_path / "a.trace") as trace:
        assert trace.info.user_ns / 1e9 == pytest.approx(float(done.stdout), abs=0.05, rel=0.2)
        assert trace.info.user_ns


@pytest.mark.slow
def test_with_an_epc_the_trace_has_the_loads_and_the_summary_the_evictions(tmp_path: Path) -> None:
    from softsgx.accesses import read_trace

    trace, summary = tmp_path / "sort.trace", tmp_path / "sort.json"
    lines = b"".join(b"%d\n" % (number * 7919 % 10007) for number in range(3000))
    options = "-o", str(trace), "--json", str(summary), "--epc", "600KiB"
    done = command(*options, "--", "sort", "-n", given=lines)
    assert done.stdout == b"".join(sorted(lines.splitlines(keepends=True), key=int))
    told, found = json.loads(summary.read_bytes()), read_trace(trace)
    assert (found.info.precision, found.info.epc_pages) == ("faults", 150)
    assert told["loads"] == told["trace"]["accesses"] == len(found.accesses.pages)
    assert told["evictions"] > 0
    assert told["trace"]["epc_bytes"] == 150 * 4096


def test_the_program_s_exit_status_is_the_command_s(tmp_path: Path) -> None:
    done = command("-o", str(tmp_path / "trace"), "--quiet", "--", "/bin/sh", "-c", "exit 5")
    assert (done.returncode, done.stderr) == (5, b"")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--pager", "mprotect"], b"--pager: not possible with --as-enclave"),
        (["--metrics", "nowhere"], b"--metrics nowhere: not an address"),
        (["--cpuid", "host"], b"--cpuid: not possible with --as-enclave"),
        (["--strict"], b"--strict: not possible with --as-enclave"),
        (["--interval", "2s"], b"--interval"),
        (["--interval", "2ms", "--epc", "1MiB"], b"--interval"),
        (["--epc", "8KiB"], b"epc"),
    ],
)
def test_options_of_a_machine_are_refused(options: list[str], text: bytes) -> None:
    done = command(*options, "--", "/bin/true")
    assert done.returncode == 2
    assert done.stderr.startswith(b"softsgx: ")
    assert text in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_a_32_bit_child_runs_and_a_line_says_that_its_pages_do_not_count(tmp_path: Path) -> None:
    small = forking(tmp_path / "small", 7)
    try:
        subprocess.run([small], check=False)
    except OSError:
        pytest.skip("this kernel executes no 32-bit programs")
    script = f"{small}; echo status $?; exec {executing(tmp_path / 'back', ['/bin/echo', 'again'])}"
    done = command("-o", str(tmp_path / "trace"), "--quiet", "--", "/bin/sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, b"status 7\nagain\n")
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 2, "one for each such program that is executed"
    for line, name in zip(lines, ("small", "back"), strict=True):
        assert line.startswith("softsgx: process ")
        assert f"{tmp_path / name}" in line
        assert "32-bit" in line
