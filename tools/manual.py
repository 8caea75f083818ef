"""Write man pages and shell completion, made from the parsers of the command line.

    python tools/manual.py DIRECTORY

makes ``man/softsgx.1``, a page for each verb beside it, and ``completion/softsgx.SHELL`` for bash,
zsh, fish, tcsh.  It is for packagers: the wheel has none of these files.  Needs the
dependency group ``manual``.  SOURCE_DATE_EPOCH sets the date of the pages.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import shtab
from argparse_manpage.manpage import Manpage

import softsgx
from softsgx.cli import VERBS, command_of, parser_of, whole_parser

SHELLS = ("bash", "zsh", "fish", "tcsh")
_FILES = {"FILE", "ELF", "PROGRAM"}
_DIRECTORIES = {"DIR", "DIRECTORY"}


def main() -> int:
    """Write the man pages and the completions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    directory: Path = parser.parse_args().directory
    for name, text in (*man_pages(), *completions()):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path)
    return 0


def man_pages() -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each page."""
    whole = whole_parser()
    verbs = "\n".join(f".BR softsgx\\-{verb} (1)" for verb in VERBS)
    yield "man/softsgx.1", _page(whole, "SGX without the hardware") + f".SH SEE ALSO\n{verbs}\n"
    for verb in VERBS:
        summary = (command_of(verb).__doc__ or "").partition("\n")[0].rstrip(".")
        verb_parser = parser_of(verb)
        # The page is named after one word; its synopsis has both.
        usage = verb_parser.format_usage().removeprefix("usage: ")
        verb_parser.usage, verb_parser.prog = " ".join(usage.split()), f"softsgx-{verb}"
        page = _page(verb_parser, summary)
        yield f"man/softsgx-{verb}.1", page + ".SH SEE ALSO\n.BR softsgx (1)\n"


def _page(parser: argparse.ArgumentParser, summary: str) -> str:
    data = {
        "prog": parser.prog,
        "description": summary,
        "project_name": "softsgx",
        "version": softsgx.__version__,
        "manual_section": "1",
        "manual_title": "softsgx",
    }
    # Examples and exit statuses keep their lines.
    notes, parser.epilog = parser.epilog or "", None
    make: Callable[..., object] = Manpage
    page = str(make(parser, format="single-commands-section", _data=data)).rstrip() + "\n"
    return f"{page}.SH NOTES\n.nf\n{_roff(notes)}\n.fi\n"


def _roff(text: str) -> str:
    """Return text with lines that roff does not read as requests."""
    escaped = text.strip("\n").replace("\\", "\\\\").replace("-", r"\-")
    return re.sub(r"^([.'])", r"\\&\1", escaped, flags=re.M)


def completions() -> Iterator[tuple[str, str]]:
    """Yield the name and the text of the completion for each shell."""
    parser = whole_parser()
    for action in _actions(parser):
        if action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in _DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    for shell in SHELLS:
        yield f"completion/softsgx.{shell}", shtab.complete(parser, shell=shell)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)


if __name__ == "__main__":
    sys.exit(main())
