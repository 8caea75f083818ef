"""What the host tells a listener about its guests; guests' own layers have tracers of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from softsgx.trace import Event

__all__ = [
    "ConflictResolved",
    "GuestStopped",
    "PageKept",
    "VepcEvicted",
    "VepcLoaded",
    "VirtualPowerLost",
]


@dataclass(frozen=True, slots=True)
class VepcEvicted(Event):
    """A page of a guest has left the EPC, without the guest.

    Attributes:
        guest: whose.
        gpa: its guest-physical address.
        fate: what the host found it to be: ``child``, ``secs``, ``va``, or ``unused``.
        tries: EWBs it took; 0 where none was needed.
        result: the last one's code or fault.
    """

    NAME: ClassVar[str] = "kvm:vepc_evict"

    guest: str
    gpa: int
    fate: str
    tries: int
    result: str


@dataclass(frozen=True, slots=True)
class VepcLoaded(Event):
    """A page of a guest is back, or there for the first time (``fresh``)."""

    NAME: ClassVar[str] = "kvm:vepc_load"

    guest: str
    gpa: int
    kind: str
    result: str


@dataclass(frozen=True, slots=True)
class PageKept(Event):
    """A page of a guest could not be reclaimed, and why."""

    NAME: ClassVar[str] = "kvm:vepc_keep"

    guest: str
    gpa: int
    reason: str


@dataclass(frozen=True, slots=True)
class ConflictResolved(Event):
    """A guest's leaf met another leaf: ``again`` if it may have been the host's, or ``reflect``."""

    NAME: ClassVar[str] = "kvm:conflict"

    guest: str
    leaf: str
    what: str
    how: str


@dataclass(frozen=True, slots=True)
class GuestStopped(Event):
    """A guest cannot go on."""

    NAME: ClassVar[str] = "kvm:guest_stopped"

    guest: str
    reason: str


@dataclass(frozen=True, slots=True)
class VirtualPowerLost(Event):
    """One guest has lost its EPC, as a machine does in S3, S4, S5 or by reset."""

    NAME: ClassVar[str] = "kvm:power_lost"

    guest: str
