"""The commands and scripts on the pages of the documentation work.

Method: each page is a program.  Its blocks are run in order in one directory: files are written,
Python is executed, commands go to one shell.  Output that a page shows must appear in that order,
figures aside.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.docs.pages import RUNNABLE, Block, Command, blocks, commands, shape
from tests.docs.scenes import SCENES
from tests.support.native import needs_tracing

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    page.relative_to(ROOT)
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "examples/README.md"]
    if "_build" not in page.parts
]
IN_A_CHECKOUT = [Path("README.md"), Path("docs/tutorial.md"), Path("examples/README.md")]
_DONE = "-- done --"


def runnable(page: Path) -> list[Block]:
    """Return the blocks of a page that a reader runs or saves."""
    return [block for block in blocks(ROOT / page) if block.caption or block.language in RUNNABLE]


WITH_COMMANDS = [
    page
    for page in PAGES
    if page not in IN_A_CHECKOUT and any(not block.not_run for block in runnable(page))
]


class Shell:
    """One shell, fed command by command."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            ["bash"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=directory,
            env=environment,
        )

    def run(self, command: str) -> tuple[int, list[str]]:
        """Run one command; return its status and the lines it printed."""
        feed, output = self._process.stdin, self._process.stdout
        assert feed is not None
        assert output is not None
        feed.write(f"{{ {command}\n}} </dev/null\nstatus=$?; echo; echo {_DONE} $status\n")
        feed.flush()
        lines: list[str] = []
        for line in output:
            if line.startswith(_DONE):
                return int(line.removeprefix(_DONE)), lines
            lines.append(line.rstrip("\n"))
        raise AssertionError(f"the shell ended in {command!r}: {lines}")

    def close(self) -> None:
        """End the shell."""
        self._process.communicate()


@contextmanager
def shell_in(directory: Path, environment: dict[str, str]) -> Iterator[Shell]:
    shell = Shell(directory, environment)
    try:
        yield shell
    finally:
        shell.close()


def check_command(shell: Shell, block: Block, command: Command) -> None:
    status, printed = shell.run(command.text)
    told = f"{block.where}: {command.text}\n" + "\n".join(printed)
    assert status == 0, f"status {status}: {told}"
    left = iter([shape(line) for line in printed])
    for line in command.output:
        begins = shape(line.removesuffix("…"))
        shown = any(got.startswith(begins) if line.endswith("…") else got == begins for got in left)
        assert shown, f"not printed: {line}\n{told}"


def run_page(page: Path, directory: Path, environment: dict[str, str]) -> None:
    """Do what a page says, in a directory."""
    with shell_in(directory, environment) as shell:
        for block in runnable(page):
            if block.not_run:
                continue
            if block.caption:
                (directory / block.caption).write_text(block.text)
            elif block.language != "python":
                for command in commands(block):
                    check_command(shell, block, command)
            elif not block.text.startswith(">>>"):
                script = directory / f"line{block.line}.py"
                script.write_text(block.text)
                check_command(shell, block, Command(f"python {script.name}", ()))


def environment(programs: Path) -> dict[str, str]:
    """Return an environment in which ``softsgx`` and ``python`` are those that run this test."""
    programs.mkdir()
    starts = {"softsgx": "-m softsgx ", "python": "", "python3": "", "pytest": "-m pytest "}
    for name, arguments in starts.items():
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        program.chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "COLUMNS": "90", "TERM": "dumb"}


@pytest.mark.slow
@needs_tracing
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=str)
def test_what_a_page_tells_the_reader_to_run_works(page: Path, tmp_path: Path) -> None:
    there = environment(tmp_path / "programs")
    directory = tmp_path / "work"
    directory.mkdir()
    scene = SCENES.get(str(page))
    if scene is not None:
        scene(directory)
    run_page(page, directory, there)
