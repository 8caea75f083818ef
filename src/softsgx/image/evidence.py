"""Launch tokens, reports and quotes: statements of enclaves and platforms about enclaves.

None has a magic number, so size and reserved bytes identify them.  The reader checks of a quote
what the quote itself allows to check: its signature against the attestation key in it, and that key
against the quoting enclave's report.  It checks no certificate and no EPID signature.

Source:
    SDM vol. 3D, "EINIT Token Structure (EINITTOKEN)", "Report (REPORT)"; Intel SGX ECDSA Quote
    Library API, appendix "Quote Format", version 3; Intel SGX SDK, common/inc/sgx_quote.h.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from softsgx.arch import AttributesFlags, EinitToken, Report
from softsgx.image._file import Bytes
from softsgx.layout import U16, U32, Raw, Structure, at

__all__ = ["Evidence", "read_evidence"]

_TOKEN_FILE_BYTES = 1024  # the SDK's token file: the token and data about its enclave
_BODY_BYTES = 384
_SIGNED_AT, _SIGNED_BYTES = 0, 48 + _BODY_BYTES
_ECDSA_VERSION, _ECDSA_P256 = 3, 2
_EPID_VERSIONS = (1, 2)
_EPID_KINDS = ("unlinkable", "linkable")
_POINT_BYTES = 64
_CERTIFICATION = {
    1: "PPID in the clear", 2: "PPID encrypted, RSA-2048", 3: "PPID encrypted, RSA-3072",
    4: "PCK certificate", 5: "PCK certificate chain", 6: "ECDSA signature data",
    7: "platform manifest",
}  # fmt: skip

Value = str | int


@dataclass(frozen=True)
class Evidence:
    """One structure, field by field.

    Attributes:
        kind: ``einittoken``, ``report`` or ``quote``.
        title: its heading in output.
        fields: names and values in the structure's order; bytes in hexadecimal.
        problems: its contradictions, one sentence each.
    """

    kind: str
    title: str
    fields: tuple[tuple[str, Value], ...]
    problems: tuple[str, ...] = ()


class _QuoteHeader(Structure, size=48):
    """The first bytes of a quote of version 3."""

    version: int = at(0, U16)
    key_type: int = at(2, U16)
    reserved: int = at(4, U32)
    qe_svn: int = at(8, U16)
    pce_svn: int = at(10, U16)
    qe_vendor: bytes = at(12, Raw(16))
    user_data: bytes = at(28, Raw(20))


class _EpidHeader(Structure, size=48):
    """The first bytes of an EPID quote."""

    version: int = at(0, U16)
    sign_type: int = at(2, U16)
    group_id: bytes = at(4, Raw(4))
    qe_svn: int = at(8, U16)
    pce_svn: int = at(10, U16)
    xeid: int = at(12, U32)
    basename: bytes = at(16, Raw(32))


def read_evidence(file: Bytes) -> Evidence | None:
    """Return the token, report or quote that a file consists of; None for any other file."""
    for read in (_token, _report, _quote):
        found = read(file)
        if found is not None:
            return found
    return None


def _token(file: Bytes) -> Evidence | None:
    if len(file) not in (EinitToken.SIZE, _TOKEN_FILE_BYTES):
        return None
    token = file.structure(EinitToken, 0, "EINITTOKEN")
    flags = token.attributes.flags
    if any(token.reserved1) or token.valid > 1 or not flags & AttributesFlags.MODE64BIT:
        return None
    dirty = any(token.reserved2 + token.reserved3 + token.reserved4)
    problem = "reserved bytes are set, as in tokens of the SDK's simulation mode: EINIT refuses it"
    return Evidence(
        "einittoken",
        f"EINITTOKEN, {'valid' if token.valid else 'not valid'}",
        (
            ("valid", token.valid),
            ("attributes", f"{flags:#x}"),
            ("xfrm", f"{token.attributes.xfrm:#x}"),
            ("mrenclave", token.mrenclave.hex()),
            ("mrsigner", token.mrsigner.hex()),
            ("cpusvn_le", token.cpusvn_le.hex()),
            ("isvprodid_le", token.isv_prod_id_le),
            ("isvsvn_le", token.isv_svn_le),
            ("masked_miscselect_le", f"{token.masked_miscselect_le:#x}"),
            ("masked_attributes_le", f"{token.masked_attributes_le.flags:#x}"),
            ("masked_xfrm_le", f"{token.masked_attributes_le.xfrm:#x}"),
            ("keyid", token.key_id.hex()),
            ("mac", token.mac.hex()),
        ),
        (problem,) if dirty else (),
    )


def _report(file: Bytes) -> Evidence | None:
    if len(file) != Report.SIZE:
        return None
    report = file.structure(Report, 0, "REPORT")
    if not _is_body(report):
        return None
    keys = (("keyid", report.key_id.hex()), ("mac", report.mac.hex()))
    return Evidence("report", "REPORT of an enclave to another", (*_body(report), *keys))


def _is_body(report: Report) -> bool:
    reserved = report.reserved1 + report.reserved2 + report.reserved3 + report.reserved4
    return not any(reserved) and bool(report.attributes.flags & AttributesFlags.INIT)


def _body(report: Report, prefix: str = "") -> Iterator[tuple[str, Value]]:
    """Yield the fields of a report, except its MAC."""
    flags = report.attributes.flags
    debug = " (debug)" if flags & AttributesFlags.DEBUG else ""
    yield f"{prefix}cpusvn", report.cpusvn.hex()
    yield f"{prefix}miscselect", f"{report.miscselect:#x}"
    yield f"{prefix}isvextprodid", report.isv_ext_prod_id.hex()
    yield f"{prefix}attributes", f"{flags:#x}{debug}"
    yield f"{prefix}xfrm", f"{report.attributes.xfrm:#x}"
    yield f"{prefix}mrenclave", report.mrenclave.hex()
    yield f"{prefix}mrsigner", report.mrsigner.hex()
    yield f"{prefix}configid", report.config_id.hex()
    yield f"{prefix}isvprodid", report.isv_prod_id
    yield f"{prefix}isvsvn", report.isv_svn
    yield f"{prefix}configsvn", report.config_svn
    yield f"{prefix}isvfamilyid", report.isv_family_id.hex()
    yield f"{prefix}reportdata", report.report_data.hex()


def _report_body(file: Bytes, offset: int) -> Report:
    """Return the 384 bytes of a report in a quote as a report without its MAC."""
    body = bytes(file.take(offset, _BODY_BYTES, "report body"))
    return Report.unpack(body + bytes(Report.SIZE - _BODY_BYTES))


def _quote(file: Bytes) -> Evidence | None:
    body_at = _QuoteHeader.SIZE
    length_at = body_at + _BODY_BYTES
    if len(file) < length_at + 4:
        return None
    report = _report_body(file, body_at)
    signature = length_at + 4
    if not _is_body(report) or signature + file.u32(length_at, "signature size") > len(file):
        return None
    header = file.structure(_QuoteHeader, 0, "quote")
    if (header.version, header.key_type, header.reserved) == (_ECDSA_VERSION, _ECDSA_P256, 0):
        part = file.part(signature, file.u32(length_at, "signature size"), "quote signature")
        return _ecdsa(file, header, report, part)
    if header.version in _EPID_VERSIONS and header.key_type < len(_EPID_KINDS):
        return _epid(file, report, file.u32(length_at, "signature size"))
    return None


def _epid(file: Bytes, report: Report, signature_bytes: int) -> Evidence:
    header = file.structure(_EpidHeader, 0, "quote")
    kind = _EPID_KINDS[header.sign_type]
    return Evidence(
        "quote",
        f"EPID quote, version {header.version}, {kind}",
        (
            ("version", header.version),
            ("sign_type", kind),
            ("epid_group_id", header.group_id[::-1].hex()),
            ("qe_svn", header.qe_svn),
            ("pce_svn", header.pce_svn),
            ("xeid", header.xeid),
            ("basename", header.basename.hex()),
            *_body(report),
            ("signature_bytes", signature_bytes),
        ),
    )


def _ecdsa(file: Bytes, header: _QuoteHeader, report: Report, data: Bytes) -> Evidence:
    """Return an ECDSA quote.

    Raises:
        SoftSgxError: its signature data is cut short.
    """
    what = "quote signature"
    signature = bytes(data.take(0, _POINT_BYTES, what))
    key = bytes(data.take(_POINT_BYTES, _POINT_BYTES, what))
    qe = _report_body(data, 2 * _POINT_BYTES)
    after_qe = 2 * _POINT_BYTES + _BODY_BYTES + _POINT_BYTES
    auth_bytes = int.from_bytes(data.take(after_qe, 2, what), "little")
    auth = bytes(data.take(after_qe + 2, auth_bytes, "quoting enclave's data"))
    certification = after_qe + 2 + auth_bytes
    kind = int.from_bytes(data.take(certification, 2, what), "little")
    size = data.u32(certification + 2, what)
    data.take(certification + 6, size, "certification data")

    problems = []
    if not _signed(bytes(file.take(_SIGNED_AT, _SIGNED_BYTES, "quote")), signature, key):
        problems.append("its signature is not by the attestation key in it")
    if qe.report_data != hashlib.sha256(key + auth).digest() + bytes(32):
        problems.append("its attestation key is not the one that its quoting enclave reports")
    return Evidence(
        "quote",
        "ECDSA quote, version 3",
        (
            ("version", header.version),
            ("attestation_key", "ECDSA, P-256"),
            ("qe_svn", header.qe_svn),
            ("pce_svn", header.pce_svn),
            ("qe_vendor", header.qe_vendor.hex()),
            ("user_data", header.user_data.hex()),
            *_body(report),
            ("attestation_public_key", key.hex()),
            *_body(qe, "qe_"),
            ("certification", _CERTIFICATION.get(kind, f"type {kind}")),
            ("certification_bytes", size),
        ),
        tuple(problems),
    )


def _signed(message: bytes, signature: bytes, key: bytes) -> bool:
    """Return whether ECDSA over P-256 and SHA-256 verifies; numbers are big-endian."""
    half = _POINT_BYTES // 2
    x, y, r, s = (
        int.from_bytes(part, "big")
        for part in (key[:half], key[half:], signature[:half], signature[half:])
    )
    try:
        public = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
        public.verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):  # ValueError: not a point of the curve
        return False
    return True
