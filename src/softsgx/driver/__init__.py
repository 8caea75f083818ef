"""``/dev/sgx_enclave`` and ``/dev/sgx_provision``: Linux's interface to native enclaves.

Knows the core (``paging``) and the processor's leaves; neither guests nor limits.
"""

from typing import TYPE_CHECKING

from softsgx.driver.driver import Driver
from softsgx.ondemand import on_demand
from softsgx.paging import FaultResult

if TYPE_CHECKING:
    from softsgx.driver.counts import EnclaveCounts
    from softsgx.driver.debug import peek, poke
    from softsgx.driver.enclave import UNPRIVILEGED, Enclave
    from softsgx.driver.events import (
        Augmented,
        EnclaveCreated,
        EnclaveInitialized,
        EnclaveKilled,
        EnclaveReleased,
        FaultHandled,
        IoctlDone,
        ProcessorsKicked,
    )
    from softsgx.driver.file import EnclaveFile, ProvisionFile
    from softsgx.driver.mm import EnclaveVma, Mm, Ptes
    from softsgx.driver.task import BadAddress, Task, UserMemory, VmaInfo, first_node
    from softsgx.driver.uapi import (
        ERESTARTSYS,
        MAP_FIXED,
        MAP_FIXED_NOREPLACE,
        MAP_PRIVATE,
        MAP_SHARED,
        MAP_SHARED_VALIDATE,
        PROT_EXEC,
        PROT_READ,
        PROT_WRITE,
        AddPages,
        AddPagesFlags,
        Create,
        Init,
        Ioctl,
        LeafRefused,
        ModifyTypes,
        Provision,
        RemovePages,
        RestrictPermissions,
    )

__all__ = [
    "ERESTARTSYS",
    "MAP_FIXED",
    "MAP_FIXED_NOREPLACE",
    "MAP_PRIVATE",
    "MAP_SHARED",
    "MAP_SHARED_VALIDATE",
    "PROT_EXEC",
    "PROT_READ",
    "PROT_WRITE",
    "UNPRIVILEGED",
    "AddPages",
    "AddPagesFlags",
    "Augmented",
    "BadAddress",
    "Create",
    "Driver",
    "Enclave",
    "EnclaveCounts",
    "EnclaveCreated",
    "EnclaveFile",
    "EnclaveInitialized",
    "EnclaveKilled",
    "EnclaveReleased",
    "EnclaveVma",
    "FaultHandled",
    "FaultResult",
    "Init",
    "Ioctl",
    "IoctlDone",
    "LeafRefused",
    "Mm",
    "ModifyTypes",
    "ProcessorsKicked",
    "Provision",
    "ProvisionFile",
    "Ptes",
    "RemovePages",
    "RestrictPermissions",
    "Task",
    "UserMemory",
    "VmaInfo",
    "first_node",
    "peek",
    "poke",
]

__getattr__ = on_demand(
    __name__,
    {
        "counts": ("EnclaveCounts",),
        "debug": (
            "peek",
            "poke",
        ),
        "enclave": (
            "UNPRIVILEGED",
            "Enclave",
        ),
        "events": (
            "Augmented",
            "EnclaveCreated",
            "EnclaveInitialized",
            "EnclaveKilled",
            "EnclaveReleased",
            "FaultHandled",
            "IoctlDone",
            "ProcessorsKicked",
        ),
        "file": (
            "EnclaveFile",
            "ProvisionFile",
        ),
        "mm": (
            "EnclaveVma",
            "Mm",
            "Ptes",
        ),
        "task": (
            "BadAddress",
            "Task",
            "UserMemory",
            "VmaInfo",
            "first_node",
        ),
        "uapi": (
            "ERESTARTSYS",
            "MAP_FIXED",
            "MAP_FIXED_NOREPLACE",
            "MAP_PRIVATE",
            "MAP_SHARED",
            "MAP_SHARED_VALIDATE",
            "PROT_EXEC",
            "PROT_READ",
            "PROT_WRITE",
            "AddPages",
            "AddPagesFlags",
            "Create",
            "Init",
            "Ioctl",
            "LeafRefused",
            "ModifyTypes",
            "Provision",
            "RemovePages",
            "RestrictPermissions",
        ),
    },
)
