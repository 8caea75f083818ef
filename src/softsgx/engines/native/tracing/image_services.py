"""What the address spaces of a run share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from softsgx.driver import Mm
from softsgx.engines.native import recording
from softsgx.engines.native.memory.store import NativeStore
from softsgx.engines.native.syscalls.registry import Registry
from softsgx.hw import EpcPage
from softsgx.ondemand import dataclass
from softsgx.runtime import Runtime

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.process_image import ProcessImage
    from softsgx.engines.native.tracing.program import ProgramThread
    from softsgx.engines.native.tracing.waits import Waits

__all__ = ["ImageServices"]


@dataclass(frozen=True, slots=True)
class ImageServices:
    """Objects and callbacks that all address spaces of a run share.

    Attributes:
        pager: the name of the pager.
        strict: whether mappings of enclaves are covered for threads that are not inside.
        runtime: the driver's.
        mm_type: the driver's class of address spaces.
        registry: open devices.
        store: content of the EPC.
        pages: the machine's EPC pages, by address.
        hold: stops a running thread; returns whether it is stopped and has not died.
        kick: makes the threads of an address space that are inside an enclave leave it.
        failed: ends the processes of an address space in which calls cannot be made.
        ended: called when the driver has released an address space.
        installed: called when the driver has mapped a page of an enclave; ``None``: nothing is.
        may_be_uninvolved: whether there are address spaces that the supervisor leaves alone.
        recorder: records uses of pages of enclaves; ``None``: nothing does.
        waits: receives stops and, where faults are events, faults.
    """

    pager: str
    strict: bool
    runtime: Runtime
    mm_type: type[Mm]
    registry: Registry
    store: NativeStore
    pages: Mapping[int, EpcPage]
    hold: Callable[[ProgramThread], bool]
    kick: Callable[[ProcessImage], None]
    failed: Callable[[ProcessImage, Exception], None]
    ended: Callable[[ProcessImage], None]
    installed: Callable[[EpcPage], None] | None
    may_be_uninvolved: bool
    waits: Waits
    recorder: recording.Recorder | None = None
