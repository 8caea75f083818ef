"""Simulated processes and threads: what runs on the driver where no real program does."""

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
