"""Standard output and the working directory: what is wrong with them is one line.

Method: commands in processes of their own, as a shell starts them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = f"{sys.executable} -m softsgx"


def shell(line: str, **options: object) -> subprocess.CompletedProcess[str]:
    words = ["/bin/bash", "-c", line]
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("words", ["tour", "tour --json", "doctor", "doctor --json"])
def test_a_full_disk_behind_standard_output_is_one_line(words: str) -> None:
    done = shell(f"{COMMAND} {words} >/dev/full")
    assert done.returncode == 1
    assert done.stderr == "softsgx: standard output: No space left on device\n"


@pytest.mark.slow
def test_a_reader_that_has_enough_is_no_failure_to_tell() -> None:
    done = shell(f"{COMMAND} tour | head -c 10")
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_files_are_no_failure(closed: str) -> None:
    done = shell(f"{COMMAND} tour {closed}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", ["build x.c", "build --host x.c x.c", "inspect x", "load x", "run --json x -- true"]
)
def test_a_deleted_working_directory_is_one_line(tmp_path: Path, words: str) -> None:
    done = shell(f"mkdir gone && cd gone && rmdir ../gone && {COMMAND} {words}", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("softsgx: x") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_program_runs_in_a_deleted_working_directory(tmp_path: Path) -> None:
    line = f"mkdir gone && cd gone && rmdir ../gone && {COMMAND} run --quiet -- /bin/echo hi"
    done = shell(line, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hi\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("heap", ["1TiB", "17GiB"])
def test_a_heap_that_would_take_minutes_to_measure_is_refused_at_once(
    tmp_path: Path, heap: str
) -> None:
    done = shell(f"{COMMAND} build --heap {heap} x.c", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("softsgx: --heap ") and done.stderr.endswith(" to 16GiB\n")
