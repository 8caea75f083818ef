"""The enclave's control structure.

Source:
    SDM vol. 3D, "SGX Enclave Control Structure (SECS)", "ATTRIBUTES".
"""

from __future__ import annotations

from softsgx.layout import U8, U16, U32, U64, Nested, Raw, Structure, at

__all__ = ["Attributes", "Secs"]


class Attributes(Structure, size=16):
    """ATTRIBUTES: flags and XFRM.

    Source:
        SDM vol. 3D, "ATTRIBUTES".
    """

    flags: int = at(0, U64)
    xfrm: int = at(8, U64)


class Secs(Structure, size=4096, align=4096):
    """SGX Enclave Control Structure: the fields that the manual names and ECREATE reads.

    Attributes:
        size: bytes of the enclave's linear range, a power of two.
        base: first address of that range, a multiple of ``size``.
        ssa_frame_size: pages of one SSA frame.

    Source:
        SDM vol. 3D, "SGX Enclave Control Structure (SECS)".
    """

    size: int = at(0, U64)
    base: int = at(8, U64)
    ssa_frame_size: int = at(16, U32)
    miscselect: int = at(20, U32)
    cet_leg_bitmap_offset: int = at(24, U64)
    cet_attributes: int = at(32, U8)
    reserved1: bytes = at(33, Raw(15))
    attributes: Attributes = at(48, Nested(Attributes))
    mrenclave: bytes = at(64, Raw(32))
    reserved2: bytes = at(96, Raw(32))
    mrsigner: bytes = at(128, Raw(32))
    reserved3: bytes = at(160, Raw(32))
    config_id: bytes = at(192, Raw(64))
    isv_prod_id: int = at(256, U16)
    isv_svn: int = at(258, U16)
    config_svn: int = at(260, U16)
    reserved4: bytes = at(262, Raw(3834))
