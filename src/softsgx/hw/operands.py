"""Operands of leaves: addresses for guests and emulated code, objects for OS code beside us.

A leaf names its memory operands by :data:`Ref`: either a linear address, which goes through the
processor's address space and must be aligned, or the thing itself, which is aligned by being one.
So one body serves both ways in, with the manual's checks in the manual's order.
"""

from __future__ import annotations

from typing import TypeAlias

from softsgx.arch import SecInfo
from softsgx.ondemand import dataclass

__all__ = ["Buffer", "PageInfoArgs", "Ref", "Sealed", "misaligned"]

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Bytes of ordinary memory; where a leaf writes, a writable one."""

Ref: TypeAlias = int | Buffer
"""A linear address, or the bytes that would be there."""

Sealed: TypeAlias = tuple[bytes, int, int]
"""What EWB writes of a child page: ciphertext ‖ MAC, SECINFO.FLAGS, ENCLAVEID; the rest is zero."""


@dataclass(slots=True)
class PageInfoArgs:
    """PAGEINFO whose pointers are :data:`Ref`; EWB writes ``linaddr`` on success.

    Attributes:
        linaddr: the page's linear address in its enclave.
        srcpge: 4096 bytes of source or destination.
        secinfo: SECINFO (64 bytes, or a :class:`SecInfo`), or PCMD (128 bytes).
        secs: address of the EPC page that holds the SECS, 0 where there is none.
    """

    linaddr: int = 0
    srcpge: Ref = 0
    secinfo: Ref | SecInfo = 0
    secs: int = 0

    @property
    def pcmd(self) -> Ref:
        """What EWB and ELD* have in the place of SECINFO."""
        assert not isinstance(self.secinfo, SecInfo), "a SECINFO in the place of a PCMD"
        return self.secinfo


def misaligned(ref: object, align: int) -> bool:
    """Return whether ``ref`` is an address that is no multiple of ``align``."""
    return type(ref) is int and ref % align != 0
