"""SIGSTRUCTs: made, checked, made in two steps.  The arithmetic is checked against plain RSA."""

from __future__ import annotations

import datetime
import hashlib

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from tests.support.enclave_files import blob_plan, key

from softsgx.arch import Attributes, Secs, SigStruct
from softsgx.errors import SoftSgxError
from softsgx.image import (
    SignOptions,
    attach_signature,
    bcd_date,
    check_signature,
    date_text,
    key_pem,
    load_key,
    load_public_key,
    measure,
    mrsigner,
    public_pem,
    sign,
    sign_plan,
    split_signed,
    unsigned_sigstruct,
    verify,
)

DATE = datetime.date(2026, 1, 31)


def signed(**options: object) -> SigStruct:
    return sign_plan(blob_plan(), key(), SignOptions(date=DATE, **options))  # type: ignore[arg-type]


def failed(sig: SigStruct, **context: object) -> list[str]:
    return [c.name for c in verify(sig, **context) if not c.ok]  # type: ignore[arg-type]


def test_a_signed_plan_passes_every_check() -> None:
    assert failed(signed(), mrenclave=measure(blob_plan())) == []


def test_the_same_key_fields_and_date_give_the_same_bytes() -> None:
    assert signed().pack() == signed().pack()


def test_the_signature_is_plain_pkcs1_over_the_two_signed_parts() -> None:
    sig = signed()
    data = sig.pack()
    assert sig.signed_bytes() == data[:128] + data[900:1028]
    key().public_key().verify(
        sig.signature[::-1], sig.signed_bytes(), padding.PKCS1v15(), hashes.SHA256()
    )
    assert int.from_bytes(sig.modulus, "little") == key().public_key().public_numbers().n


def test_q1_and_q2_spare_the_processor_its_divisions() -> None:
    sig = signed()
    n, s, q1, q2 = (
        int.from_bytes(x, "little") for x in (sig.modulus, sig.signature, sig.q1, sig.q2)
    )
    rest = s * s - q1 * n
    assert 0 <= rest < n
    assert 0 <= s * rest - q2 * n < n
    assert s * rest - q2 * n == pow(s, 3, n)


def test_mrsigner_hashes_the_modulus_as_stored() -> None:
    n = key().public_key().public_numbers().n
    assert mrsigner(signed()) == hashlib.sha256(n.to_bytes(384, "little")).digest()


@pytest.mark.parametrize("field", list(SigStruct.OFFSETS))
def test_no_byte_of_a_sigstruct_can_change_unseen(field: str) -> None:
    whole = bytearray(signed().pack())
    whole[SigStruct.OFFSETS[field]] ^= 1
    assert failed(SigStruct.unpack(whole))


@pytest.mark.parametrize(
    ("field", "value", "check"),
    [
        ("header", bytes(16), "HEADER"),
        ("header2", bytes(16), "HEADER2"),
        ("vendor", 0x8087, "VENDOR"),
        ("exponent", 65537, "EXPONENT"),
        ("reserved1", b"\1" + bytes(83), "reserved"),
        ("reserved2", b"\1\0", "reserved"),
        ("reserved3", b"\1" + bytes(15), "reserved"),
        ("reserved4", b"\1" + bytes(11), "reserved"),
    ],
)
def test_a_bad_form_is_named_first(field: str, value: object, check: str) -> None:
    assert failed(signed().replace(**{field: value}))[0] == check


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"modulus": bytes(384)}, "0 bits"),
        ({"modulus": b"\xff" * 383 + b"\x7f"}, "3071 bits"),
        ({"modulus": b"\xfe" + b"\xff" * 383}, "even"),
        ({"signature": b"\xff" * 384}, "not below the modulus"),
        ({"signature": b"\x02" + bytes(383)}, "not over these fields"),
        ({"q1": bytes(384)}, "Q1"),
        ({"q2": bytes(384)}, "Q2"),
        ({"isv_svn": 7}, "not over these fields"),
    ],
)
def test_a_bad_signature_says_what_is_wrong(changes: dict[str, object], why: str) -> None:
    problem = check_signature(signed().replace(**changes))
    assert problem is not None
    assert why in problem


def secs(**values: object) -> Secs:
    return Secs(**{"attributes": Attributes(flags=4, xfrm=3), **values})


def test_another_enclave_is_named_by_both_hashes() -> None:
    (check,) = [c for c in verify(signed(), mrenclave=bytes(32)) if not c.ok]
    assert check.name == "ENCLAVEHASH"
    assert bytes(32).hex() in check.detail
    assert measure(blob_plan()).hex() in check.detail


@pytest.mark.parametrize(
    ("options", "values", "expected"),
    [
        ({}, {}, []),
        ({}, {"attributes": Attributes(flags=6, xfrm=3)}, []),
        ({}, {"attributes": Attributes(flags=4, xfrm=0xE7)}, []),
        ({"no_debug": True}, {"attributes": Attributes(flags=6, xfrm=3)}, ["ATTRIBUTES"]),
        ({}, {"attributes": Attributes(flags=0x14, xfrm=3)}, ["ATTRIBUTES"]),
        ({}, {"attributes": Attributes(flags=4, xfrm=0x203)}, ["XFRM"]),
        ({"pkru": "any"}, {"attributes": Attributes(flags=4, xfrm=0x203)}, []),
        ({"pkru": "on"}, {}, ["XFRM"]),
        ({"amx": "on"}, {"attributes": Attributes(flags=4, xfrm=0x60003)}, []),
        ({}, {"miscselect": 1}, ["MISCSELECT"]),
        ({"misc_mask": 0xFFFFFFFE}, {"miscselect": 1}, []),
        ({"kss": True, "isv_family_id": b"f" * 16}, {}, ["ISVFAMILYID", "ATTRIBUTES"]),
        (
            {"kss": True, "isv_family_id": b"f" * 16},
            {"attributes": Attributes(flags=0x84, xfrm=3)},
            [],
        ),
        ({"cet_attributes_mask": 1, "cet_attributes": 1}, {}, ["CET_ATTRIBUTES"]),
    ],
)
def test_secs_is_compared_under_the_masks(
    options: dict[str, object], values: dict[str, object], expected: list[str]
) -> None:
    assert failed(signed(**options), secs=secs(**values)) == expected


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"isv_svn": 1 << 16}, "isv_svn 0x10000 does not fit 16 bits"),
        ({"vendor": 1}, "vendor 0x1"),
        ({"attributes": 5}, "INIT"),
        ({"isv_family_id": b"short"}, "takes 16"),
        ({"isv_ext_prod_id": b"x" * 16}, "needs KSS"),
    ],
)
def test_options_that_no_sigstruct_can_hold_are_refused(
    options: dict[str, object], why: str
) -> None:
    with pytest.raises(SoftSgxError, match=why):
        SignOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("switch", "bit"),
    [("kss", 0x80), ("provision_key", 0x10), ("launch_key", 0x20), ("aex_notify", 0x400)],
)
def test_a_switch_sets_its_bit_in_attributes_and_in_the_mask(switch: str, bit: int) -> None:
    sig = signed(**{switch: True}, attribute_mask=0)
    assert sig.attributes.flags == 4 | bit
    assert sig.attribute_mask.flags == bit


def test_masks_keep_every_bit_that_has_no_name() -> None:
    sig = signed(pkru="any", amx="any", no_debug=True)
    assert sig.attribute_mask.xfrm == 0xFFFF_FFFF_FFFF_FFFF & ~(0xE4 | 0x200 | 0x60000)
    assert sig.attribute_mask.flags == 0xFFFF_FFFF_FFFF_FFFF
    assert signed().attribute_mask.flags == 0xFFFF_FFFF_FFFF_FFFD
    assert signed().attribute_mask.xfrm == 0xFFFF_FFFF_FFFF_FF1B


def test_miscselect_is_stored_under_its_mask() -> None:
    assert signed(miscselect=3, misc_mask=2).miscselect == 2


def test_two_steps_give_the_same_sigstruct_as_one() -> None:
    blank = unsigned_sigstruct(measure(blob_plan()), SignOptions(date=DATE, isv_svn=3))
    data = blank.signed_bytes()
    assert len(data) == 256
    signature = key().sign(data, padding.PKCS1v15(), hashes.SHA256())
    joined = attach_signature(split_signed(data), key().public_key(), signature)
    assert joined == signed(isv_svn=3)


def test_a_foreign_signature_is_not_attached() -> None:
    blank = unsigned_sigstruct(bytes(32), SignOptions())
    good = key().sign(blank.signed_bytes(), padding.PKCS1v15(), hashes.SHA256())
    for signature in (good[::-1], good[:-1], bytes(384), b"\xff" * 384):
        with pytest.raises(SoftSgxError, match="signature"):
            attach_signature(blank, key().public_key(), signature)
    with pytest.raises(SoftSgxError, match="these very 256 bytes"):
        attach_signature(blank.replace(isv_svn=1), key().public_key(), good)


@pytest.mark.parametrize("data", [b"", bytes(256), bytes(255)])
def test_data_that_cannot_be_signed_is_refused(data: bytes) -> None:
    with pytest.raises(SoftSgxError, match=r"data to sign|256"):
        split_signed(data, "data.bin")


def test_keys_survive_pem_of_both_kinds() -> None:
    pkcs8 = key().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    for pem in (key_pem(key()), pkcs8):
        assert load_key(pem).private_numbers() == key().private_numbers()
    public = key().public_key()
    assert load_public_key(public_pem(public)).public_numbers() == public.public_numbers()


def test_keys_that_sgx_cannot_use_are_refused_by_name() -> None:
    usual = rsa.generate_private_key(65537, 2048)
    with pytest.raises(SoftSgxError, match=r"a\.pem: RSA-2048 with exponent 65537"):
        load_key(key_pem(usual), "a.pem")
    with pytest.raises(SoftSgxError, match="RSA-2048"):
        load_public_key(public_pem(usual.public_key()))
    with pytest.raises(SoftSgxError, match="RSA-2048"):
        sign(SigStruct(), usual)
    elliptic = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with pytest.raises(SoftSgxError, match="RSA-3072"):
        load_key(elliptic)
    for junk in (b"", b"junk", key_pem(key())[:200]):
        with pytest.raises(SoftSgxError, match="PEM"):
            load_key(junk)
        with pytest.raises(SoftSgxError, match="PEM"):
            load_public_key(junk)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        (0x20260131, "2026-01-31"),
        (0x190C07E5, "0x190c07e5"),
        (0, "0x00000000"),
        (20260131, "0x01352523"),
    ],
)
def test_dates_are_shown_as_dates_only_when_they_are_bcd(field: int, text: str) -> None:
    assert date_text(field) == text


def test_a_date_prints_in_hex_as_it_reads() -> None:
    assert bcd_date(DATE) == 0x20260131
    assert bcd_date(None) == 0
