"""Page-access traces, which the literature also calls reference strings: files and importers.

A record of a trace is a read or a write of a page of an enclave, the removal of a page, or the end
of an enclave, with its time.  Recorders write traces with :class:`TraceWriter`.
:func:`open_trace` reads them in chunks of bounded size, and also the formats of other tools.
``docs/reference/trace-format.md`` describes the file.

Needs numpy and pyarrow (``softsgx[plan]``), which are imported at first use.
"""

from typing import TYPE_CHECKING

from softsgx.accesses.description import (
    PAGE_BYTES,
    PRECISIONS,
    VERSION,
    Event,
    Precision,
    TracedEnclave,
    TraceInfo,
)
from softsgx.ondemand import on_demand

if TYPE_CHECKING:
    from softsgx.accesses.files import FORMATS, open_trace, parse_trace, read_trace
    from softsgx.accesses.reader import MOST_ACCESSES, TraceReader
    from softsgx.accesses.records import Chunk, Trace
    from softsgx.accesses.writer import TraceWriter, write_trace

__all__ = [
    "FORMATS",
    "MOST_ACCESSES",
    "PAGE_BYTES",
    "PRECISIONS",
    "VERSION",
    "Chunk",
    "Event",
    "Precision",
    "Trace",
    "TraceInfo",
    "TraceReader",
    "TraceWriter",
    "TracedEnclave",
    "open_trace",
    "parse_trace",
    "read_trace",
    "write_trace",
]

__getattr__ = on_demand(
    __name__,
    {
        "files": ("FORMATS", "open_trace", "parse_trace", "read_trace"),
        "reader": ("MOST_ACCESSES", "TraceReader"),
        "records": ("Chunk", "Trace"),
        "writer": ("TraceWriter", "write_trace"),
    },
)
