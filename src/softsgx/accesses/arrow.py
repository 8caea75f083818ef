"""numpy and pyarrow, which an extra installs; and the schema of a trace.

Modules of this package that need them import them from here, so a missing one is reported in one
line.
"""

from __future__ import annotations

from softsgx.errors import SoftSgxError

try:
    import numpy as np
    import pyarrow as pa
except ImportError as error:
    raise SoftSgxError(
        f"page-access traces: package {error.name} is missing; pip install 'softsgx[plan]'"
    ) from error

__all__ = ["np", "pa", "schema"]

_EVENTS = {1: ("write", pa.bool_()), 2: ("event", pa.uint8())}
"""The column with the event, by version of the format: version 1 has accesses only."""


def schema(metadata: dict[str, str] | None = None, version: int = 2) -> pa.Schema:
    """Return the columns of a trace: no nulls, in order of time."""
    columns = (
        ("enclave", pa.uint16()),
        ("page", pa.uint32()),
        _EVENTS[version],
        ("delta_ns", pa.uint32()),
    )
    fields = [pa.field(name, kind, nullable=False) for name, kind in columns]
    return pa.schema(fields, metadata)
