"""Events of the processor: each leaf, asynchronous exit and loss of power."""

from __future__ import annotations

from typing import ClassVar

from softsgx.ondemand import dataclass
from softsgx.trace import Event

__all__ = ["AsynchronousExit", "LeafDone", "PowerLost"]


@dataclass(frozen=True, slots=True)
class LeafDone(Event):
    """A leaf has ended.

    Attributes:
        leaf: its name, lower case: ``ewb``.
        cpu: the logical processor's number.
        page: the EPC page or address in RCX (RBX for EENTER and ERESUME), 0 without one.
        eid: the enclave, 0 where none is known.
        result: ``SGX_SUCCESS``, another code's name, or the fault: ``#PF(0x50201000, 0x8001)``.
    """

    NAME: ClassVar[str] = "sgx:leaf"

    leaf: str
    cpu: int
    page: int
    eid: int
    result: str

    def line(self) -> str:
        """Return the Linux-like form, named after the leaf."""
        return (
            f"sgx:{self.leaf}: cpu={self.cpu} page={self.page:#x} eid={self.eid} "
            f"result={self.result}"
        )


@dataclass(frozen=True, slots=True)
class AsynchronousExit(Event):
    """An enclave was left by an event: AEX.

    Attributes:
        cpu: the logical processor's number.
        eid: the enclave.
        tcs: linear address of the TCS.
        vector: the exception's number, -1 for interrupts.
    """

    NAME: ClassVar[str] = "sgx:aex"

    cpu: int
    eid: int
    tcs: int
    vector: int


@dataclass(frozen=True, slots=True)
class PowerLost(Event):
    """All EPC content and the paging key are lost."""

    NAME: ClassVar[str] = "sgx:power_lost"
