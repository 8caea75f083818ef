"""Making SIGSTRUCTs: in one step with a private key, or in two steps with a key elsewhere.

Signing is deterministic: the same key, fields and date give the same bytes.  The library
``cryptography`` computes RSA; this module adds what SGX needs: little-endian order, Q1 and Q2.

Source:
    SDM vol. 3D, "Enclave Signature Structure (SIGSTRUCT)".
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from functools import cache
from typing import Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from softsgx.arch import RSA_BYTES, Attributes, AttributesFlags, SigStruct, Xfrm
from softsgx.errors import SoftSgxError, first_line
from softsgx.image.measure import measure
from softsgx.image.plan import Plan
from softsgx.image.sigfile import bcd_date
from softsgx.image.verify import check_signature

__all__ = [
    "MASK_64",
    "SIGNED_BYTES",
    "Choice",
    "SignOptions",
    "attach_signature",
    "key_pem",
    "load_key",
    "load_public_key",
    "new_key",
    "public_pem",
    "sign",
    "sign_plan",
    "split_signed",
    "unsigned_sigstruct",
]

MASK_64 = (1 << 64) - 1
SIGNED_BYTES = 256
_RSA_BITS = RSA_BYTES * 8
_EXPONENT = 3

Choice = Literal["off", "on", "any"]
"""A state component: must be clear, must be set, or the loader chooses."""

_AVX_STATES = Xfrm.AVX | Xfrm.OPMASK | Xfrm.ZMM_HI256 | Xfrm.HI16_ZMM
_AMX_STATES = Xfrm.TILECFG | Xfrm.TILEDATA
_MUST_SET = {
    "provision_key": AttributesFlags.PROVISIONKEY,
    "launch_key": AttributesFlags.EINITTOKENKEY,
    "aex_notify": AttributesFlags.AEXNOTIFY,
    "kss": AttributesFlags.KSS,
}


@dataclass(frozen=True, kw_only=True)
class SignOptions:
    """The choices of a signer; the defaults let a loader choose DEBUG, AVX and AVX-512.

    All masks have a bit set where EINIT compares SECS with SIGSTRUCT.

    Attributes:
        attributes: ATTRIBUTES.FLAGS.
        attribute_mask: the bits of them that EINIT compares.
        xfrm: ATTRIBUTES.XFRM.
        xfrm_mask: the bits of them that EINIT compares.
        miscselect: MISCSELECT; stored ANDed with its mask.
        misc_mask: the bits of them that EINIT compares.
        cet_attributes: CET_ATTRIBUTES.
        cet_attributes_mask: the bits of them that EINIT compares.
        isv_prod_id: product, 16 bits.
        isv_svn: security version, 16 bits.
        isv_family_id: 16 bytes; only with ``kss``.
        isv_ext_prod_id: 16 bytes; only with ``kss``.
        date: the date of signing, stored as BCD; None stores 0.
        vendor: 0 or 0x8086.
        swdefined: SWDEFINED.
        kss: set KSS in attributes and mask.
        provision_key: the same with PROVISIONKEY.
        launch_key: the same with EINITTOKENKEY.
        aex_notify: the same with AEXNOTIFY.
        no_debug: put DEBUG in the mask, with value 0: production only.
        pkru: the PKRU state in XFRM.
        amx: the two AMX states in XFRM.
    """

    attributes: int = AttributesFlags.MODE64BIT.value
    attribute_mask: int = MASK_64 & ~AttributesFlags.DEBUG.value
    xfrm: int = Xfrm.X87.value | Xfrm.SSE.value
    xfrm_mask: int = MASK_64 & ~_AVX_STATES.value
    miscselect: int = 0
    misc_mask: int = 0xFFFF_FFFF
    cet_attributes: int = 0
    cet_attributes_mask: int = 0
    isv_prod_id: int = 0
    isv_svn: int = 0
    isv_family_id: bytes = bytes(16)
    isv_ext_prod_id: bytes = bytes(16)
    date: datetime.date | None = None
    vendor: int = 0
    swdefined: int = 0
    kss: bool = False
    provision_key: bool = False
    launch_key: bool = False
    aex_notify: bool = False
    no_debug: bool = False
    pkru: Choice = "off"
    amx: Choice = "off"

    def __post_init__(self) -> None:
        """Refuse values that no SIGSTRUCT can hold.

        Raises:
            SoftSgxError: a number is too large, or KSS fields are set without ``kss``.
        """
        widths = {
            "attributes": 64, "attribute_mask": 64, "xfrm": 64, "xfrm_mask": 64,
            "miscselect": 32, "misc_mask": 32, "cet_attributes": 8, "cet_attributes_mask": 8,
            "isv_prod_id": 16, "isv_svn": 16, "swdefined": 32,
        }  # fmt: skip
        for name, bits in widths.items():
            value = getattr(self, name)
            if not 0 <= value < 1 << bits:
                raise SoftSgxError(
                    f"sign: {name} {value:#x} does not fit {bits} bits; give a smaller value"
                )
        if self.vendor not in (0, 0x8086):
            raise SoftSgxError(f"sign: vendor {self.vendor:#x}; EINIT takes 0 and 0x8086")
        if self.attributes & AttributesFlags.INIT:
            raise SoftSgxError(
                f"sign: attributes {self.attributes:#x} have INIT, which only EINIT sets; clear it"
            )
        for name in ("isv_family_id", "isv_ext_prod_id"):
            value = getattr(self, name)
            if len(value) != 16:
                raise SoftSgxError(f"sign: {name} has {len(value)} bytes; it takes 16")
            if any(value) and not self._has_kss():
                raise SoftSgxError(f"sign: {name} {value.hex()} needs KSS; sign with kss")

    def _has_kss(self) -> bool:
        return self.kss or bool(self.attributes & AttributesFlags.KSS)

    def flags(self) -> tuple[int, int]:
        """Return ATTRIBUTES.FLAGS and its mask after all switches."""
        value, mask = self.attributes, self.attribute_mask
        for name, bit in _MUST_SET.items():
            if getattr(self, name):
                value, mask = value | bit, mask | bit
        if self.no_debug:
            debug = AttributesFlags.DEBUG.value
            value, mask = value & ~debug, mask | debug
        return int(value), int(mask)

    def states(self) -> tuple[int, int]:
        """Return ATTRIBUTES.XFRM and its mask after all switches."""
        value, mask = self.xfrm, self.xfrm_mask
        for choice, bits in ((self.pkru, Xfrm.PKRU.value), (self.amx, _AMX_STATES.value)):
            match choice:
                case "on":
                    value, mask = value | bits, mask | bits
                case "any":
                    mask &= ~bits
                case "off":
                    pass  # xfrm and xfrm_mask already have it
        return int(value), int(mask)


def unsigned_sigstruct(mrenclave: bytes, options: SignOptions) -> SigStruct:
    """Return the SIGSTRUCT for ``mrenclave`` with neither key nor signature in it."""
    flags, flags_mask = options.flags()
    xfrm, xfrm_mask = options.states()
    return SigStruct(
        vendor=options.vendor,
        date=bcd_date(options.date),
        swdefined=options.swdefined,
        miscselect=options.miscselect & options.misc_mask,
        misc_mask=options.misc_mask,
        cet_attributes=options.cet_attributes & options.cet_attributes_mask,
        cet_attributes_mask=options.cet_attributes_mask,
        isv_family_id=options.isv_family_id,
        attributes=Attributes(flags=flags, xfrm=xfrm),
        attribute_mask=Attributes(flags=flags_mask, xfrm=xfrm_mask),
        enclave_hash=mrenclave,
        isv_ext_prod_id=options.isv_ext_prod_id,
        isv_prod_id=options.isv_prod_id,
        isv_svn=options.isv_svn,
    )


def sign(sigstruct: SigStruct, key: rsa.RSAPrivateKey) -> SigStruct:
    """Return a copy of ``sigstruct`` with the key's modulus, signature, Q1 and Q2."""
    _require_sgx_key(key.public_key(), "sign")
    signature = key.sign(sigstruct.signed_bytes(), padding.PKCS1v15(), hashes.SHA256())
    return _complete(sigstruct, key.public_key(), int.from_bytes(signature, "big"))


def sign_plan(plan: Plan, key: rsa.RSAPrivateKey, options: SignOptions | None = None) -> SigStruct:
    """Measure ``plan`` and return its SIGSTRUCT, signed."""
    return sign(unsigned_sigstruct(measure(plan), options or SignOptions()), key)


def split_signed(data: bytes, name: str = "signing data") -> SigStruct:
    """Return the SIGSTRUCT fields that 256 bytes to sign hold: the other half of ``gendata``.

    Raises:
        SoftSgxError: they are not 256 bytes, or not a SIGSTRUCT's.
    """
    if len(data) != SIGNED_BYTES:
        raise SoftSgxError(f"{name}: {len(data)} bytes; data to sign has exactly {SIGNED_BYTES}")
    body_at = SigStruct.OFFSETS["miscselect"]
    blank = bytearray(SigStruct().pack())
    blank[:128], blank[body_at : body_at + 128] = data[:128], data[128:]
    sigstruct = SigStruct.unpack(blank)
    if (sigstruct.header, sigstruct.header2) != (SigStruct().header, SigStruct().header2):
        raise SoftSgxError(f"{name}: offset 0x0: header {data[:16].hex()}; not data to sign")
    return sigstruct


def attach_signature(
    sigstruct: SigStruct, public_key: rsa.RSAPublicKey, signature: bytes
) -> SigStruct:
    """Return a copy of ``sigstruct`` with a signature from another tool or device.

    Args:
        sigstruct: the fields that were signed.
        public_key: of the key that signed them.
        signature: 384 bytes of PKCS#1 v1.5, big-endian as RSA tools write it.

    Raises:
        SoftSgxError: the signature has another length or does not verify.
    """
    _require_sgx_key(public_key, "attach signature")
    if len(signature) != RSA_BYTES:
        raise SoftSgxError(f"signature: {len(signature)} bytes; RSA-3072 gives {RSA_BYTES}")
    number = int.from_bytes(signature, "big")
    if number >= public_key.public_numbers().n:
        raise SoftSgxError("signature: not below the modulus; is it big-endian, and of this key?")
    whole = _complete(sigstruct, public_key, number)
    failed = check_signature(whole)
    if failed is not None:
        raise SoftSgxError(
            f"signature: {failed}; it must be PKCS#1 v1.5 with SHA-256 over these very 256 bytes"
        )
    return whole


def new_key() -> rsa.RSAPrivateKey:
    """Generate an RSA-3072 key with exponent 3."""
    return rsa.generate_private_key(public_exponent=_EXPONENT, key_size=_RSA_BITS)


@cache
def throwaway_key() -> rsa.RSAPrivateKey:
    """Return the key of this process, generated once, for enclaves that only it loads."""
    return new_key()


def key_pem(key: rsa.RSAPrivateKey) -> bytes:
    """Return the key as unencrypted PEM (PKCS#1, as SGX tools expect it)."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )


def public_pem(key: rsa.RSAPublicKey) -> bytes:
    """Return a public key as PEM."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def load_key(pem: bytes, name: str = "key", password: bytes | None = None) -> rsa.RSAPrivateKey:
    """Read a private key from PEM, PKCS#1 or PKCS#8.

    Raises:
        SoftSgxError: it is no such key, or not RSA-3072 with exponent 3.
    """
    try:
        key = serialization.load_pem_private_key(pem, password)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SoftSgxError(
            f"{name}: no private key in PEM: {first_line(error)}; make one with softsgx sign "
            "--new-key"
        ) from error
    if not isinstance(key, rsa.RSAPrivateKey):
        raise SoftSgxError(f"{name}: a {type(key).__name__}; SGX needs RSA-3072, exponent 3")
    _require_sgx_key(key.public_key(), name)
    return key


def load_public_key(pem: bytes, name: str = "public key") -> rsa.RSAPublicKey:
    """Read a public key from PEM.

    Raises:
        SoftSgxError: it is no such key, or not RSA-3072 with exponent 3.
    """
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SoftSgxError(
            f"{name}: no public key in PEM: {first_line(error)}; make one with openssl rsa -pubout"
        ) from error
    if not isinstance(key, rsa.RSAPublicKey):
        raise SoftSgxError(f"{name}: a {type(key).__name__}; SGX needs RSA-3072, exponent 3")
    _require_sgx_key(key, name)
    return key


def _complete(sigstruct: SigStruct, key: rsa.RSAPublicKey, signature: int) -> SigStruct:
    """Fill in the key, the signature and the two quotients that spare EINIT a division."""
    modulus = key.public_numbers().n
    q1, remainder = divmod(signature * signature, modulus)
    q2 = signature * remainder // modulus
    return sigstruct.replace(
        modulus=modulus.to_bytes(RSA_BYTES, "little"),
        exponent=_EXPONENT,
        signature=signature.to_bytes(RSA_BYTES, "little"),
        q1=q1.to_bytes(RSA_BYTES, "little"),
        q2=q2.to_bytes(RSA_BYTES, "little"),
    )


def _require_sgx_key(key: rsa.RSAPublicKey, name: str) -> None:
    exponent = key.public_numbers().e
    if key.key_size != _RSA_BITS or exponent != _EXPONENT:
        raise SoftSgxError(
            f"{name}: RSA-{key.key_size} with exponent {exponent}; SGX needs RSA-3072 with "
            "exponent 3: softsgx sign --new-key makes one"
        )
