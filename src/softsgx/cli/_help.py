"""How help is laid out: as argparse does, without shutil.

argparse makes a formatter for each argument that is added, and asks shutil for the terminal's
width.  shutil imports every compression format there is, which is a tenth of the start of a run.

Source:
    ``argparse.HelpFormatter``; ``shutil.get_terminal_size()``.
"""

from __future__ import annotations

import argparse
import os

__all__ = ["HelpFormatter", "terminal_columns"]

_DEFAULT_COLUMNS = 80
_MARGIN = 2


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions, and fills the terminal."""

    def __init__(
        self,
        prog: str,
        indent_increment: int = 2,
        max_help_position: int = 24,
        width: int | None = None,
    ) -> None:
        width = terminal_columns() - _MARGIN if width is None else width
        super().__init__(prog, indent_increment, max_help_position, width)


def terminal_columns(descriptor: int = 1) -> int:
    """Return COLUMNS, or the columns of the terminal of an output, or 80."""
    try:
        columns = int(os.environ.get("COLUMNS", ""))
    except ValueError:
        columns = 0
    if columns <= 0:
        try:
            columns = os.get_terminal_size(descriptor).columns
        except OSError:
            columns = 0
    return columns if columns > 0 else _DEFAULT_COLUMNS
