"""Counts of events of one enclave, for reports without a tracer."""

from __future__ import annotations

from collections.abc import MutableMapping

from softsgx.compiled import record
from softsgx.ondemand import dataclass, field
from softsgx.paging.counters import Tally

__all__ = ["EnclaveCounts"]


@dataclass(slots=True)
@record
class EnclaveCounts:
    """Events of one enclave since it was opened; each number only grows.

    With several threads an increment can be lost where the enclave's lock is not held (``faults``,
    ``fault_ns``, ``kicks``); only reports read these numbers.

    Attributes:
        faults: page faults by kind: ``minor``, ``major``, ``augment``, ``busy``, ``refused``.
        touched: pages that a fault has mapped at least once; a page that is removed and added
            again counts twice.
        fault_ns: time spent in page faults, waiting included.
        evictions: pages evicted by EWB, without SECS and VA pages.
        reloads: pages loaded by ELDU, without SECS and VA pages.
        kicks: rounds of interrupts.
    """

    faults: MutableMapping[str, int] = field(default_factory=Tally)
    touched: int = 0
    fault_ns: int = 0
    evictions: int = 0
    reloads: int = 0
    kicks: int = 0
