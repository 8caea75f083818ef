"""What several verbs need: sizes with units, files that are not overwritten."""

from __future__ import annotations

import argparse
import json
import os
import re
from fractions import Fraction
from pathlib import Path

from softsgx.errors import SoftSgxError

__all__ = ["number", "print_json", "read_file", "size_bytes", "write_file"]

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)")


def size_bytes(text: str) -> int:
    """Return the bytes that ``93.5MiB`` or ``4096`` says; an argparse type."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"size {text!r}; write 4096, 64KiB, 93.5MiB or 1GiB")
    return int(Fraction(match[1]) * _UNITS[match[2]])


def number(text: str) -> int:
    """Return a number in decimal, 0x or 0b notation; an argparse type."""
    try:
        return int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"number {text!r}; write 4 or 0x4") from None


def print_json(document: dict[str, object]) -> None:
    """Print one object."""
    print(json.dumps(document, indent=2))


def read_file(path: str) -> bytes:
    """Return a small file's bytes: a key, a signature."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SoftSgxError(f"{path}: {error.strerror or error}") from error


def write_file(path: str, data: bytes, *, force: bool, private: bool = False) -> None:
    """Write a file that is not there yet; with ``force``, whatever is there.

    Args:
        path: where.
        data: all of it.
        force: whether to replace a file.
        private: make it readable for its owner only.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if force else os.O_EXCL)
    try:
        with open(os.open(path, flags, 0o600 if private else 0o666), "wb") as file:
            file.write(data)
    except FileExistsError:
        raise SoftSgxError(f"{path}: exists; add --force to overwrite it") from None
    except OSError as error:
        raise SoftSgxError(f"{path}: {error.strerror or error}") from error
