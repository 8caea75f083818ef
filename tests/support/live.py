"""A directory for sockets, whose paths have 107 bytes at most: pytest's own are longer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

__all__ = ["runtime_directory"]


@contextmanager
def runtime_directory() -> Iterator[Path]:
    """Yield what XDG_RUNTIME_DIR can name."""
    with TemporaryDirectory(prefix="softsgx-test-", dir="/tmp") as path:
        yield Path(path)
