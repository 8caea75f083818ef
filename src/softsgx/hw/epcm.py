"""The Enclave Page Cache Map: one entry for each EPC page.

An :class:`EpcPage` stands for one physical page during the whole life of the machine; leaves write
and clear the fields of its EPCM entry.  Only leaves and access checks of this package read them.

Source:
    SDM vol. 3D, "Enclave Page Cache Map (EPCM)".
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, MutableSequence
from typing import TYPE_CHECKING, Any

from softsgx import compiled
from softsgx.arch import VA_SLOTS, EpcAddr, PageType, SecInfoFlags
from softsgx.compiled import record

if TYPE_CHECKING:
    from softsgx.hw.secs import ResidentSecs

__all__ = ["EpcPage", "pack_versions", "unpack_versions"]

_VERSIONS = struct.Struct(f"<{VA_SLOTS}Q")
_NO_VERSIONS = bytes(_VERSIONS.size)

# Plain integers: arithmetic on enums is ten times slower.
_PENDING, _MODIFIED, _PR = map(int, (SecInfoFlags.PENDING, SecInfoFlags.MODIFIED, SecInfoFlags.PR))


@record
class EpcPage:
    """One EPC page: its EPCM entry, its locks, and the content of SECS and VA pages.

    The bytes of REG, TCS, TRIM and SS_* pages are in the machine's page store; a SECS is an
    :class:`~softsgx.hw.secs.ResidentSecs`, a VA page a list of versions; EWB makes 4096 bytes of
    them.

    Attributes:
        addr: physical address.
        valid: VALID; while it is False every other EPCM field is stale.
        pt: PT.
        rwx: R, W, X as SECINFO bits 2:0.
        secs: ENCLAVESECS, the page that holds the owner's SECS; ``None`` for SECS and VA.
        linaddr: ENCLAVEADDRESS; 0 for SECS and VA.
        bepoch: the enclave's epoch when the page was last blocked, restricted or retyped.
        lock: base lock; 0 free, -1 exclusive, n > 0 shared by n leaves.
        modification_lock: whether one of EACCEPT, EACCEPTCOPY, EMODPE, EMODPR, EMODT works on it.
        enclave: of a SECS page, its enclave.
        slots: of a VA page, its 512 versions; 0 is an empty slot.
        stored: what the machine's page store keeps with the page; nothing else uses it.
    """

    pt: PageType
    rwx: int
    secs: EpcPage | None
    linaddr: int
    blocked: bool
    pending: bool
    modified: bool
    pr: bool
    bepoch: int
    enclave: ResidentSecs | None
    slots: MutableSequence[int] | None
    valid: bool

    __slots__ = (
        "addr",
        "bepoch",
        "blocked",
        "enclave",
        "linaddr",
        "lock",
        "modification_lock",
        "modified",
        "pending",
        "pr",
        "pt",
        "rwx",
        "secs",
        "slots",
        "stored",
        "valid",
    )

    def __init__(self, addr: EpcAddr) -> None:
        self.addr = addr
        self.lock = 0
        self.modification_lock = False
        self.stored: Any = None
        _write(self, PageType.REG, 0, None, 0, False, None, False)

    def clear(self) -> None:
        """Make the entry invalid and drop the page's content."""
        self.valid = False
        self.secs = self.enclave = self.slots = None

    def fill(
        self,
        pt: PageType,
        *,
        rwx: int = 0,
        secs: EpcPage | None = None,
        linaddr: int = 0,
        pending: bool = False,
        valid: bool = True,
    ) -> None:
        """Write a new entry, VALID last; with ``valid=False`` the caller sets VALID itself."""
        slots = unpack_versions(_NO_VERSIONS) if pt is PageType.VA else None
        _write(self, pt, rwx, secs, linaddr, pending, slots, valid)

    def valid_as(self, pt: PageType) -> bool:
        """Return whether VALID is 1 and PT is ``pt``."""
        return self.valid and self.pt is pt

    @property
    def owner(self) -> ResidentSecs:
        """The enclave of a child page, or of a SECS page itself."""
        holder = self if self.secs is None else self.secs
        assert holder.enclave is not None, f"{self!r} belongs to no enclave"
        return holder.enclave

    @property
    def versions(self) -> MutableSequence[int]:
        """The slots of a VA page."""
        assert self.slots is not None, f"{self!r} is no VA page"
        return self.slots

    def secinfo_flags(self) -> int:
        """Return the entry as SECINFO.FLAGS: R, W, X, PENDING, MODIFIED, PR and the type."""
        return (
            self.pt << 8
            | self.rwx
            | (self.pending and _PENDING)
            | (self.modified and _MODIFIED)
            | (self.pr and _PR)
        )

    def __repr__(self) -> str:
        if not self.valid:
            return f"<EPC {self.addr:#x} invalid>"
        rights = "".join(c if self.rwx >> i & 1 else "-" for i, c in enumerate("rwx"))
        flags = [n for n in ("blocked", "pending", "modified", "pr") if getattr(self, n)]
        words = [self.pt.name, rights, f"{self.linaddr:#x}", *flags]
        return f"<EPC {self.addr:#x} {' '.join(words)}>"


def _write_fields(
    page: EpcPage,
    pt: PageType,
    rwx: int,
    secs: EpcPage | None,
    linaddr: int,
    pending: bool,
    slots: MutableSequence[int] | None,
    valid: bool,
) -> None:
    page.pt, page.rwx, page.secs, page.linaddr = pt, rwx, secs, linaddr
    page.blocked = page.modified = page.pr = False
    page.pending = pending
    page.bepoch = 0
    page.enclave = None
    page.slots = slots
    page.valid = valid


_write: Callable[..., None] = (
    _write_fields
    if compiled.speedups is None
    else compiled.speedups.write_entry  # Python code writes fields of a structure slowly
)


def pack_versions(slots: MutableSequence[int]) -> bytes:
    """Return the 4096 bytes of a VA page with these 512 versions."""
    return _VERSIONS.pack(*slots)


def _unpack_versions(data: bytes) -> MutableSequence[int]:
    return array("Q", _VERSIONS.unpack(data))


unpack_versions: Callable[[bytes], MutableSequence[int]] = (
    _unpack_versions
    if compiled.speedups is None
    else compiled.speedups.VaVersions  # C code reads and writes them without objects
)
"""Returns the 512 versions in the 4096 bytes of a VA page."""
