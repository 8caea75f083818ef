"""Counts of enclaves while a run lasts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.ondemand import dataclass

if TYPE_CHECKING:
    from softsgx.driver import Enclave
    from softsgx.hw import Crossings

__all__ = ["LivingEnclave", "Totals"]


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over enclaves: faults, evictions and reloads of pages, seconds in faults, crossings."""

    faults: int = 0
    evictions: int = 0
    reloads: int = 0
    fault_s: float = 0.0
    eenter: int = 0
    eexit: int = 0
    aex: int = 0
    eresume: int = 0

    @classmethod
    def of(cls, enclave: Enclave, crossings: Crossings) -> Totals:
        """Return what one enclave has so far."""
        counts = enclave.counts
        return cls(
            faults=sum(list(counts.faults.values())),
            evictions=counts.evictions,
            reloads=counts.reloads,
            fault_s=counts.fault_ns / 1e9,
            eenter=crossings.eenter,
            eexit=crossings.eexit,
            aex=crossings.aex,
            eresume=crossings.eresume,
        )

    def __add__(self, other: Totals) -> Totals:
        names = Totals.__slots__
        return Totals(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclass(frozen=True, slots=True)
class LivingEnclave:
    """An enclave that exists, and what it has done so far.

    Attributes:
        enclave: the driver's.
        state: ``building``, ``initialized``, ``killed``.
        mrenclave: hexadecimal; ``None`` before EINIT.
        totals: of this enclave.
    """

    enclave: Enclave
    state: str
    mrenclave: str | None
    totals: Totals
