"""The enclave signature as EINIT verifies it: RSA-3072 with exponent 3 and no division.

Source:
    SDM vol. 3D, "EINIT", Operation; "Enclave Signature Structure (SIGSTRUCT)", Q1 and Q2.
"""

from __future__ import annotations

import hashlib

from softsgx.arch import PADDING_BYTES, SigStruct

__all__ = ["HARDCODED_PADDING", "mrsigner_of", "signature_valid"]

_SHA256_INFO = bytes.fromhex("3031300d060960864801650304020105000420")

HARDCODED_PADDING = (
    b"\x00\x01" + b"\xff" * (PADDING_BYTES - 3 - len(_SHA256_INFO)) + b"\x00" + _SHA256_INFO
)
"""PKCS #1 v1.5 padding of a SHA-256 digest in 3072 bits, without the digest."""

assert len(HARDCODED_PADDING) == PADDING_BYTES, "padding and digest fill 384 bytes"


def signature_valid(sig: SigStruct) -> bool:
    """Return whether SIGNATURE is valid for the 256 signed bytes, and Q1 and Q2 fit it.

    The quotients let the processor reduce by multiplying: S² − Q1·N is S² mod N, and times S
    − Q2·N it is S³ mod N, provided that either lies in [0, N).  So a wrong quotient is a wrong
    signature.
    """
    n, s, q1, q2 = (
        int.from_bytes(number, "little") for number in (sig.modulus, sig.signature, sig.q1, sig.q2)
    )
    if s >= n:
        return False
    square = s * s - q1 * n
    if not 0 <= square < n:
        return False
    cube = square * s - q2 * n
    if not 0 <= cube < n:
        return False
    digest = hashlib.sha256(sig.signed_bytes()).digest()
    return cube == int.from_bytes(HARDCODED_PADDING + digest, "big")


def mrsigner_of(sig: SigStruct) -> bytes:
    """Return MRSIGNER: SHA-256 of the modulus as it is stored, little-endian."""
    return hashlib.sha256(sig.modulus).digest()
