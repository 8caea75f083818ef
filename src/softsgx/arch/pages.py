"""EPC pages as leaves describe them: SECINFO, PAGEINFO, PCMD, the MAC header, RDINFO.

Source:
    SDM vol. 3D, "SECINFO", "PAGEINFO", "Paging Crypto MetaData", "RDINFO".
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from softsgx.arch.units import PAGE_BYTES
from softsgx.layout import U64, Nested, Raw, Structure, at

__all__ = [
    "CHILD_TYPES",
    "SHADOW_STACK_TYPES",
    "VA_SLOTS",
    "VA_SLOT_BYTES",
    "MacHeader",
    "PageInfo",
    "PageType",
    "Pcmd",
    "RdInfo",
    "RdInfoFlags",
    "RdInfoStatus",
    "SecInfo",
    "SecInfoFlags",
    "va_slot_index",
]

VA_SLOT_BYTES = 8
VA_SLOTS = PAGE_BYTES // VA_SLOT_BYTES


def va_slot_index(address: int) -> int:
    """Return which slot of its VA page ``address`` lies in, 0 to 511."""
    return address % PAGE_BYTES // VA_SLOT_BYTES


class PageType(IntEnum):
    """EPC page types; the numbers of SS_FIRST and SS_REST are from public headers."""

    SECS = 0
    TCS = 1
    REG = 2
    VA = 3
    TRIM = 4
    SS_FIRST = 5
    SS_REST = 6


SHADOW_STACK_TYPES = frozenset({PageType.SS_FIRST, PageType.SS_REST})
"""Types that only shadow-stack accesses reach."""

CHILD_TYPES = frozenset({PageType.TCS, PageType.REG, PageType.TRIM}) | SHADOW_STACK_TYPES
"""Types that belong to a SECS."""


class SecInfoFlags(IntFlag):
    """SECINFO.FLAGS without the page type, which is bits 15:8."""

    R = 1
    W = 2
    X = 4
    PENDING = 8
    MODIFIED = 16
    PR = 32
    RWX = 7
    TYPE_MASK = 0xFF00


class SecInfo(Structure, size=64, align=64):
    """A page's type and access rights: FLAGS and 56 reserved bytes.

    Attributes:
        flags: :class:`SecInfoFlags` in bits 5:0, the page type in bits 15:8.
        reserved: must be zero.

    Source:
        SDM vol. 3D, "Security Information (SECINFO)".
    """

    flags: int = at(0, U64)
    reserved: bytes = at(8, Raw(56))

    @property
    def page_type(self) -> int:
        """Bits 15:8, which may name no :class:`PageType`."""
        return self.flags >> 8 & 0xFF

    @classmethod
    def of(cls, page_type: PageType, rights: int = 0) -> SecInfo:
        """Return the SECINFO of a page type with R/W/X ``rights`` (bits 2:0)."""
        return cls(flags=page_type << 8 | rights)


class PageInfo(Structure, size=32, align=32):
    """The operands of a leaf that do not fit its registers; all are addresses.

    Attributes:
        linaddr: the page's linear address; EWB writes it.
        srcpge: 4096 bytes of source or destination.
        secinfo: SECINFO, or PCMD for EWB and ELD*.
        secs: the EPC page that holds the SECS.

    Source:
        SDM vol. 3D, "Page Information (PAGEINFO)".
    """

    linaddr: int = at(0, U64)
    srcpge: int = at(8, U64)
    secinfo: int = at(16, U64)
    secs: int = at(24, U64)


class Pcmd(Structure, size=128, align=128):
    """Paging Crypto Metadata: stored in memory beside each evicted page.

    The MAC also covers the page's linear address and version, which are not stored here: ELD*
    takes the address as an operand (PAGEINFO.LINADDR) and the version from a slot of a VA page.

    Source:
        SDM vol. 3D, "Paging Crypto MetaData (PCMD)"; struct sgx_pcmd, asm/sgx.h.
    """

    secinfo: SecInfo = at(0, Nested(SecInfo))
    enclave_id: int = at(64, U64)
    reserved: bytes = at(72, Raw(40))
    mac: bytes = at(112, Raw(16))


class MacHeader(Structure, size=128, align=128):
    """The data that the MAC of an evicted page covers besides its bytes and its version.

    Deviation: the manual fixes which fields the MAC covers, but not their order.

    Source:
        SDM vol. 3D, "EWB" and "ELDB/ELDU", TMP_HEADER.
    """

    eid: int = at(0, U64)
    linaddr: int = at(8, U64)
    secinfo: SecInfo = at(16, Nested(SecInfo))
    reserved: bytes = at(80, Raw(40))
    padding: bytes = at(120, Raw(8))


class RdInfoStatus(IntFlag):
    """RDINFO.STATUS."""

    CHILDPRESENT = 1
    VIRTCHILDPRESENT = 2


class RdInfoFlags(IntFlag):
    """RDINFO.FLAGS without the page type, which is bits 15:8."""

    R = 1
    W = 2
    X = 4
    PENDING = 8
    MODIFIED = 16
    PR = 32
    BLOCKED = 1 << 63


class RdInfo(Structure, size=32, align=32):
    """What ERDINFO reports about an EPC page.

    Attributes:
        status: :class:`RdInfoStatus`.
        flags: :class:`RdInfoFlags`, page type in bits 15:8.
        enclave_context: the context value of the page's SECS.
        reserved: zero.

    Source:
        SDM vol. 3D, "RDINFO"; offsets from public headers.
    """

    status: int = at(0, U64)
    flags: int = at(8, U64)
    enclave_context: int = at(16, U64)
    reserved: bytes = at(24, Raw(8))
