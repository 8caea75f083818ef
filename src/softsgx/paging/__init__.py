"""The EPC core: allocates, charges, ages, evicts and loads EPC pages, whatever their owner.

Owners, groups and backing files implement the protocols of :mod:`.interfaces`.
"""

from softsgx.paging.backing import (
    Disk,
    FailingBacking,
    FileBacking,
    MemoryBacking,
    TemporaryFile,
    memory_backing,
)
from softsgx.paging.claims import Claim, needed_pages
from softsgx.paging.core import EpcCore
from softsgx.paging.counters import Counters
from softsgx.paging.entries import SwapEntry
from softsgx.paging.failures import (
    BackingError,
    EpcBusy,
    Interrupted,
    LoadFailed,
    MachineCheck,
    NoEpc,
    PagingError,
)
from softsgx.paging.flat import Backing, FlatBacking
from softsgx.paging.groups import Ungrouped
from softsgx.paging.interfaces import BackingFile, BackingPage, Group, Hardware, Reclaimable
from softsgx.paging.leafio import LeafResult, result_name
from softsgx.paging.lru import Lru
from softsgx.paging.page import SgxEpcPage
from softsgx.paging.pins import Pin, RefCounted
from softsgx.paging.policy import (
    Clock,
    Fifo,
    LeastRecentlyUsed,
    LinuxPolicy,
    Policy,
    Prefetching,
)
from softsgx.paging.reclaim import Batch
from softsgx.paging.swap import EnclaveSwap
from softsgx.paging.swapspace import Reservation, SwapSpace
from softsgx.paging.vm_fault import FaultResult

__all__ = [
    "Backing",
    "BackingError",
    "BackingFile",
    "BackingPage",
    "Batch",
    "Claim",
    "Clock",
    "Counters",
    "Disk",
    "EnclaveSwap",
    "EpcBusy",
    "EpcCore",
    "FailingBacking",
    "FaultResult",
    "Fifo",
    "FileBacking",
    "FlatBacking",
    "Group",
    "Hardware",
    "Interrupted",
    "LeafResult",
    "LeastRecentlyUsed",
    "LinuxPolicy",
    "LoadFailed",
    "Lru",
    "MachineCheck",
    "MemoryBacking",
    "NoEpc",
    "PagingError",
    "Pin",
    "Policy",
    "Prefetching",
    "Reclaimable",
    "RefCounted",
    "Reservation",
    "SgxEpcPage",
    "SwapEntry",
    "SwapSpace",
    "TemporaryFile",
    "Ungrouped",
    "memory_backing",
    "needed_pages",
    "result_name",
]
