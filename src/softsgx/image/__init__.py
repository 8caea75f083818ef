"""Enclave files: reading, laying out, measuring, signing, verifying.

Every format is reduced to one :class:`Plan`, which one routine measures and one loader builds, and
to SIGSTRUCTs.  Knows the manual (``arch``) and files, and neither processors nor systems.
"""

from softsgx.image._file import Bytes, read_bytes
from softsgx.image.blob import Blob, enclave_size, tcs_page
from softsgx.image.detect import FORMATS, detect_format, open_image, read_image
from softsgx.image.enclave import EnclaveImage, Variant
from softsgx.image.flat import read_raw, read_selftest
from softsgx.image.load import SecsLimits, choose_secs, ssa_frame_pages
from softsgx.image.measure import MEASURE_LIMIT_BYTES, hashed_bytes, measure
from softsgx.image.oe import (
    OeProperties,
    embed_oe_sigstruct,
    oe_properties,
    oe_sign_options,
    read_oe,
    sign_oe,
)
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
    Padded,
    Page,
    Plan,
    Run,
    Source,
    lay,
)
from softsgx.image.sdk import (
    SdkLayout,
    blocks_for,
    choose_block,
    embed_sigstruct,
    lay_out_sdk,
    read_sdk,
    sdk_is_laid_out,
)
from softsgx.image.sgxs import read_sgxs, write_sgxs
from softsgx.image.sigfile import bare_sigstruct, bcd_date, date_text, mrsigner, read_sigstruct
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
    throwaway_key,
    unsigned_sigstruct,
)
from softsgx.image.verify import Check, check_signature, verify

__all__ = [
    "FORMATS",
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
    "Bytes",
    "Check",
    "Data",
    "EnclaveImage",
    "Fill",
    "OeProperties",
    "Padded",
    "Page",
    "Plan",
    "Run",
    "SdkLayout",
    "SecsLimits",
    "SignOptions",
    "Source",
    "Variant",
    "attach_signature",
    "bare_sigstruct",
    "bcd_date",
    "blocks_for",
    "check_signature",
    "choose_block",
    "choose_secs",
    "date_text",
    "detect_format",
    "embed_oe_sigstruct",
    "embed_sigstruct",
    "enclave_size",
    "hashed_bytes",
    "key_pem",
    "lay",
    "lay_out_sdk",
    "load_key",
    "load_public_key",
    "measure",
    "mrsigner",
    "new_key",
    "oe_properties",
    "oe_sign_options",
    "open_image",
    "public_pem",
    "read_bytes",
    "read_image",
    "read_oe",
    "read_raw",
    "read_sdk",
    "read_selftest",
    "read_sgxs",
    "read_sigstruct",
    "sdk_is_laid_out",
    "sign",
    "sign_oe",
    "sign_plan",
    "split_signed",
    "ssa_frame_pages",
    "tcs_page",
    "throwaway_key",
    "unsigned_sigstruct",
    "verify",
    "write_sgxs",
]
