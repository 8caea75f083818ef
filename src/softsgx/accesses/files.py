"""Opening a trace file of any format.

A trace of another tool is imported into a temporary file first, so all are read in the same way.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from softsgx.accesses.lackey import is_lackey, open_lackey
from softsgx.accesses.messages import CONTINUATION
from softsgx.accesses.oracle_general import open_oracle_general
from softsgx.accesses.reader import TraceReader
from softsgx.accesses.records import Trace
from softsgx.accesses.source import Source, import_trace
from softsgx.accesses.text import open_text
from softsgx.errors import SoftSgxError

__all__ = ["FORMATS", "open_trace", "parse_trace", "read_trace"]

_SOURCES: dict[str, Callable[[BinaryIO, str], Source]] = {
    "text": open_text,
    "lackey": open_lackey,
    "oracleGeneral": open_oracle_general,
}
FORMATS = ("softsgx", *_SOURCES)
"""Names of the formats that are read."""
_BEGINNING_BYTES = 1 << 16


def open_trace(path: str | Path, file_format: str | None = None) -> TraceReader:
    """Open a trace file.

    Args:
        path: the file.
        file_format: one of :data:`FORMATS`; ``None``: detected from the name and the first bytes.

    Raises:
        SoftSgxError: the file cannot be read, or is not a trace of this format.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - the reader closes it
    except OSError as error:
        raise SoftSgxError(f"{path}: {error.strerror or error}") from error
    return parse_trace(file, str(path), file_format)


def parse_trace(file: BinaryIO, name: str, file_format: str | None = None) -> TraceReader:
    """Open a trace in an open file, which the reader closes; see :func:`open_trace`.

    Args:
        file: it can seek, and is read from its beginning.
        name: its name in messages.
        file_format: see :func:`open_trace`.
    """
    try:
        file.seek(0)
        chosen = _detected(file, name) if file_format is None else file_format
        if chosen == "softsgx":
            return TraceReader(file, name)
        with file:
            return _imported(file, name, chosen)
    except OSError as error:
        file.close()
        raise SoftSgxError(f"{name}: {error.strerror or error}") from error
    except SoftSgxError:
        file.close()
        raise


def read_trace(path: str | Path, file_format: str | None = None) -> Trace:
    """Read a whole trace into memory; see :func:`open_trace`.

    Raises:
        SoftSgxError: as :func:`open_trace`; or it has more than ``MOST_ACCESSES``.
    """
    with open_trace(path, file_format) as reader:
        return reader.read()


def _imported(file: BinaryIO, name: str, file_format: str) -> TraceReader:
    if file_format not in _SOURCES:
        raise SoftSgxError(
            f"{name}: unknown format {file_format!r}; give one of {', '.join(FORMATS)}"
        )
    temporary = tempfile.TemporaryFile()  # noqa: SIM115 - the reader closes it
    try:
        import_trace(_SOURCES[file_format](file, name), name, temporary)
        return TraceReader(temporary, name)
    except BaseException:
        temporary.close()
        raise


def _detected(file: BinaryIO, name: str) -> str:
    """Return the format of a file, from its name and its first bytes."""
    beginning = file.read(_BEGINNING_BYTES)
    file.seek(0)
    if beginning.startswith(CONTINUATION):
        return "softsgx"
    if "oraclegeneral" in name.lower():
        return "oracleGeneral"
    if is_lackey(beginning):
        return "lackey"
    if b"\0" in beginning or not beginning.isascii():
        raise SoftSgxError(f"{name}: unknown format; name it, one of {', '.join(FORMATS)}")
    return "text"
