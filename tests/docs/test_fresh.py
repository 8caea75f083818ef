"""The README's and the tutorial's commands work for a reader who has a checkout and a Python.

Method: the tracked files are copied to a new directory, and the pages' commands are run there by
the Python that made this environment.  ``tools/dev.py`` makes a new virtual environment and
installs from the package index, so the tests are skipped where no index can be reached.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.docs.test_pages import IN_A_CHECKOUT, ROOT, run_page
from tests.support.native import needs_tracing

pytestmark = [pytest.mark.slow, needs_tracing, pytest.mark.timeout(1200)]


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("this is not a git checkout")
    return [Path(name) for name in listed.stdout.split("\0") if (ROOT / name).is_file()]


def require_index(directory: Path) -> None:
    """Skip the test when pip cannot fetch a small package."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    done = subprocess.run(
        [*command, "--dest", str(directory), "iniconfig"], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("no package index can be reached")


def test_a_reader_can_do_what_readme_and_tutorial_say(tmp_path: Path) -> None:
    require_index(tmp_path / "index")
    checkout = tmp_path / "softsgx"
    for path in tracked_files():
        copy = checkout / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, copy)
    programs = tmp_path / "programs"
    programs.mkdir()
    python = getattr(sys, "_base_executable", sys.executable)
    (programs / "python3").write_text(f'#!/bin/sh\nexec "{python}" "$@"\n')
    (programs / "python3").chmod(0o755)
    own = Path(sys.executable).parent  # of this environment: nothing in it may help
    others = [part for part in os.environ["PATH"].split(os.pathsep) if Path(part) != own]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
    }
    environment |= {"PATH": os.pathsep.join([str(programs), *others]), "COLUMNS": "90"}
    for page in IN_A_CHECKOUT:
        run_page(page, checkout, environment)
