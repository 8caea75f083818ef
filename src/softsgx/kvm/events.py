"""Events of the host about its guests.  The layers inside a guest have tracers of their own."""

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
    """The host has evicted a page of a guest.

    Attributes:
        guest: the guest's name.
        gpa: the page's guest-physical address.
        kind: what the page is: ``child``, ``secs``, ``va``, or ``unused``.
        tries: how many EWBs it took; 0 for a page that the guest does not use.
        result: the last EWB's code or fault.
    """

    NAME: ClassVar[str] = "kvm:vepc_evict"

    guest: str
    gpa: int
    kind: str
    tries: int
    result: str


@dataclass(frozen=True, slots=True)
class VepcLoaded(Event):
    """A page of a guest was loaded, or taken for the first time (``kind`` is ``fresh``)."""

    NAME: ClassVar[str] = "kvm:vepc_load"

    guest: str
    gpa: int
    kind: str
    result: str


@dataclass(frozen=True, slots=True)
class PageKept(Event):
    """A page of a guest could not be reclaimed; ``reason`` says why."""

    NAME: ClassVar[str] = "kvm:vepc_keep"

    guest: str
    gpa: int
    reason: str


@dataclass(frozen=True, slots=True)
class ConflictResolved(Event):
    """A leaf of a guest was in conflict with another leaf.

    Attributes:
        guest: the guest's name.
        leaf: the leaf.
        what: the conflict.
        how: ``again``: the host was at work, so the guest executes the leaf again; ``reflect``: the
            guest sees the conflict.
    """

    NAME: ClassVar[str] = "kvm:conflict"

    guest: str
    leaf: str
    what: str
    how: str


@dataclass(frozen=True, slots=True)
class GuestStopped(Event):
    """A guest was stopped; ``reason`` says why."""

    NAME: ClassVar[str] = "kvm:guest_stopped"

    guest: str
    reason: str


@dataclass(frozen=True, slots=True)
class VirtualPowerLost(Event):
    """A guest has lost its EPC content, as a machine does in S3, S4, S5 or by reset."""

    NAME: ClassVar[str] = "kvm:power_lost"

    guest: str
