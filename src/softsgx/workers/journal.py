"""A file of JSON lines that only grows, so that work can be gone on with after an interruption."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from softsgx.errors import SoftSgxError

__all__ = ["Journal"]


class Journal:
    """See the module.

    Args:
        path: of the file, which is made at the first :meth:`append`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> Iterator[tuple[int, Any]]:
        """Yield the number of each line and what it has; a last line that was cut off is left out.

        Raises:
            SoftSgxError: another line is no JSON.
        """
        if not self.path.exists():
            return
        lines = self.path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
            except ValueError as error:
                if number == len(lines):
                    return
                raise SoftSgxError(f"{self.path}:{number}: no line of softsgx") from error
            yield number, entry

    def append(self, entry: Any) -> None:
        """Add a line; it is in the file when this returns."""
        text = json.dumps(entry, separators=(",", ":"))
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    _drop_last_line(file)
            file.write(text.encode() + b"\n")


def _drop_last_line(file: BinaryIO) -> None:
    """Cut off a line that an interruption has left without its end."""
    file.seek(0)
    whole = file.read().rpartition(b"\n")
    file.truncate(len(whole[0]) + len(whole[1]))
