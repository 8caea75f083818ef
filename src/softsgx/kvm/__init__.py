"""Guests: virtual EPC that the host reclaims without the guest's help, and trapped leaves.

Knows the core (``paging``) and the processor's leaves, but neither the driver nor limits.
"""

from typing import TYPE_CHECKING

from softsgx.ondemand import on_demand

if TYPE_CHECKING:
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

__getattr__ = on_demand(
    __name__,
    {
        "device": ("VepcDevice",),
        "events": (
            "ConflictResolved",
            "GuestStopped",
            "PageKept",
            "VepcEvicted",
            "VepcLoaded",
            "VirtualPowerLost",
        ),
        "evicted_page": (
            "EvictedPage",
            "PageKind",
        ),
        "guest": (
            "Guest",
            "GuestStoppedError",
        ),
        "leaves": ("GuestLeaves",),
        "monitor": (
            "GuestCounters",
            "Monitor",
        ),
        "page": ("VepcPage",),
        "processor": ("GuestProcessor",),
        "vepc": (
            "SGX_IOC_VEPC_REMOVE_ALL",
            "Vepc",
            "VepcMapping",
        ),
    },
)
