"""The kind of a guest's page, and the host's record of a page that it has evicted."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from softsgx.paging import SwapEntry

if TYPE_CHECKING:
    from softsgx.kvm.page import VepcPage

__all__ = ["EvictedPage", "PageKind"]


class PageKind(Enum):
    """The kind of a page, from ERDINFO; it decides how the host evicts the page."""

    UNUSED = "unused"
    """Its EPCM entry is invalid: it needs no EWB."""
    SECS = "secs"
    VA = "va"
    CHILD = "child"
    """A page of an enclave: its SECS counts it."""


@dataclass(slots=True)
class EvictedPage:
    """The record of an evicted page of a guest, from which it can be loaded.

    Attributes:
        entry: the places of its bytes and its version.
        linaddr: its linear address in its enclave, as EWB returned it.
        kind: its kind.
        secs: the page that holds or held its enclave's SECS; ``None`` where it has none.
        blocked: the guest had blocked it, so the host loads it blocked.
    """

    entry: SwapEntry
    linaddr: int
    kind: PageKind
    secs: VepcPage | None
    blocked: bool
