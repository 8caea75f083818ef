"""Events of the core.

The events of the leaves themselves (``sgx:ewb`` with its result) come from ``hw``.
"""

from __future__ import annotations

from typing import ClassVar

from softsgx.ondemand import dataclass
from softsgx.trace import Event

__all__ = [
    "Aged",
    "Allocated",
    "BatchDone",
    "ChargeRefused",
    "Evicted",
    "Freed",
    "Isolated",
    "Leaked",
    "Loaded",
    "NotPrepared",
    "Poisoned",
    "Refused",
    "Sanitized",
    "TrackingRound",
    "Truncated",
]


@dataclass(frozen=True, slots=True)
class Allocated(Event):
    """A page was allocated."""

    NAME: ClassVar[str] = "sgx:alloc"

    page: int
    kind: str
    node: int


@dataclass(frozen=True, slots=True)
class Freed(Event):
    """A page was freed; a poisoned one goes into quarantine."""

    NAME: ClassVar[str] = "sgx:free"

    page: int
    poisoned: bool


@dataclass(frozen=True, slots=True)
class Refused(Event):
    """An allocation failed: ``busy``, ``none`` or ``interrupted``."""

    NAME: ClassVar[str] = "sgx:alloc_refused"

    kind: str
    result: str


@dataclass(frozen=True, slots=True)
class ChargeRefused(Event):
    """A group is at its limit: the caller reclaims (``reclaim``) or is refused (``busy``)."""

    NAME: ClassVar[str] = "sgx:charge"

    result: str


@dataclass(frozen=True, slots=True)
class Isolated(Event):
    """Phase A: a batch has isolated pages of a list."""

    NAME: ClassVar[str] = "sgx:isolate"

    pages: int
    dying: int
    forced: bool


@dataclass(frozen=True, slots=True)
class Aged(Event):
    """Phase B: ``young``: the page was accessed since the last scan, and stays."""

    NAME: ClassVar[str] = "sgx:age"

    page: int
    young: bool


@dataclass(frozen=True, slots=True)
class NotPrepared(Event):
    """A page goes back to its list; ``stage`` is the step that failed, ``poisoned`` or ``kept``."""

    NAME: ClassVar[str] = "sgx:skip"

    page: int
    stage: str


@dataclass(frozen=True, slots=True)
class TrackingRound(Event):
    """ETRACK (``etrack``) or a round of interrupts (``ipi``) for one enclave."""

    NAME: ClassVar[str] = "sgx:track"

    secs: int
    step: str
    result: str


@dataclass(frozen=True, slots=True)
class Evicted(Event):
    """EWB has evicted a page, or failed for the last time.

    Attributes:
        page: the EPC page.
        kind: ``page``, ``secs`` or ``va``.
        tries: how many EWBs it took.
        result: the last one's code or fault.
    """

    NAME: ClassVar[str] = "sgx:evict"

    page: int
    kind: str
    index: int
    tries: int
    result: str


@dataclass(frozen=True, slots=True)
class Loaded(Event):
    """ELDU has ended."""

    NAME: ClassVar[str] = "sgx:load"

    page: int
    kind: str
    index: int
    result: str


@dataclass(frozen=True, slots=True)
class Truncated(Event):
    """A backing page with PCMDs was freed."""

    NAME: ClassVar[str] = "sgx:truncate"

    index: int


@dataclass(frozen=True, slots=True)
class BatchDone(Event):
    """A batch has ended."""

    NAME: ClassVar[str] = "sgx:batch"

    scanned: int
    freed: int


@dataclass(frozen=True, slots=True)
class Poisoned(Event):
    """A machine check reported this page."""

    NAME: ClassVar[str] = "sgx:poison"

    page: int
    free: bool


@dataclass(frozen=True, slots=True)
class Leaked(Event):
    """EREMOVE refused a page, which is a bug of its owner: the page is never used again."""

    NAME: ClassVar[str] = "sgx:leak"

    page: int
    kind: str
    result: str


@dataclass(frozen=True, slots=True)
class Sanitized(Event):
    """Sanitizing has ended; EREMOVE could not free ``left`` pages."""

    NAME: ClassVar[str] = "sgx:sanitize"

    left: int
