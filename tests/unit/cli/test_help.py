"""Help fills the terminal as argparse's own does, and a run imports nothing for it.

Method: the width is compared with shutil's, and the modules of a fresh interpreter are looked at.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys

import pytest

from softsgx.cli import VERBS, command_of
from softsgx.cli._help import HelpFormatter, terminal_columns


@pytest.mark.parametrize("columns", ["", "0", "-3", "x", "57", "200"])
def test_the_width_is_that_of_shutil(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert terminal_columns() == shutil.get_terminal_size().columns


def test_help_is_laid_out_as_by_argparse(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    for formatter in (HelpFormatter, argparse.RawDescriptionHelpFormatter):
        monkeypatch.setenv("COLUMNS", "50")
        parser = argparse.ArgumentParser(prog="x", description="a\n  b", formatter_class=formatter)
        parser.add_argument("--option", help="word " * 30)
        texts.append(parser.format_help())
    assert texts[0] == texts[1]


def test_a_run_imports_no_module_that_it_does_not_use() -> None:
    code = (
        "import sys; from softsgx.cli import parser_of; parser_of('run')\n"
        "print(*{'json', 'shlex', 'shutil', 'bz2'} & set(sys.modules))"
    )
    argv = [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize("verb", VERBS)
def test_the_list_of_verbs_has_the_first_line_of_each(verb: str) -> None:
    command = command_of(verb)
    assert verb == command.NAME
    assert VERBS[verb] == (command.__doc__ or "").partition("\n")[0]


@pytest.mark.parametrize("words", [["--help"], ["--version"], [], ["bogus"]])
def test_what_concerns_no_verb_imports_none(words: list[str]) -> None:
    code = (
        "import sys; from softsgx.cli import main, VERBS\n"
        f"try: main({words})\n"
        "except SystemExit: pass\n"
        "print('imported:', *[v for v in VERBS if f'softsgx.cli.{v}' in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].strip() == "imported:"
