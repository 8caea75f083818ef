"""What the host finds a guest's page to be, and what it remembers of an evicted one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from softsgx.paging import SwapEntry

if TYPE_CHECKING:
    from softsgx.kvm.page import VepcPage

__all__ = ["Evicted", "Fate"]


class Fate(Enum):
    """What ERDINFO says of a page that shall leave."""

    UNUSED = "unused"
    SECS = "secs"
    VA = "va"
    CHILD = "child"


@dataclass(slots=True)
class Evicted:
    """Where a page of a guest is while it is not in the EPC, and what it takes to load it.

    Attributes:
        entry: its bytes and its version.
        linaddr: its linear address in its enclave, which EWB told.
        fate: what it is.
        secs: the page that holds or held its enclave's SECS; ``None`` where it has none.
        blocked: the guest had blocked it, and finds it so.
    """

    entry: SwapEntry
    linaddr: int
    fate: Fate
    secs: VepcPage | None
    blocked: bool
