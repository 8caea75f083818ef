"""Simulated processes and threads: what runs on the driver where no real program does."""

from typing import TYPE_CHECKING

from softsgx.ondemand import on_demand

if TYPE_CHECKING:
    from softsgx.userland.enclave import EnclaveLoadError, LoadedEnclave, PageState, Residency
    from softsgx.userland.page_tables import MachineOrGuest, SoftPageTable
    from softsgx.userland.process import SoftProcess
    from softsgx.userland.thread import Signal, SoftThread

__all__ = [
    "EnclaveLoadError",
    "LoadedEnclave",
    "MachineOrGuest",
    "PageState",
    "Residency",
    "Signal",
    "SoftPageTable",
    "SoftProcess",
    "SoftThread",
]

__getattr__ = on_demand(
    __name__,
    {
        "enclave": (
            "EnclaveLoadError",
            "LoadedEnclave",
            "PageState",
            "Residency",
        ),
        "page_tables": (
            "MachineOrGuest",
            "SoftPageTable",
        ),
        "process": ("SoftProcess",),
        "thread": (
            "Signal",
            "SoftThread",
        ),
    },
)
