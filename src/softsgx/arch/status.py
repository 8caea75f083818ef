"""Codes that leaves report in RAX, and the flag that each of them sets.

Source:
    SDM vol. 3D, "Error and information codes"; the leaves' Operation sections for the flag.
"""

from __future__ import annotations

from enum import IntEnum

from softsgx.arch.leaves import Encls, Enclu, Enclv

__all__ = ["Status", "reports_in_cf"]


class Status(IntEnum):
    """Error and information codes, decimal as the manual prints them."""

    SUCCESS = 0
    INVALID_SIG_STRUCT = 1
    INVALID_ATTRIBUTE = 2
    BLKSTATE = 3
    INVALID_MEASUREMENT = 4
    NOTBLOCKABLE = 5
    PG_INVLD = 6
    EPC_PAGE_CONFLICT = 7
    INVALID_SIGNATURE = 8
    MAC_COMPARE_FAIL = 9
    PAGE_NOT_BLOCKED = 10
    NOT_TRACKED = 11
    VA_SLOT_OCCUPIED = 12
    CHILD_PRESENT = 13
    ENCLAVE_ACT = 14
    ENTRYEPOCH_LOCKED = 15
    INVALID_EINITTOKEN = 16
    PREV_TRK_INCMPL = 17
    PG_IS_SECS = 18
    PAGE_ATTRIBUTES_MISMATCH = 19
    PAGE_NOT_MODIFIABLE = 20
    PAGE_NOT_DEBUGGABLE = 21
    INVALID_COUNTER = 25
    PG_NONEPC = 26
    TRACK_NOT_REQUIRED = 27
    INVALID_REPORTMACSTRUCT = 28
    INSUFFICIENT_ENTROPY = 29
    EPC_NOT_READY = 30
    NO_UPDATE = 31
    INVALID_CPUSVN = 32
    INVALID_ISVSVN = 64
    UNMASKED_EVENT = 128
    INVALID_KEYNAME = 256

    @property
    def manual_name(self) -> str:
        """Its name in the manual: ``SGX_NOT_TRACKED``."""
        return f"SGX_{self.name}"


# Every code not in this table is reported in ZF; all leaves in it are ENCLS leaves.
_IN_CF: frozenset[tuple[Encls, Status]] = frozenset(
    {
        (Encls.EBLOCK, Status.BLKSTATE),
        (Encls.EBLOCK, Status.NOTBLOCKABLE),
        (Encls.EBLOCK, Status.PG_IS_SECS),
        (Encls.EWB, Status.VA_SLOT_OCCUPIED),
        (Encls.ERDINFO, Status.PG_INVLD),
        (Encls.ERDINFO, Status.PG_NONEPC),
        (Encls.ETRACKC, Status.TRACK_NOT_REQUIRED),
    }
)


def reports_in_cf(leaf: Encls | Enclu | Enclv, status: Status) -> bool:
    """Return whether ``leaf`` reports ``status`` in CF; any other non-zero code goes to ZF."""
    # Leaves of other instructions have the same numbers, and would compare equal.
    return isinstance(leaf, Encls) and (leaf, status) in _IN_CF
