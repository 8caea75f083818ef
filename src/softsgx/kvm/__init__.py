"""Guests: virtual EPC that the host reclaims without the guest's help, and trapped leaves.

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
from softsgx.kvm.evicted_page import EvictedPage, PageKind
from softsgx.kvm.guest import Guest, GuestStoppedError
from softsgx.kvm.leaves import GuestLeaves
from softsgx.kvm.monitor import GuestCounters, Monitor
from softsgx.kvm.page import VepcPage
from softsgx.kvm.processor import GuestProcessor
from softsgx.kvm.vepc import SGX_IOC_VEPC_REMOVE_ALL, Vepc, VepcMapping

__all__ = [
    "SGX_IOC_VEPC_REMOVE_ALL",
    "ConflictResolved",
    "EvictedPage",
    "Guest",
    "GuestCounters",
    "GuestLeaves",
    "GuestProcessor",
    "GuestStopped",
    "GuestStoppedError",
    "Monitor",
    "PageKept",
    "PageKind",
    "Vepc",
    "VepcDevice",
    "VepcEvicted",
    "VepcLoaded",
    "VepcMapping",
    "VepcPage",
    "VirtualPowerLost",
]
