"""What the accountant tells a listener."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from softsgx.trace import Event

__all__ = ["ChargeRefused", "VictimKilled"]


@dataclass(frozen=True, slots=True)
class ChargeRefused(Event):
    """A page was not charged: a limit was reached.

    Attributes:
        group: path of the group that was to pay.
        limit: path of the group whose ``misc.max``, or whose capacity, refused.
        usage: bytes charged there.
    """

    NAME: ClassVar[str] = "sgx:charge_refused"

    group: str
    limit: str
    usage: int


@dataclass(frozen=True, slots=True)
class VictimKilled(Event):
    """The last resort: an enclave lost everything so that others can go on.

    Attributes:
        group: path of the group whose limit could not be kept otherwise.
        victim: the enclave or virtual EPC, as its owner names it.
        pages: EPC pages it had there.
    """

    NAME: ClassVar[str] = "sgx:victim_killed"

    group: str
    victim: str
    pages: int
