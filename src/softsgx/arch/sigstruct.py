"""Enclave signatures and launch tokens.

Source:
    SDM vol. 3D, "Enclave Signature Structure (SIGSTRUCT)", "EINIT Token Structure (EINITTOKEN)".
"""

from __future__ import annotations

from softsgx.arch.secs import Attributes
from softsgx.layout import U8, U16, U32, Nested, Raw, Structure, at

__all__ = [
    "PADDING_BYTES",
    "RSA_BYTES",
    "SIGSTRUCT_HEADER",
    "SIGSTRUCT_HEADER2",
    "VENDOR_INTEL",
    "EinitToken",
    "SigStruct",
]

RSA_BYTES = 384
PADDING_BYTES = 352
VENDOR_INTEL = 0x8086
SIGSTRUCT_HEADER = bytes.fromhex("06000000e10000000000010000000000")
SIGSTRUCT_HEADER2 = bytes.fromhex("01010000600000006000000001000000")


class SigStruct(Structure, size=1808, align=4096):
    """The enclave's certificate; all big numbers are little-endian.

    Attributes:
        date: BCD yyyymmdd; no leaf checks it.
        attribute_mask: which ATTRIBUTES bits EINIT compares.
        enclave_hash: MRENCLAVE of the enclave that it signs.
        q1: floor(S² / N).
        q2: floor(S·(S² mod N) / N).

    Source:
        SDM vol. 3D, "Enclave Signature Structure (SIGSTRUCT)".
    """

    header: bytes = at(0, Raw(16), default=SIGSTRUCT_HEADER)
    vendor: int = at(16, U32)
    date: int = at(20, U32)
    header2: bytes = at(24, Raw(16), default=SIGSTRUCT_HEADER2)
    swdefined: int = at(40, U32)
    reserved1: bytes = at(44, Raw(84))
    modulus: bytes = at(128, Raw(RSA_BYTES))
    exponent: int = at(512, U32, default=3)
    signature: bytes = at(516, Raw(RSA_BYTES))
    miscselect: int = at(900, U32)
    misc_mask: int = at(904, U32)
    cet_attributes: int = at(908, U8)
    cet_attributes_mask: int = at(909, U8)
    reserved2: bytes = at(910, Raw(2))
    isv_family_id: bytes = at(912, Raw(16))
    attributes: Attributes = at(928, Nested(Attributes))
    attribute_mask: Attributes = at(944, Nested(Attributes))
    enclave_hash: bytes = at(960, Raw(32))
    reserved3: bytes = at(992, Raw(16))
    isv_ext_prod_id: bytes = at(1008, Raw(16))
    isv_prod_id: int = at(1024, U16)
    isv_svn: int = at(1026, U16)
    reserved4: bytes = at(1028, Raw(12))
    q1: bytes = at(1040, Raw(RSA_BYTES))
    q2: bytes = at(1424, Raw(RSA_BYTES))

    def signed_bytes(self) -> bytes:
        """Return the 256 bytes that the signature covers: 0–127 and 900–1027."""
        data = self.pack()
        return data[:128] + data[900:1028]


class EinitToken(Structure, size=304, align=512):
    """Permission of a launch enclave; all zero when the signer itself is allowed to launch.

    Attributes:
        valid: bit 0 is 1 when there is a token.
        mac: AES-CMAC of bytes 0–191 under the EINITTOKEN key.

    Source:
        SDM vol. 3D, "EINIT Token Structure (EINITTOKEN)"; the CET byte is from public headers.
    """

    valid: int = at(0, U32)
    reserved1: bytes = at(4, Raw(44))
    attributes: Attributes = at(48, Nested(Attributes))
    mrenclave: bytes = at(64, Raw(32))
    reserved2: bytes = at(96, Raw(32))
    mrsigner: bytes = at(128, Raw(32))
    reserved3: bytes = at(160, Raw(32))
    cpusvn_le: bytes = at(192, Raw(16))
    isv_prod_id_le: int = at(208, U16)
    isv_svn_le: int = at(210, U16)
    cet_masked_attributes_le: int = at(212, U8)
    reserved4: bytes = at(213, Raw(23))
    masked_miscselect_le: int = at(236, U32)
    masked_attributes_le: Attributes = at(240, Nested(Attributes))
    key_id: bytes = at(256, Raw(32))
    mac: bytes = at(288, Raw(16))

    MACED_BYTES = 192
