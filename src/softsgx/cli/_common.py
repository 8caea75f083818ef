"""Helpers of several verbs: sizes with units, files that are not overwritten, messages."""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TextIO

from softsgx.errors import SoftSgxError
from softsgx.ondemand import logged_by
from softsgx.sizes import parse_size

if TYPE_CHECKING:
    import logging
    from pathlib import Path

__all__ = [
    "absolute",
    "discard",
    "log_to_stderr",
    "number",
    "print_json",
    "read_file",
    "size_as_written",
    "size_bytes",
    "takes_styles",
    "tell",
    "utc_now",
    "write_file",
]


def size_bytes(text: str) -> int:
    """Return the bytes of :func:`softsgx.sizes.parse_size`; an argparse type."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"size {text!r}: {error}") from None


def size_as_written(text: str) -> str:
    """Return the text of a size after checking it; an argparse type.

    The platform's configuration rounds it down to pages and names it in its messages.
    """
    size_bytes(text)
    return text


def number(text: str) -> int:
    """Return a number in decimal, 0x or 0b notation; an argparse type."""
    try:
        return int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"number {text!r}; write 4 or 0x4") from None


def tell(line: str) -> None:
    """Write a line to standard error, if that can be written to."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        discard(2)


def takes_styles(file: TextIO) -> bool:
    """Return whether colours and bold text may be written to a file: it is a terminal.

    Source:
        no-color.org; force-color.org; terminfo(5) (``dumb``).
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return file.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def utc_now() -> str:
    """Return date and time in ISO 8601, to the second: ``2026-01-31T23:59:58+00:00``."""
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())


def log_to_stderr() -> AbstractContextManager[None]:
    """Write what softsgx logs to standard error."""
    return logged_by(_stderr_handler)


def _stderr_handler() -> logging.Handler:
    import logging

    class StderrHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            """Write a record behind the name of the command."""
            tell(f"softsgx: {self.format(record)}")

    return StderrHandler()


def absolute(path: str) -> Path:
    """Return the absolute form of a path.

    Raises:
        SoftSgxError: the working directory was deleted.
    """
    from pathlib import Path  # a run names no files

    try:
        return Path(path).absolute()
    except FileNotFoundError:
        raise SoftSgxError(
            f"{path}: the working directory was deleted; change to another"
        ) from None


def discard(descriptor: int) -> None:
    """Discard all output to a descriptor from now on, also what its buffer holds."""
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, descriptor)
    os.close(null)


def print_json(document: dict[str, object]) -> None:
    """Print one object."""
    import json

    print(json.dumps(document, indent=2))


def read_file(path: str) -> bytes:
    """Return a small file's bytes: a key, a signature."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise SoftSgxError(f"{path}: {error.strerror or error}") from error


def write_file(path: str, data: bytes, *, force: bool, private: bool = False) -> None:
    """Write a new file; with ``force``, replace an existing one.

    Args:
        path: of the file.
        data: its whole content.
        force: whether to replace an existing file.
        private: whether only its owner can read it.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if force else os.O_EXCL)
    try:
        with open(os.open(path, flags, 0o600 if private else 0o666), "wb") as file:
            file.write(data)
    except FileExistsError:
        raise SoftSgxError(f"{path}: exists; add --force to overwrite it") from None
    except OSError as error:
        raise SoftSgxError(f"{path}: {error.strerror or error}") from error
