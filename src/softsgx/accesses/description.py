"""The description of a trace, and its form in the file: JSON in Arrow's metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, get_args

__all__ = [
    "BATCH_KEY",
    "MOST_BATCH_RECORDS",
    "MOST_ENCLAVES",
    "MOST_PAGES",
    "PAGE_BYTES",
    "PRECISIONS",
    "TRACE_KEY",
    "VERSION",
    "VERSIONS",
    "Event",
    "Precision",
    "TraceInfo",
    "TracedEnclave",
    "batch_text",
    "read_batch_text",
    "read_trace_text",
    "trace_text",
]

VERSION = 2
"""The version of the format that is written."""
VERSIONS = (1, 2)
"""The versions that are read: version 1 has no records of removed pages and ended enclaves."""
PAGE_BYTES = 4096
MOST_ENCLAVES = 1 << 16
"""Enclaves of one file: their numbers have 16 bits."""
MOST_PAGES = 1 << 32
"""Pages of one enclave: their numbers have 32 bits."""
MOST_BATCH_RECORDS = 1 << 20
"""Records of one batch that a reader takes; it bounds the reader's memory."""
TRACE_KEY, BATCH_KEY = "softsgx.trace", "softsgx.batch"
"""Keys of the metadata of the schema, and of a batch."""

Precision = Literal["accesses", "faults", "intervals"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


class Event(IntEnum):
    """What happens to the page of a record."""

    READ = 0
    WRITE = 1
    REMOVED = 2
    """The page is removed from its enclave; a later access is to a new page."""
    ENDED = 3
    """The enclave ends with all its pages; the record's page is 0."""


_MOST_NS = (1 << 64) - 1
_MOST_PID = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class TracedEnclave:
    """One address range with its pages: an enclave, or a process recorded as an enclave.

    Attributes:
        number: its number in the file, from 0.
        name: of the enclave's file or the program, for display.
        pages: size of the range; page numbers are below it.
        pid: the process that made it; 0 if there was none.
    """

    number: int
    name: str
    pages: int
    pid: int


@dataclass(frozen=True, slots=True)
class TraceInfo:
    """What a trace is a trace of.

    Attributes:
        version: of the format.
        precision: ``accesses``: every access.  ``faults``: every load of a page by the pager, at an
            EPC of ``epc_pages``.  ``intervals``: a page's first access in each interval.
        interval_ns: length of an interval; 0 for the other precisions.
        epc_pages: size of the EPC during the recording; 0: it was never full.
        program: the command line.
        page_bytes: 4096.
        timed: times are nanoseconds of a clock; otherwise they count accesses or instructions.
        enclaves: in order of their numbers.
        complete: the recorder closed the file.  Otherwise the file ends with the last batch that
            is whole.
        late_intervals: how many intervals took more than twice ``interval_ns``.
        user_ns: processor time that the program used in user mode; 0: the recorder does not say.
        resolution_ns: times are rounded down to a multiple of it.
    """

    version: int
    precision: Precision
    interval_ns: int
    epc_pages: int
    program: str
    page_bytes: int
    timed: bool
    enclaves: tuple[TracedEnclave, ...]
    complete: bool
    late_intervals: int = 0
    user_ns: int = 0
    resolution_ns: int = 1


def trace_text(info: TraceInfo) -> str:
    """Return the metadata of the schema, in JSON: the fields that are known at the start."""
    fields = {
        "version": info.version,
        "precision": info.precision,
        "interval_ns": info.interval_ns,
        "epc_pages": info.epc_pages,
        "program": info.program,
        "page_bytes": info.page_bytes,
        "timed": info.timed,
        "resolution_ns": info.resolution_ns,
    }
    return json.dumps(fields)


def read_trace_text(text: bytes) -> TraceInfo:
    """Parse the metadata of a schema; the result has no enclaves and is not complete.

    Raises:
        ValueError: the text is not what :func:`trace_text` returns; the message has the problem.
    """
    fields = _object(text)
    version = _number(fields, "version", _MOST_NS)
    if version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise ValueError(f"version {version} of the format, where this softsgx reads {known}")
    precision, page_bytes = _text(fields, "precision"), _number(fields, "page_bytes", _MOST_NS)
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision, not one of {', '.join(PRECISIONS)}")
    if page_bytes != PAGE_BYTES:
        raise ValueError(f"pages of {page_bytes} bytes, where those of an EPC have {PAGE_BYTES}")
    if not isinstance(timed := fields.get("timed"), bool):
        raise ValueError("timed is not true or false in the metadata")
    return TraceInfo(
        version=version,
        precision=precision,
        interval_ns=_number(fields, "interval_ns", _MOST_NS),
        epc_pages=_number(fields, "epc_pages", MOST_PAGES),
        program=_text(fields, "program"),
        page_bytes=page_bytes,
        timed=timed,
        enclaves=(),
        complete=False,
        resolution_ns=max(1, _number({"resolution_ns": 1} | fields, "resolution_ns", _MOST_NS)),
    )


def batch_text(
    start_ns: int, enclaves: list[TracedEnclave], late_intervals: int, user_ns: int
) -> str:
    """Return the metadata of a batch.

    Args:
        start_ns: the time to which the batch's first ``delta_ns`` is added.
        enclaves: those that are new, or have grown.
        late_intervals: how many there were until now.
        user_ns: the program's processor time in user mode; 0: the program has not ended.
    """
    described = [
        {"number": one.number, "name": one.name, "pages": one.pages, "pid": one.pid}
        for one in enclaves
    ]
    fields = {
        "start_ns": start_ns,
        "enclaves": described,
        "late_intervals": late_intervals,
        "user_ns": user_ns,
    }
    return json.dumps(fields)


def read_batch_text(text: bytes) -> tuple[int, list[TracedEnclave], int, int]:
    """Return the arguments of :func:`batch_text`.

    Raises:
        ValueError: as :func:`read_trace_text`.
    """
    fields = _object(text)
    described = fields.get("enclaves")
    if not isinstance(described, list) or not all(isinstance(one, dict) for one in described):
        raise ValueError("a batch without a list of enclaves")
    enclaves = [
        TracedEnclave(
            number=_number(one, "number", MOST_ENCLAVES - 1),
            name=_text(one, "name"),
            pages=_number(one, "pages", MOST_PAGES),
            pid=_number(one, "pid", _MOST_PID),
        )
        for one in described
    ]
    fields = {"late_intervals": 0, "user_ns": 0} | fields
    late_intervals = _number(fields, "late_intervals", _MOST_NS)
    user_ns = _number(fields, "user_ns", _MOST_NS)
    return _number(fields, "start_ns", _MOST_NS), enclaves, late_intervals, user_ns


def _object(text: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("metadata that is not JSON") from error
    if not isinstance(fields, dict):
        raise ValueError("metadata that is not a JSON object")
    return fields


def _number(fields: dict[str, Any], key: str, most: int) -> int:
    value = fields.get(key)
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{key} is not from 0 to {most} in the metadata")
    return value


def _text(fields: dict[str, Any], key: str) -> Any:
    value = fields.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} is not a string in the metadata")
    return value
