"""Events of the driver.

An enclave is named by the number that CREATE gives it; 0 before CREATE.  A number is never used
again while the driver is loaded.
"""

from __future__ import annotations

from typing import ClassVar

from softsgx.ondemand import dataclass, field
from softsgx.trace import Event

__all__ = [
    "Augmented",
    "EnclaveCreated",
    "EnclaveInitialized",
    "EnclaveKilled",
    "EnclaveReleased",
    "FaultHandled",
    "IoctlDone",
    "ProcessorsKicked",
]


@dataclass(frozen=True, slots=True)
class IoctlDone(Event):
    """An ioctl has ended.

    Attributes:
        enclave: the enclave of the file.
        command: the name of the command, or its number.
        errno: 0, or the error.
        count: bytes processed, of commands that report them.
    """

    NAME: ClassVar[str] = "sgx:ioctl"

    enclave: int
    command: str
    errno: int
    count: int


@dataclass(frozen=True, slots=True)
class FaultHandled(Event):
    """A page fault in an enclave's mapping was handled.

    Attributes:
        enclave: the enclave of the page.
        linaddr: the page's address.
        kind: ``minor`` (the page was resident), ``major`` (it was loaded), ``augment`` (EAUG made
            it), ``busy`` (the access is repeated), ``refused``.
        result: ``nopage``, ``retry``, ``sigbus``, ``oom``.
        duration_ns: how long the driver handled it, without the wait before a repeated access.
            Real time differs from run to run: it is not in the text, and events that differ only
            in it are equal.
    """

    NAME: ClassVar[str] = "sgx:fault"

    enclave: int
    linaddr: int
    kind: str
    result: str
    duration_ns: int = field(default=0, compare=False)

    def line(self) -> str:
        """Return the Linux-like form, without the duration."""
        return (
            f"{self.NAME}: enclave={self.enclave} linaddr={self.linaddr:#x} kind={self.kind} "
            f"result={self.result}"
        )


@dataclass(frozen=True, slots=True)
class Augmented(Event):
    """A page was added to an initialized enclave: EAUG.

    Attributes:
        enclave: the enclave.
        linaddr: the page.
    """

    NAME: ClassVar[str] = "sgx:eaug"

    enclave: int
    linaddr: int


@dataclass(frozen=True, slots=True)
class EnclaveCreated(Event):
    """ECREATE succeeded.

    Attributes:
        enclave: its number.
        base, size: its linear range, bytes.
        attributes: SECS.ATTRIBUTES.FLAGS.
    """

    NAME: ClassVar[str] = "sgx:enclave_create"

    enclave: int
    base: int
    size: int
    attributes: int


@dataclass(frozen=True, slots=True)
class EnclaveInitialized(Event):
    """EINIT succeeded.

    Attributes:
        enclave: its number.
        pages: pages added so far.
    """

    NAME: ClassVar[str] = "sgx:enclave_init"

    enclave: int
    pages: int


@dataclass(frozen=True, slots=True)
class EnclaveKilled(Event):
    """An enclave was killed for its memory: every later access is SIGBUS.

    Attributes:
        enclave: its number.
        freed: EPC pages that were freed at once.
    """

    NAME: ClassVar[str] = "sgx:enclave_kill"

    enclave: int
    freed: int


@dataclass(frozen=True, slots=True)
class EnclaveReleased(Event):
    """The last reference to an enclave was given back; its pages are free.

    Attributes:
        enclave: its number.
    """

    NAME: ClassVar[str] = "sgx:enclave_release"

    enclave: int


@dataclass(frozen=True, slots=True)
class ProcessorsKicked(Event):
    """Every processor that may run the enclave was interrupted: the IPI broadcast.

    Attributes:
        enclave: its number.
        spaces: number of address spaces whose processors were interrupted.
    """

    NAME: ClassVar[str] = "sgx:ipi"

    enclave: int
    spaces: int
