"""Leaf functions: their numbers, and which of them return a code.

Source:
    SDM vol. 3D, tables "Supervisor and User Mode Enclave Instruction Leaf Functions".
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Encls", "Enclu", "Enclv", "reports_code"]


class Encls(IntEnum):
    """Leaves of ENCLS (0F 01 CF), privilege level 0."""

    ECREATE = 0x00
    EADD = 0x01
    EINIT = 0x02
    EREMOVE = 0x03
    EDBGRD = 0x04
    EDBGWR = 0x05
    EEXTEND = 0x06
    ELDB = 0x07
    ELDU = 0x08
    EBLOCK = 0x09
    EPA = 0x0A
    EWB = 0x0B
    ETRACK = 0x0C
    EAUG = 0x0D
    EMODPR = 0x0E
    EMODT = 0x0F
    ERDINFO = 0x10
    ETRACKC = 0x11
    ELDBC = 0x12
    ELDUC = 0x13
    EUPDATESVN = 0x18


class Enclu(IntEnum):
    """Leaves of ENCLU (0F 01 D7), privilege level 3."""

    EREPORT = 0x00
    EGETKEY = 0x01
    EENTER = 0x02
    ERESUME = 0x03
    EEXIT = 0x04
    EACCEPT = 0x05
    EMODPE = 0x06
    EACCEPTCOPY = 0x07
    EVERIFYREPORT2 = 0x08
    EDECCSSA = 0x09


class Enclv(IntEnum):
    """Leaves of ENCLV (0F 01 C0), privilege level 0 under VMX."""

    EDECVIRTCHILD = 0x00
    EINCVIRTCHILD = 0x01
    ESETCONTEXT = 0x02


# Members of different enumerations with one number are equal, so each enumeration has its own set.
_SILENT_ENCLS = frozenset({Encls.ECREATE, Encls.EADD, Encls.EEXTEND, Encls.EPA, Encls.EAUG})
_REPORTING_ENCLU = frozenset(
    {Enclu.EGETKEY, Enclu.EACCEPT, Enclu.EACCEPTCOPY, Enclu.EVERIFYREPORT2}
)


def reports_code(leaf: Encls | Enclu | Enclv) -> bool:
    """Return whether ``leaf`` writes a code to RAX and sets the flags, or leaves both alone."""
    if isinstance(leaf, Encls):
        return leaf not in _SILENT_ENCLS
    return isinstance(leaf, Enclv) or leaf in _REPORTING_ENCLU
