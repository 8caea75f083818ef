"""Enclave files: reading, laying out, measuring, signing, verifying.

Every format is reduced to one :class:`Plan`, which one routine measures and one loader builds, and
to SIGSTRUCTs.  Knows the manual (``arch``) and files, and neither processors nor systems.
"""

from softsgx.image.blob import Blob, enclave_size, tcs_page
from softsgx.image.measure import MEASURE_LIMIT_BYTES, hashed_bytes, measure
from softsgx.image.plan import (
    MASK_ALL,
    MASK_NONE,
    SECINFO_R,
    SECINFO_RW,
    SECINFO_RWX,
    SECINFO_RX,
    SECINFO_TCS,
    ZERO,
    Data,
    Fill,
    Page,
    Plan,
    Run,
    lay,
)
from softsgx.image.sigfile import bcd_date, date_text, mrsigner, read_sigstruct
from softsgx.image.sign import (
    SignOptions,
    attach_signature,
    key_pem,
    load_key,
    load_public_key,
    new_key,
    public_pem,
    sign,
    sign_plan,
    split_signed,
    unsigned_sigstruct,
)
from softsgx.image.verify import Check, check_signature, verify

__all__ = [
    "MASK_ALL",
    "MASK_NONE",
    "MEASURE_LIMIT_BYTES",
    "SECINFO_R",
    "SECINFO_RW",
    "SECINFO_RWX",
    "SECINFO_RX",
    "SECINFO_TCS",
    "ZERO",
    "Blob",
    "Check",
    "Data",
    "Fill",
    "Page",
    "Plan",
    "Run",
    "SignOptions",
    "attach_signature",
    "bcd_date",
    "check_signature",
    "date_text",
    "enclave_size",
    "hashed_bytes",
    "key_pem",
    "lay",
    "load_key",
    "load_public_key",
    "measure",
    "mrsigner",
    "new_key",
    "public_pem",
    "read_sigstruct",
    "sign",
    "sign_plan",
    "split_signed",
    "tcs_page",
    "unsigned_sigstruct",
    "verify",
]
