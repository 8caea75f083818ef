"""Fields of a thread, of its address space and of permits that each fault reads or sets.

They have places that C code knows (``docs/internals/compiled.md``).  The classes that derive from
these say what the fields mean and set them.  A class attribute of that name would hide the field.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx import compiled

if TYPE_CHECKING:
    from softsgx.engines.native.memory.page_table import EnclavePageTable
    from softsgx.engines.native.tracing.process_image import ProcessImage
    from softsgx.engines.native.tracing.program import ProgramThread
    from softsgx.engines.native.vdso.permit_table import PermitTable, Slot
    from softsgx.hw import EnclaveMode, LogicalProcessor
    from softsgx.paging import Claim, Group

__all__ = ["FaultingImage", "FaultingThread", "UnseenCrossings"]


class FaultingThread:
    """The fields of a thread."""

    __slots__ = (
        *("blocked", "breakpoints", "claim", "cpu", "group", "image", "resumes", "running"),
        *("spurious", "unstoppable", "watched"),
    )

    blocked: int | None
    breakpoints: int
    claim: Claim
    cpu: LogicalProcessor
    group: Group
    image: ProcessImage
    resumes: EnclaveMode | None
    running: bool
    spurious: tuple[int, tuple[int, int]]
    unstoppable: bool
    watched: bool


class FaultingImage:
    """The fields of an address space."""

    __slots__ = ("_deferred_calls", "current", "faulting", "page_table", "permits", "watched")

    _deferred_calls: list[tuple[int, ...]]
    current: ProgramThread | None
    faulting: ProgramThread | None
    page_table: EnclavePageTable
    permits: PermitTable | None
    watched: bool


class UnseenCrossings:
    """The fields of permits."""

    __slots__ = ("_exited", "_open", "_recorded", "_unused")

    _exited: tuple[ProgramThread, Slot] | None
    _open: set[Slot]
    _recorded: set[Slot]
    _unused: dict[ProgramThread, Slot]


if compiled.speedups is not None:
    compiled.speedups.bind("FaultingThread", FaultingThread)
    compiled.speedups.bind("FaultingImage", FaultingImage)
    compiled.speedups.bind("UnseenCrossings", UnseenCrossings)
