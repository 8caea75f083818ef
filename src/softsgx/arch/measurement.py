"""The input of the digest MRENCLAVE: 64-byte blocks, one kind for each building leaf.

Source:
    SDM vol. 3D, "ECREATE", "EADD", "EEXTEND", Operation: TMPUPDATEFIELD.
"""

from __future__ import annotations

import struct

__all__ = ["CHUNKS_PER_PAGE", "CHUNK_BYTES", "eadd_block", "ecreate_block", "eextend_block"]

CHUNK_BYTES = 256
CHUNKS_PER_PAGE = 16

_ECREATE = struct.Struct("<8sIQQ36x")
_EADD = struct.Struct("<8sQQ40x")
_EEXTEND = struct.Struct("<8sQ48x")


def ecreate_block(ssa_frame_size: int, size_bytes: int, cet_leg_bitmap_offset: int = 0) -> bytes:
    """Return the first block: SSA frame size in pages, enclave size, CET bitmap offset."""
    return _ECREATE.pack(b"ECREATE\0", ssa_frame_size, size_bytes, cet_leg_bitmap_offset)


def eadd_block(offset: int, secinfo_flags: int) -> bytes:
    """Return the block of a page ``offset`` bytes from the base; a TCS has flags 0x100."""
    return _EADD.pack(b"EADD\0\0\0\0", offset, secinfo_flags)


def eextend_block(offset: int) -> bytes:
    """Return the block that goes before the 256 bytes of the chunk at ``offset``."""
    return _EEXTEND.pack(b"EEXTEND\0", offset)
