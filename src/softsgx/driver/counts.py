"""How often things happened to one enclave: plain numbers that only ever grow.

Kept by whoever makes them happen, so that reports cost next to nothing and need no events.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["EnclaveCounts"]


@dataclass(slots=True)
class EnclaveCounts:
    """See the module.

    Deviation: on several threads an increment can be lost where no lock of the enclave is held
    (``faults``, ``fault_ns``, ``kicks``); nothing but reports reads them.

    Attributes:
        faults: page faults by kind: ``minor``, ``major``, ``augment``, ``busy``, ``refused``.
        fault_ns: runtime time spent in page faults, waiting included.
        evictions: pages that left by EWB; SECS and VA pages are not counted.
        reloads: pages that came back by ELDU; likewise.
        kicks: rounds of interrupts.
    """

    faults: dict[str, int] = field(default_factory=dict)
    fault_ns: int = 0
    evictions: int = 0
    reloads: int = 0
    kicks: int = 0
