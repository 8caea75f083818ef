"""The silicon: EPC, EPCM, logical processors, keys, and every leaf.

The only package that can read or write the bytes of an EPC page; it knows no operating system.
"""

from typing import TYPE_CHECKING

from softsgx.hw.config import DEFAULT_EPC_BASE, EpcSection, MachineConfig
from softsgx.hw.cpuid import CpuidResult, cpuid
from softsgx.hw.leaves import Leaves
from softsgx.hw.leaves.enclu import EncluLeaves
from softsgx.hw.machine import Machine
from softsgx.hw.processor import EnclaveMode, LogicalProcessor, Registers, Segment, Translation
from softsgx.hw.space import EXECUTE, READ, WRITE, AddressSpace, DirectMap, PageTables, Ram
from softsgx.ondemand import on_demand

if TYPE_CHECKING:
    from softsgx.hw.access import check_access, enclave_operand
    from softsgx.hw.dispatch import encls, enclu, enclv, finish_leaf
    from softsgx.hw.epcm import EpcPage
    from softsgx.hw.events import AsynchronousExit, LeafDone, PowerLost
    from softsgx.hw.faults import (
        ControlProtection,
        DeviceNotAvailable,
        EnclaveLeft,
        Fault,
        GeneralProtection,
        MachineCheck,
        PageFault,
        TsxAbort,
        UndefinedOpcode,
        VmExit,
    )
    from softsgx.hw.leaves.aex import aex, deliver, interrupt
    from softsgx.hw.leaves.registry import ENCLS, ENCLU, ENCLV, Leaf, OptimisedLeaves, traced
    from softsgx.hw.msr import rdmsr, wrmsr
    from softsgx.hw.operands import Buffer, PageInfoArgs, Ref, Sealed
    from softsgx.hw.secs import Crossings
    from softsgx.hw.store import DictStore, PageStore, share_zero_page

__all__ = [
    "DEFAULT_EPC_BASE",
    "ENCLS",
    "ENCLU",
    "ENCLV",
    "EXECUTE",
    "READ",
    "WRITE",
    "AddressSpace",
    "AsynchronousExit",
    "Buffer",
    "ControlProtection",
    "CpuidResult",
    "Crossings",
    "DeviceNotAvailable",
    "DictStore",
    "DirectMap",
    "EnclaveLeft",
    "EnclaveMode",
    "EncluLeaves",
    "EpcPage",
    "EpcSection",
    "Fault",
    "GeneralProtection",
    "Leaf",
    "LeafDone",
    "Leaves",
    "LogicalProcessor",
    "Machine",
    "MachineCheck",
    "MachineConfig",
    "OptimisedLeaves",
    "PageFault",
    "PageInfoArgs",
    "PageStore",
    "PageTables",
    "PowerLost",
    "Ram",
    "Ref",
    "Registers",
    "Sealed",
    "Segment",
    "Translation",
    "TsxAbort",
    "UndefinedOpcode",
    "VmExit",
    "aex",
    "check_access",
    "cpuid",
    "deliver",
    "enclave_operand",
    "encls",
    "enclu",
    "enclv",
    "finish_leaf",
    "interrupt",
    "rdmsr",
    "share_zero_page",
    "traced",
    "wrmsr",
]

__getattr__ = on_demand(
    __name__,
    {
        "access": (
            "check_access",
            "enclave_operand",
        ),
        "dispatch": (
            "encls",
            "enclu",
            "enclv",
            "finish_leaf",
        ),
        "epcm": ("EpcPage",),
        "events": (
            "AsynchronousExit",
            "LeafDone",
            "PowerLost",
        ),
        "faults": (
            "ControlProtection",
            "DeviceNotAvailable",
            "EnclaveLeft",
            "Fault",
            "GeneralProtection",
            "MachineCheck",
            "PageFault",
            "TsxAbort",
            "UndefinedOpcode",
            "VmExit",
        ),
        "leaves.aex": (
            "aex",
            "deliver",
            "interrupt",
        ),
        "leaves.registry": (
            "ENCLS",
            "ENCLU",
            "ENCLV",
            "Leaf",
            "OptimisedLeaves",
            "traced",
        ),
        "msr": (
            "rdmsr",
            "wrmsr",
        ),
        "operands": (
            "Buffer",
            "PageInfoArgs",
            "Ref",
            "Sealed",
        ),
        "secs": ("Crossings",),
        "store": (
            "DictStore",
            "PageStore",
            "share_zero_page",
        ),
    },
)
