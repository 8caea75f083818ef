"""Ordinary programs, recorded as if they were enclosed: private memory counts as enclave memory."""

from softsgx.engines.ordinary.record import (
    AsEnclaveResult,
    RecordFailed,
    TraceSink,
    can_record,
    record_as_enclave,
)

__all__ = ["AsEnclaveResult", "RecordFailed", "TraceSink", "can_record", "record_as_enclave"]
