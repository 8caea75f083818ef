"""Files that tests build: each once in a run of the tests, for all of its workers."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

__all__ = ["Builds"]


class Builds:
    """Directories by name, each filled by the first worker that needs it.

    Tests only read what is in them.
    """

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        base = factory.getbasetemp()
        # pytest-xdist gives each worker a directory of its own in that of the run.
        self._root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "builds"
        self._root.mkdir(exist_ok=True)

    def directory(self, name: str, fill: Callable[[Path], object]) -> Path:
        """Return the directory ``name``; ``fill`` writes its files if it does not exist yet."""
        place = self._root / name
        with (self._root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not place.exists():
                new = self._root / f"{name}.new"
                new.mkdir()
                fill(new)
                new.rename(place)
        return place
