"""SIGSTRUCT in files: recognising, reading, naming.

Reading is tolerant: a file with the two headers is a SIGSTRUCT.  ``verify`` finds its errors.

Source:
    SDM vol. 3D, "Enclave Signature Structure (SIGSTRUCT)".
"""

from __future__ import annotations

import datetime
import hashlib
import os

from softsgx.arch import SIGSTRUCT_HEADER, SIGSTRUCT_HEADER2, SigStruct
from softsgx.errors import SoftSgxError
from softsgx.image._file import Bytes, read_bytes

__all__ = [
    "bare_sigstruct",
    "bcd_date",
    "date_text",
    "has_sigstruct",
    "mrsigner",
    "read_sigstruct",
    "sigstruct_at",
]

_HEADER2_AT = SigStruct.OFFSETS["header2"]


def mrsigner(sigstruct: SigStruct) -> bytes:
    """Return the SHA-256 of the modulus as stored: little-endian."""
    return hashlib.sha256(sigstruct.modulus).digest()


def has_sigstruct(file: Bytes, offset: int = 0) -> bool:
    """Return whether a whole SIGSTRUCT with both headers is at ``offset``."""
    if offset < 0 or offset + SigStruct.SIZE > len(file):
        return False
    header2 = offset + _HEADER2_AT
    return (
        file.view[offset : offset + 16] == SIGSTRUCT_HEADER
        and file.view[header2 : header2 + 16] == SIGSTRUCT_HEADER2
    )


def sigstruct_at(file: Bytes, offset: int = 0) -> SigStruct:
    """Return the SIGSTRUCT at ``offset``; its fields are not checked."""
    return file.structure(SigStruct, offset, "SIGSTRUCT")


def read_sigstruct(path: str | os.PathLike[str]) -> SigStruct:
    """Read a bare SIGSTRUCT file: ``.sig``, ``.css``.

    Raises:
        SoftSgxError: the file does not have 1808 bytes, or not the headers of a SIGSTRUCT.
    """
    file = read_bytes(path)
    if len(file) != SigStruct.SIZE:
        raise SoftSgxError(
            f"{file.name}: {len(file)} bytes; a bare SIGSTRUCT has exactly {SigStruct.SIZE}"
        )
    if not has_sigstruct(file):
        raise file.bad(0, f"header {file.view[:16].hex()}", "a SIGSTRUCT begins 06000000e1")
    return sigstruct_at(file)


def bare_sigstruct(path: str | os.PathLike[str]) -> SigStruct | None:
    """Return the SIGSTRUCT that a file consists of; None for any other file."""
    file = read_bytes(path)
    if len(file) == SigStruct.SIZE and has_sigstruct(file):
        return sigstruct_at(file)
    return None


def bcd_date(date: datetime.date | None) -> int:
    """Return the u32 that prints in hex as yyyymmdd; 0 for no date."""
    if date is None:
        return 0
    return int(f"{date.year:04d}{date.month:02d}{date.day:02d}", 16)


def date_text(field: int) -> str:
    """Return DATE as yyyy-mm-dd, or in hexadecimal if it is no date: some signers store binary."""
    digits = f"{field:08x}"
    try:
        return datetime.date(int(digits[:4]), int(digits[4:6]), int(digits[6:])).isoformat()
    except ValueError:
        return f"{field:#010x}"
