"""Show how one page is evicted from the EPC and loaded again, leaf by leaf.

The tour builds a signed enclave on a software machine of 64 EPC pages and enters it.  It evicts one
page under the running thread, changes the ciphertext, and loads the page again.  Every line is an
event that the machine reported.

Examples:
  softsgx tour
  softsgx tour --json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby

from rich.console import Console
from rich.table import Table

from softsgx.cli._common import print_json
from softsgx.sim import Chapter, Line, paging_tour

__all__ = ["NAME", "configure", "run"]

NAME = "tour"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the machine's keys (default 0)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the tour and print it."""
    chapters = paging_tour(args.seed)
    if args.json:
        print_json({"chapters": [asdict(chapter) for chapter in chapters]})
        return 0
    console = Console(highlight=False)
    for number, chapter in enumerate(chapters, 1):
        console.print(f"\n[bold]{number}. {chapter.title}[/bold]")
        console.print(f"[dim]{chapter.notice}[/dim]")
        console.print(_table(chapter))
    console.print(
        "\nsoftsgx is an emulation: it protects nothing from the owner of this machine.",
        style="dim",
    )
    return 0


def _table(chapter: Chapter) -> Table:
    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for line, count in _counted(chapter.lines):
        times = f"  ×{count}" if count > 1 else ""
        style = "green" if line.result == "SGX_SUCCESS" else "yellow"
        table.add_row(line.what + times, line.page, f"[{style}]{line.result}[/{style}]")
    return table


def _counted(lines: list[Line]) -> Iterator[tuple[Line, int]]:
    """Yield consecutive lines of one leaf on one page with one result as one, with their number."""

    def key(line: Line) -> tuple[str, str, str]:
        page = line.page.split("+")[0]
        return line.what, page, line.result

    for _, same in groupby(lines, key):
        first, *rest = same
        yield first, 1 + len(rest)
