"""Checking a SIGSTRUCT: its form, its signature, and whether it fits an enclave.

The checks come in the order of EINIT: form, signature, hash, attributes.

Source:
    SDM vol. 3D, "EINIT", Operation; "Enclave Signature Structure (SIGSTRUCT)".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from softsgx.arch import (
    PADDING_BYTES,
    RSA_BYTES,
    SIGSTRUCT_HEADER,
    SIGSTRUCT_HEADER2,
    VENDOR_INTEL,
    AttributesFlags,
    Secs,
    SigStruct,
)

__all__ = ["Check", "check_against", "check_form", "check_signature", "verify"]

_EXPONENT = 3
_DIGEST_INFO = bytes.fromhex("3031300d060960864801650304020105000420")


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Attributes:
        name: the checked field, by its name in the manual.
        ok: whether EINIT would continue.
        detail: the problem; empty if there is none.
    """

    name: str
    ok: bool
    detail: str = ""


def verify(
    sigstruct: SigStruct, *, mrenclave: bytes | None = None, secs: Secs | None = None
) -> list[Check]:
    """Return all checks of ``sigstruct``: form, signature, then the comparisons with an enclave.

    Args:
        sigstruct: the SIGSTRUCT.
        mrenclave: the measurement to compare with; None: no comparison.
        secs: the SECS to compare with; None: no comparison.
    """
    checks = list(check_form(sigstruct))
    failed = check_signature(sigstruct)
    checks.append(Check("SIGNATURE", failed is None, failed or ""))
    if mrenclave is not None:
        checks.append(
            _check(
                "ENCLAVEHASH",
                sigstruct.enclave_hash == mrenclave,
                f"{sigstruct.enclave_hash.hex()}, measured {mrenclave.hex()}",
            )
        )
    if secs is not None:
        checks += check_against(sigstruct, secs)
    return checks


def check_form(sigstruct: SigStruct) -> Iterator[Check]:
    """Yield the checks that EINIT makes before any arithmetic."""
    sig = sigstruct
    yield _check("HEADER", sig.header == SIGSTRUCT_HEADER, sig.header.hex())
    yield _check("VENDOR", sig.vendor in (0, VENDOR_INTEL), f"{sig.vendor:#x}")
    yield _check("HEADER2", sig.header2 == SIGSTRUCT_HEADER2, sig.header2.hex())
    yield _check("EXPONENT", sig.exponent == _EXPONENT, f"{sig.exponent}")
    dirty = [
        name
        for name in ("reserved1", "reserved2", "reserved3", "reserved4")
        if any(getattr(sig, name))
    ]
    places = ", ".join(f"at {SigStruct.OFFSETS[name]}" for name in dirty)
    yield _check("reserved", not dirty, f"not zero {places}")


def check_signature(sigstruct: SigStruct) -> str | None:
    """Return the problem with key, signature, Q1 or Q2; None if there is none.

    Every field is untrusted; no value makes the check slower than another.
    """
    n, s, q1, q2 = (
        int.from_bytes(field, "little")
        for field in (sigstruct.modulus, sigstruct.signature, sigstruct.q1, sigstruct.q2)
    )
    if n.bit_length() != RSA_BYTES * 8 or n % 2 == 0:
        return f"modulus has {n.bit_length()} bits and is {'odd' if n % 2 else 'even'}"
    if s >= n:
        return "signature is not below the modulus"
    digest = hashlib.sha256(sigstruct.signed_bytes()).digest()
    ones = b"\xff" * (PADDING_BYTES - 3 - len(_DIGEST_INFO))
    padded = b"\x00\x01" + ones + b"\x00" + _DIGEST_INFO + digest
    assert len(padded) == RSA_BYTES, f"{len(padded)} bytes of padded digest"
    if pow(s, _EXPONENT, n) != int.from_bytes(padded, "big"):
        return "signature is not over these fields with this key"
    quotient, remainder = divmod(s * s, n)
    if q1 != quotient:
        return "Q1 is not S*S div N"
    if q2 != s * remainder // n:
        return "Q2 is not S*(S*S mod N) div N"
    return None


def check_against(sigstruct: SigStruct, secs: Secs) -> Iterator[Check]:
    """Yield the comparisons of EINIT with SECS, and the fields that need KSS."""
    kss = secs.attributes.flags & AttributesFlags.KSS
    yield _check(
        "ISVFAMILYID",
        bool(kss) or not any(sigstruct.isv_family_id + sigstruct.isv_ext_prod_id),
        f"{sigstruct.isv_family_id.hex()} without KSS",
    )
    pairs = (
        ("ATTRIBUTES", secs.attributes.flags, sigstruct.attributes.flags,
         sigstruct.attribute_mask.flags),
        ("XFRM", secs.attributes.xfrm, sigstruct.attributes.xfrm, sigstruct.attribute_mask.xfrm),
        ("MISCSELECT", secs.miscselect, sigstruct.miscselect, sigstruct.misc_mask),
        ("CET_ATTRIBUTES", secs.cet_attributes, sigstruct.cet_attributes,
         sigstruct.cet_attributes_mask),
    )  # fmt: skip
    for name, have, want, mask in pairs:
        yield _check(
            name, (have ^ want) & mask == 0, f"SECS {have:#x}, SIGSTRUCT {want:#x}, mask {mask:#x}"
        )


def _check(name: str, ok: bool, detail: str) -> Check:
    return Check(name, ok, "" if ok else detail)
