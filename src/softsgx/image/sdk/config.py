"""Configuration files of the SDK's signing tool, ``Enclave.config.xml``.

The reader knows every key of the tool and its range.  Numbers are decimal, hexadecimal or octal, as
``strtoull`` reads them.  A missing key has the tool's default.

Source:
    Intel SGX SDK, sdk/sign_tool/SignTool/sign_tool.cpp, manage_metadata.cpp, parse_metadata_file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from softsgx.arch import PAGE_BYTES, AttributesFlags, Xfrm
from softsgx.errors import SoftSgxError
from softsgx.image._file import Bytes
from softsgx.image.sdk.metadata import Elrange
from softsgx.image.sign import MASK_64, Choice

__all__ = ["SdkConfig", "read_sdk_config"]

_FILE_BYTES = 1 << 20
_ROOT = "EnclaveConfiguration"
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]{1,40}|[0-9]{1,40}")
_U16, _U32, _U64 = (1 << 16) - 1, (1 << 32) - 1, (1 << 64) - 1
_SIZE = _U64 // 2
_CHOICES: tuple[Choice, ...] = ("off", "on", "any")

_KEYS: dict[str, tuple[int, int]] = {
    "ProdID": (0, _U16), "ISVSVN": (0, _U16), "ReleaseType": (0, 1), "IntelSigned": (0, 1),
    "ProvisionKey": (0, 1), "LaunchKey": (0, 1), "DisableDebug": (0, 1), "HW": (0, 0x10),
    "TCSNum": (1, _U32), "TCSMaxNum": (1, _U32), "TCSMinPool": (0, _U32), "TCSPolicy": (0, 1),
    "StackMaxSize": (0x2000, _SIZE), "StackMinSize": (0x2000, _SIZE),
    "HeapMaxSize": (0, _SIZE), "HeapMinSize": (0, _SIZE), "HeapInitSize": (0, _SIZE),
    "ReservedMemMaxSize": (0, _SIZE), "ReservedMemMinSize": (0, _SIZE),
    "ReservedMemInitSize": (0, _SIZE), "ReservedMemExecutable": (0, 1),
    "MiscSelect": (0, _U32), "MiscMask": (0, _U32), "EnableKSS": (0, 1),
    "ISVFAMILYID_H": (0, _U64), "ISVFAMILYID_L": (0, _U64),
    "ISVEXTPRODID_H": (0, _U64), "ISVEXTPRODID_L": (0, _U64),
    "EnclaveImageAddress": (0x1000, _U64), "ELRangeStartAddress": (0, _U64),
    "ELRangeSize": (0x1000, _U64), "PKRU": (0, 2), "AMX": (0, 2), "UserRegionSize": (0, _SIZE),
    "EnableAEXNotify": (0, 1), "EnableIPPFIPS": (0, 1), "EnableOSSLFIPS": (0, 1),
}  # fmt: skip
"""Every key of the tool, with the least and the largest number it takes."""

_SIZES = {
    "stack_min": ("StackMinSize", 0x2000), "stack_max": ("StackMaxSize", 0x40000),
    "heap_min": ("HeapMinSize", 0x1000), "heap_init": ("HeapInitSize", None),
    "heap_max": ("HeapMaxSize", 0x100_0000), "reserved_min": ("ReservedMemMinSize", 0),
    "reserved_init": ("ReservedMemInitSize", None), "reserved_max": ("ReservedMemMaxSize", 0),
    "user_region": ("UserRegionSize", 0),
}  # fmt: skip
"""Fields of ``SdkLayout`` that are sizes: key and default in bytes."""

# Bits 55:48 are for software: the tool lets the loader choose them, and DEBUG.
_UNCHECKED_FLAGS = 0x00FF_0000_0000_0000 | AttributesFlags.DEBUG.value
_AVX_STATES = Xfrm.AVX | Xfrm.OPMASK | Xfrm.ZMM_HI256 | Xfrm.HI16_ZMM


@dataclass(frozen=True)
class SdkConfig:
    """The settings in a configuration file.

    Attributes:
        layout: fields of :class:`~softsgx.image.SdkLayout` that ``options`` do not determine.
        options: fields of :class:`~softsgx.image.SignOptions`.
    """

    layout: Mapping[str, Any]
    options: Mapping[str, Any]


def read_sdk_config(file: Bytes) -> SdkConfig:
    """Read a configuration file.

    Raises:
        SoftSgxError: the file is no configuration file, a key is unknown or appears twice, a number
            is out of range, or two settings contradict each other.
    """
    return _settings(file.name, _values(file))


def _values(file: Bytes) -> dict[str, int]:
    if len(file) > _FILE_BYTES:
        raise SoftSgxError(f"{file.name}: {len(file)} bytes; no configuration file of the SDK")
    # Entities could expand a small file without bound, and the SDK's reader supports none.
    if b"<!DOCTYPE" in bytes(file.view):
        raise SoftSgxError(f"{file.name}: has a document type; remove <!DOCTYPE …>")
    try:
        root = ElementTree.fromstring(bytes(file.view))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise SoftSgxError(f"{file.name}: not XML: {error}; correct the line") from error
    if root.tag != _ROOT:
        raise SoftSgxError(f"{file.name}: element {_short(root.tag)}; write <{_ROOT}>")
    values: dict[str, int] = {}
    for element in root:
        name, text = str(element.tag), (element.text or "").strip()
        if name not in _KEYS:
            raise SoftSgxError(
                f"{file.name}: {_short(name)}: no key of the SDK's signing tool; remove it"
            )
        if name in values:
            raise SoftSgxError(f"{file.name}: {name}: comes twice; remove one of them")
        low, high = _KEYS[name]
        value = _number(text)
        if value is None or not low <= value <= high:
            raise SoftSgxError(
                f"{file.name}: {name}: {_short(text)}: invalid; give a number from {low:#x} to "
                f"{high:#x}"
            )
        values[name] = value
    return values


def _number(text: str) -> int | None:
    """Return the number that strtoull with base 0 reads from the text."""
    if _NUMBER.fullmatch(text) is None:
        return None
    octal = len(text) > 1 and text[0] == "0" and text[1] not in "xX"
    try:
        return int(text, 8 if octal else 0)
    except ValueError:  # 08
        return None


def _short(text: str) -> str:
    return repr(text[:60])


def _settings(name: str, values: dict[str, int]) -> SdkConfig:
    def flag(key: str) -> bool:
        return bool(values.get(key, 0))

    def refuse(why: str) -> SoftSgxError:
        return SoftSgxError(f"{name}: {why}")

    if flag("ReleaseType"):
        raise refuse("ReleaseType 1 makes a SIGSTRUCT that EINIT refuses: its header has bit 127")
    for key in ("EnableIPPFIPS", "EnableOSSLFIPS"):
        if flag(key):
            raise refuse(f"{key}: needs a second signature or module, which sign does not write")
    if flag("LaunchKey") != flag("HW"):
        raise refuse("HW and LaunchKey: launch enclaves have both, others neither")
    for key in ("EnclaveImageAddress", "ELRangeStartAddress"):
        if key in values and "ELRangeSize" not in values:
            raise refuse(f"{key} needs ELRangeSize")
    most = values.get("TCSMaxNum", values.get("TCSNum", 1))
    if values.get("TCSNum", 1) > most or values.get("TCSMinPool", 0) > most:
        raise refuse(f"TCSNum and TCSMinPool are at most {most}, the number of threads")
    return SdkConfig(_layout(name, values), _options(values))


def _layout(name: str, values: dict[str, int]) -> dict[str, Any]:
    layout: dict[str, Any] = {
        "threads": values.get("TCSNum", 1),
        "threads_max": values.get("TCSMaxNum"),
        "threads_pool": values.get("TCSMinPool", 1),
        "unbound": bool(values.get("TCSPolicy", 1)),
        "reserved_executable": bool(values.get("ReservedMemExecutable", 0)),
    }
    for field, (key, default) in _SIZES.items():
        size = values.get(key, default)
        if size is not None and size % PAGE_BYTES:
            raise SoftSgxError(
                f"{name}: {key}: {size:#x}: not whole pages; give a multiple of 4096"
            )
        layout[field] = None if size is None else size // PAGE_BYTES
    if "ELRangeSize" in values:
        layout["elrange"] = Elrange(
            enclave_image_address=values.get("EnclaveImageAddress", 0),
            elrange_start_address=values.get("ELRangeStartAddress", 0),
            elrange_size=values["ELRangeSize"],
        )
    return layout


def _options(values: dict[str, int]) -> dict[str, Any]:
    def number(key: str) -> bytes:
        low, high = values.get(f"{key}_L", 0), values.get(f"{key}_H", 0)
        return low.to_bytes(8, "little") + high.to_bytes(8, "little")

    return {
        "attribute_mask": MASK_64 & ~_UNCHECKED_FLAGS,
        "xfrm_mask": MASK_64 & ~_AVX_STATES.value,
        "miscselect": values.get("MiscSelect", 0),
        "misc_mask": values.get("MiscMask", _U32),
        "isv_prod_id": values.get("ProdID", 0),
        "isv_svn": values.get("ISVSVN", 0),
        "isv_family_id": number("ISVFAMILYID"),
        "isv_ext_prod_id": number("ISVEXTPRODID"),
        "vendor": 0x8086 if values.get("IntelSigned") else 0,
        "swdefined": values.get("HW", 0),
        "kss": bool(values.get("EnableKSS")),
        "provision_key": bool(values.get("ProvisionKey")),
        "launch_key": bool(values.get("LaunchKey")),
        "aex_notify": bool(values.get("EnableAEXNotify")),
        "no_debug": bool(values.get("DisableDebug")),
        "pkru": _CHOICES[values.get("PKRU", 0)],
        "amx": _CHOICES[values.get("AMX", 0)],
    }
