"""The signature check of EINIT agrees with an RSA that knows nothing of Q1 and Q2.

Goal: exactly those signatures are valid that PKCS #1 v1.5 says, and only with the right
quotients.  Method: compared with the ``cryptography`` library on good, damaged and forged ones.

Source:
    SDM vol. 3D, "EINIT", Operation; RFC 8017, RSASSA-PKCS1-v1_5.
"""

from __future__ import annotations

from hashlib import sha256

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.hw import session_key, sign_sigstruct

from softsgx.arch import RSA_BYTES, SigStruct
from softsgx.hw.signature import HARDCODED_PADDING, mrsigner_of, signature_valid

N = session_key().public_key().public_numbers().n
D = session_key().private_numbers().d


def good() -> SigStruct:
    return sign_sigstruct(SigStruct(date=0x20240101, enclave_hash=b"\x5a" * 32))


def library_accepts(sig: SigStruct) -> bool:
    number = int.from_bytes(sig.signature, "little")
    try:
        session_key().public_key().verify(
            number.to_bytes(RSA_BYTES, "big"),
            sig.signed_bytes(),
            padding.PKCS1v15(),
            hashes.SHA256(),
        )
    except InvalidSignature:
        return False
    return True


def with_signature(sig: SigStruct, s: int) -> SigStruct:
    """``s`` with the quotients that belong to it, as far as they fit."""
    q1, rest = divmod(s * s, N)
    limit = 1 << 8 * RSA_BYTES
    return sig.replace(
        signature=s.to_bytes(RSA_BYTES, "little"),
        q1=(q1 % limit).to_bytes(RSA_BYTES, "little"),
        q2=(s * rest // N % limit).to_bytes(RSA_BYTES, "little"),
    )


def test_a_good_signature_is_valid_for_both() -> None:
    assert signature_valid(good()) and library_accepts(good())


def test_the_padding_is_what_the_library_signs() -> None:
    sig = good()
    cube = pow(int.from_bytes(sig.signature, "little"), 3, N)
    assert cube.to_bytes(RSA_BYTES, "big") == (
        HARDCODED_PADDING + sha256(sig.signed_bytes()).digest()
    )


@given(
    field=st.sampled_from(
        ["swdefined", "date", "miscselect", "misc_mask", "isv_prod_id", "isv_svn", "vendor"]
    ),
    bit=st.integers(0, 15),
)
@settings(max_examples=30, deadline=None)
def test_any_change_of_a_signed_field_is_found_by_both(field: str, bit: int) -> None:
    sig = good()
    changed = sig.replace(**{field: getattr(sig, field) ^ 1 << bit})
    assert not signature_valid(changed) and not library_accepts(changed)


@given(s=st.one_of(st.integers(0, N - 1), st.sampled_from([0, 1, 2, N - 1])))
@settings(max_examples=50, deadline=None)
def test_a_random_number_is_judged_alike(s: int) -> None:
    sig = with_signature(good(), s)
    assert signature_valid(sig) is library_accepts(sig) is False


@pytest.mark.parametrize("field", ["q1", "q2"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_quotient_off_by_one_is_an_invalid_signature(field: str, change: int) -> None:
    sig = good()
    value = int.from_bytes(getattr(sig, field), "little") + change
    changed = sig.replace(**{field: value.to_bytes(RSA_BYTES, "little")})
    assert library_accepts(changed), "the quotients are no part of what is signed"
    assert not signature_valid(changed)


def forge(encoded: bytes) -> SigStruct:
    """A signature of arbitrary encoded bytes, by the holder of the key."""
    return with_signature(good(), pow(int.from_bytes(encoded, "big"), D, N))


def test_only_the_exact_encoding_counts() -> None:
    digest = sha256(good().signed_bytes()).digest()
    assert signature_valid(forge(HARDCODED_PADDING + digest))
    loose = (
        b"\x00\x02" + HARDCODED_PADDING[2:] + digest,  # encryption padding
        HARDCODED_PADDING[:2] + b"\xfe" + HARDCODED_PADDING[3:] + digest,
        # Bleichenbacher: a short run of ones, and garbage behind the digest.
        (b"\x00\x01" + b"\xff" * 8 + HARDCODED_PADDING[-20:] + digest).ljust(RSA_BYTES, b"\x00"),
        HARDCODED_PADDING + bytes(32),
    )
    for encoded in loose:
        assert not signature_valid(forge(encoded)), encoded.hex()


def test_a_signature_of_another_representative_is_refused() -> None:
    # S + N is congruent to S; it is below 2^3072 for most keys, and no valid signature for any.
    sig = good()
    s = int.from_bytes(sig.signature, "little") + N
    if s < 1 << 8 * RSA_BYTES:
        assert not signature_valid(with_signature(sig, s))
    shrunk = sig.replace(modulus=bytes(RSA_BYTES))
    assert not signature_valid(shrunk)


def test_mrsigner_is_the_digest_of_the_modulus_as_stored() -> None:
    assert mrsigner_of(good()) == sha256(N.to_bytes(RSA_BYTES, "little")).digest()
