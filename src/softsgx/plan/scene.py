"""The input of a replay: pages numbered from 0, enclaves, their groups, and one EPC.

Pages are numbered densely, in the order of enclaves and of page indices in them, so that numbers
are indices of arrays.  Accesses of several traces follow each other in order of time: the enclaves
are co-located.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from softsgx.arch import VA_SLOTS
from softsgx.cgroup import group_name_ok
from softsgx.errors import SoftSgxError
from softsgx.paging import LinuxPolicy, Policy

if TYPE_CHECKING:
    from softsgx.plan.spool import Parts

__all__ = [
    "ENDS",
    "GOES",
    "LINUX",
    "MOST_PAGES",
    "MOST_WAITS",
    "Counts",
    "Epc",
    "Scene",
    "SceneEnclave",
    "paths_of",
]

GOES, ENDS = 1 << 31, 1 << 30
"""Bits of a number in a sequence of accesses.  With the first, its page is not accessed: it leaves
its enclave, if it is there.  With both, the enclave ends; all its pages have left before."""
MOST_PAGES = 1 << 30

MOST_WAITS = 64
"""How often one access waits for ksgxd at most; then it needs more pages than the EPC has."""

LINUX = LinuxPolicy(evict_va=False)
"""Linux's policy: VA pages stay."""


@dataclass(frozen=True, slots=True)
class SceneEnclave:
    """One enclave.

    Attributes:
        trace: index of its trace.
        name: its name in the trace.
        first, pages: its pages are ``first`` up to ``first + pages``.
        group: path of the group that it is charged to; ``/`` is the root.
    """

    trace: int
    name: str
    first: int
    pages: int
    group: str = "/"

    @property
    def overhead_pages(self) -> int:
        """Its SECS, and VA pages with a slot for the SECS and for each page."""
        return 1 + -(-(self.pages + 1) // VA_SLOTS)


@dataclass(frozen=True, slots=True)
class Scene:
    """Every access of all traces.

    Attributes:
        enclaves: in order of their pages.
        parts: the accesses, a dense page number each, and with ``GOES`` pages that leave; they can
            be iterated any number of times.
        edges: the access with which each bin of time begins, and how many accesses there are.
        bin_seconds: length of a bin; 0: there are no times, and bins have equally many accesses.
        goes: whether ``parts`` have pages that leave.
    """

    enclaves: tuple[SceneEnclave, ...]
    parts: Parts
    edges: tuple[int, ...] = ()
    bin_seconds: float = 0.0
    goes: bool = False

    @property
    def footprint_pages(self) -> int:
        """Number of all pages."""
        return sum(enclave.pages for enclave in self.enclaves)

    @property
    def overhead_pages(self) -> int:
        """Number of SECS and VA pages."""
        return sum(enclave.overhead_pages for enclave in self.enclaves)


@dataclass(frozen=True, slots=True)
class Epc:
    """The EPC of a host, its groups and its policy.

    Attributes:
        pages: its size.
        limits: ``misc.max`` of groups in pages, by path (``/jobs/a``).
        policy: one of the core's; Linux's never evicts VA pages.
    """

    pages: int
    limits: Mapping[str, int] = field(default_factory=dict)
    policy: Policy = LINUX

    def but(self, **changes: Any) -> Epc:
        """Return a copy with other fields."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class Counts:
    """The counts of a replay so far.

    Attributes:
        possible: ``False``: an allocation failed, since every page was needed; the replay ended.
        accesses: replayed accesses.
        made: pages made, each once.
        loads: pages loaded after they were evicted (ELDU), SECS and VA pages not counted.
        evictions: pages evicted (EWB), SECS and VA pages counted.
        secs_loads: SECS loaded.
        loads_of: ``loads`` of each enclave.
        peaks: highest number of pages charged to each group of :func:`paths_of`.
    """

    possible: bool
    accesses: int
    made: int
    loads: int
    evictions: int
    secs_loads: int
    loads_of: tuple[int, ...]
    peaks: tuple[int, ...]


def paths_of(scene: Scene, epc: Epc) -> tuple[str, ...]:
    """Return the paths of all groups: the root, then each below its parent, parents first.

    Raises:
        SoftSgxError: a path is not the path of a group.
    """
    wanted = [*epc.limits, *(enclave.group for enclave in scene.enclaves)]
    found = {"/": None}
    for path in wanted:
        names = path.strip("/").split("/") if path.strip("/") else []
        for at, name in enumerate(names, 1):
            if not group_name_ok(name):
                raise SoftSgxError(f"group {path!r}: not a path; write names, such as jobs/a")
            found["/" + "/".join(names[:at])] = None
    return tuple(sorted(found, key=lambda path: path.count("/") if path != "/" else 0))
