"""Records ordinary programs as if they ran in enclaves: private memory counts as enclave memory."""

from softsgx.engines.ordinary.progress import Progress, SpaceProgress
from softsgx.engines.ordinary.record import (
    AsEnclaveResult,
    RecordFailed,
    TraceSink,
    can_record,
    record_as_enclave,
)

__all__ = [
    "AsEnclaveResult",
    "Progress",
    "RecordFailed",
    "SpaceProgress",
    "TraceSink",
    "can_record",
    "record_as_enclave",
]
