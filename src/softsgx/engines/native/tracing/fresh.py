"""A child of fork that has not stopped since it began: what is kept of it until then.

Source:
    fork(2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.process_image import ProcessImage
    from softsgx.engines.native.tracing.program import Process

__all__ = ["CopiedImage", "FreshChild"]


class CopiedImage:
    """What fork has copied of an address space that is left alone, as it was then.

    Attributes:
        vdso_base, vdso, permits_at, loader, cpuid_stubs, cpuid_sites, path_stubs: as those of
            :class:`~softsgx.engines.native.tracing.process_image.ProcessImage`.
    """

    uninvolved = True

    def __init__(self, image: ProcessImage) -> None:
        self.vdso_base, self.vdso = image.vdso_base, image.vdso
        self.permits_at, self.loader = image.permits_at, image.loader
        self.cpuid_stubs, self.cpuid_sites = image.cpuid_stubs, image.cpuid_sites.copy()
        self.path_stubs = None if image.path_stubs is None else image.path_stubs.copy()


class FreshChild:
    """See the module.

    Attributes:
        process: the child.
        copied: its address space.
    """

    __slots__ = ("copied", "process")

    def __init__(self, process: Process, copied: CopiedImage) -> None:
        self.process, self.copied = process, copied
