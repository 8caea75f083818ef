"""Events of the groups."""

from __future__ import annotations

from typing import ClassVar

from softsgx.ondemand import dataclass
from softsgx.trace import Event

__all__ = ["ChargeRefused", "VictimKilled"]


@dataclass(frozen=True, slots=True)
class ChargeRefused(Event):
    """A charge was refused at a limit.

    Attributes:
        group: path of the group to be charged.
        limit: path of the group whose ``misc.max`` refused; the root for the capacity.
        usage: bytes charged there.
    """

    NAME: ClassVar[str] = "sgx:charge_refused"

    group: str
    limit: str
    usage: int


@dataclass(frozen=True, slots=True)
class VictimKilled(Event):
    """An enclave or a guest was killed as a last resort.

    Attributes:
        group: path of the group in whose subtree no page could be evicted.
        victim: the name of the enclave or guest.
        pages: EPC pages that it had in that subtree.
    """

    NAME: ClassVar[str] = "sgx:victim_killed"

    group: str
    victim: str
    pages: int
