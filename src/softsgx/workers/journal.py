"""A file of JSON lines that only grows, so that interrupted work can continue later."""

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
        path: of the file; the first :meth:`append` creates it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> Iterator[tuple[int, Any]]:
        """Yield the number and the value of each line, without a last line that is cut off.

        Raises:
            SoftSgxError: another line is not JSON.
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
                raise SoftSgxError(f"{self.path}:{number}: not JSON; delete the line") from error
            yield number, entry

    def append(self, entry: Any) -> None:
        """Append a line; the kernel has it when this returns."""
        text = json.dumps(entry, separators=(",", ":"))
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    _drop_last_line(file)
            file.write(text.encode() + b"\n")


def _drop_last_line(file: BinaryIO) -> None:
    """Remove a last line that an interruption has cut off."""
    file.seek(0)
    whole = file.read().rpartition(b"\n")
    file.truncate(len(whole[0]) + len(whole[1]))
