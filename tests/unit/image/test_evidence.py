"""Tokens, reports and quotes: known by size and reserved bytes, and checked as far as they go."""

from __future__ import annotations

import hashlib
import json
import struct
from functools import cache
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from softsgx.arch import Attributes, EinitToken, Report
from softsgx.cli import main
from softsgx.errors import SoftSgxError
from softsgx.image import Bytes, Evidence, read_evidence

BODY_BYTES = 384
BODY = Report(
    attributes=Attributes(flags=7, xfrm=0xE7),
    mrenclave=b"\x11" * 32,
    mrsigner=b"\x22" * 32,
    isv_prod_id=3,
    isv_svn=4,
    report_data=b"\x33" * 64,
)


@cache
def attestation_key() -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(12345, ec.SECP256R1())


def point() -> bytes:
    numbers = attestation_key().public_key().public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


def ecdsa_quote(auth: bytes = b"\x01\x02\x03", padding: int = 0) -> bytes:
    header = struct.pack("<HHIHH16s20s", 3, 2, 0, 11, 16, b"\x44" * 16, b"\x55" * 20)
    signed = header + BODY.pack()[:BODY_BYTES]
    r, s = decode_dss_signature(attestation_key().sign(signed, ec.ECDSA(hashes.SHA256())))
    qe = BODY.replace(report_data=hashlib.sha256(point() + auth).digest() + bytes(32))
    data = r.to_bytes(32, "big") + s.to_bytes(32, "big") + point()
    data += qe.pack()[:BODY_BYTES] + bytes(64)
    data += struct.pack("<H", len(auth)) + auth + struct.pack("<HI", 5, 4) + b"PEM!"
    return signed + struct.pack("<I", len(data)) + data + bytes(padding)


def epid_quote() -> bytes:
    header = struct.pack("<HH4sHHI32s", 2, 1, b"\x0b\x0a\x00\x00", 1, 2, 0, b"\x66" * 32)
    return header + BODY.pack()[:BODY_BYTES] + struct.pack("<I", 680) + bytes(680)


def token(**changes: object) -> bytes:
    values = {"valid": 1, "attributes": Attributes(flags=6, xfrm=3), **changes}
    return EinitToken(mrenclave=b"\x77" * 32, **values).pack()


def read(data: bytes) -> Evidence | None:
    return read_evidence(Bytes("file", data))


@pytest.mark.parametrize(
    ("data", "kind", "title"),
    [
        (token(), "einittoken", "EINITTOKEN, valid"),
        (token(valid=0), "einittoken", "EINITTOKEN, not valid"),
        (token() + bytes(720), "einittoken", "EINITTOKEN, valid"),
        (BODY.pack(), "report", "REPORT of an enclave to another"),
        (ecdsa_quote(), "quote", "ECDSA quote, version 3"),
        (ecdsa_quote(padding=100), "quote", "ECDSA quote, version 3"),
        (epid_quote(), "quote", "EPID quote, version 2, linkable"),
    ],
    ids=["token", "invalid token", "token file", "report", "ecdsa", "padded ecdsa", "epid"],
)
def test_each_is_known_and_contradicts_nothing(data: bytes, kind: str, title: str) -> None:
    found = read(data)
    assert found is not None
    assert (found.kind, found.title, found.problems) == (kind, title, ())
    fields = dict(found.fields)
    assert fields["mrenclave"] == ("77" if kind == "einittoken" else "11") * 32


def test_the_fields_of_a_report_are_shown() -> None:
    found = read(BODY.pack())
    assert found is not None
    fields = dict(found.fields)
    assert fields["attributes"] == "0x7 (debug)"
    assert (fields["isvprodid"], fields["isvsvn"]) == (3, 4)
    assert fields["reportdata"] == "33" * 64


def test_a_group_id_is_shown_as_people_write_it() -> None:
    found = read(epid_quote())
    assert found is not None
    assert dict(found.fields)["epid_group_id"] == "00000a0b"


@pytest.mark.parametrize("at", [0, 100, 431])
def test_a_changed_quote_does_not_verify(at: int) -> None:
    data = bytearray(ecdsa_quote())
    data[28 + at if at == 0 else at] ^= 1
    found = read(bytes(data))
    assert found is not None
    assert found.problems == ("its signature is not by the attestation key in it",)


def test_an_attestation_key_that_was_not_reported_is_found() -> None:
    data = bytearray(ecdsa_quote())
    at = 432 + 4 + 128 + 320  # the quoting enclave's report data
    data[at] ^= 1
    found = read(bytes(data))
    assert found is not None
    assert "not the one that its quoting enclave reports" in found.problems[0]
    data[432 + 4 + 64] ^= 1  # a point that is not on the curve
    found = read(bytes(data))
    assert found is not None
    assert len(found.problems) == 2


def test_a_token_with_reserved_bytes_set_is_noted() -> None:
    found = read(token(reserved2=b"\xee" * 32))
    assert found is not None
    assert "EINIT refuses it" in found.problems[0]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(304),
        bytes(432),
        bytes(1024),
        bytes(5000),
        token(reserved1=b"\1" * 44),
        token(valid=2),
        BODY.replace(reserved3=b"\1" * 32).pack(),
        BODY.replace(attributes=Attributes(flags=6)).pack(),  # never launched
        ecdsa_quote()[:500],
        b"\4" + ecdsa_quote()[1:],
    ],
    ids=range(11),
)
def test_anything_else_is_not_taken_for_one(data: bytes) -> None:
    assert read(data) is None


def test_a_quote_whose_signature_data_ends_too_soon_is_refused() -> None:
    data = bytearray(ecdsa_quote())
    struct.pack_into("<I", data, 432, 585)
    with pytest.raises(SoftSgxError, match=r"takes 4 bytes|quote signature"):
        read(bytes(data))


def test_inspect_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "quote.dat"
    path.write_bytes(ecdsa_quote())
    assert main(["inspect", str(path)]) == 0
    assert "ECDSA quote, version 3" in capsys.readouterr().out
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert main(["inspect", str(path), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["format"], document["fields"]["isvsvn"]) == ("quote", 4)
    assert document["problems"] == ["its signature is not by the attestation key in it"]
