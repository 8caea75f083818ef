"""numpy and pyarrow, which an extra installs; and the schema of a trace.

Modules of this package that need them import them from here, so a missing one is refused in a line.
"""

from __future__ import annotations

from softsgx.errors import SoftSgxError

try:
    import numpy as np
    import pyarrow as pa
except ImportError as error:
    raise SoftSgxError(
        f"page-access traces: need the package {error.name}; pip install 'softsgx[plan]'"
    ) from error

__all__ = ["COLUMNS", "np", "pa", "schema"]

COLUMNS = ("enclave", "page", "write", "delta_ns")


def schema(metadata: dict[str, str] | None = None) -> pa.Schema:
    """Return the columns of a trace: no nulls, in order of time."""
    kinds = (pa.uint16(), pa.uint32(), pa.bool_(), pa.uint32())
    fields = [
        pa.field(name, kind, nullable=False) for name, kind in zip(COLUMNS, kinds, strict=True)
    ]
    return pa.schema(fields, metadata)
