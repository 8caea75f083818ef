"""Guests: virtual EPC that the host reclaims without asking, trapped leaves, machines of their own.

Knows the core (``paging``) and the processor's leaves; neither the driver nor limits, which run
inside a guest or beside it.
"""

from softsgx.kvm.device import VepcDevice
from softsgx.kvm.events import (
    ConflictResolved,
    GuestStopped,
    PageKept,
    VepcEvicted,
    VepcLoaded,
    VirtualPowerLost,
)
from softsgx.kvm.fate import Evicted, Fate
from softsgx.kvm.guest import Guest, GuestStoppedError
from softsgx.kvm.leaves import GuestLeaves
from softsgx.kvm.monitor import GuestCounters, Monitor
from softsgx.kvm.page import VepcPage
from softsgx.kvm.processor import GuestProcessor
from softsgx.kvm.vepc import (
    MAP_PRIVATE,
    MAP_SHARED,
    SGX_IOC_VEPC_REMOVE_ALL,
    FaultResult,
    Vepc,
    VepcMapping,
)

__all__ = [
    "MAP_PRIVATE",
    "MAP_SHARED",
    "SGX_IOC_VEPC_REMOVE_ALL",
    "ConflictResolved",
    "Evicted",
    "Fate",
    "FaultResult",
    "Guest",
    "GuestCounters",
    "GuestLeaves",
    "GuestProcessor",
    "GuestStopped",
    "GuestStoppedError",
    "Monitor",
    "PageKept",
    "Vepc",
    "VepcDevice",
    "VepcEvicted",
    "VepcLoaded",
    "VepcMapping",
    "VepcPage",
    "VirtualPowerLost",
]
