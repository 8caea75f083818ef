"""Configuration files of Open Enclave's signing tool: lines of ``Key=Value``.

Deviation: CapturePFGPExceptions=0 leaves the flag clear; Open Enclave's tool sets it for any value.

Source:
    Open Enclave SDK, tools/oesign/oesign.c.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from softsgx.arch import AttributesFlags
from softsgx.errors import SoftSgxError
from softsgx.image._file import Bytes

__all__ = ["read_oe_config"]

_FILE_BYTES = 1 << 20
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20}")
_UUID = re.compile(r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}")
_LINE = re.compile(r"([^ \t=]+)[ \t=]+(.+)")
_DEBUG, _CAPTURE, _ZERO_BASE, _START = (
    "Debug",
    "CapturePFGPExceptions",
    "CreateZeroBaseEnclave",
    "StartAddress",
)
_FLAGS = ((_CAPTURE, 1), (_ZERO_BASE, 2))


def _number(least_bad: int) -> Callable[[str], int | None]:
    def read(text: str) -> int | None:
        if _NUMBER.fullmatch(text) is None:
            return None
        octal = len(text) > 1 and text[0] == "0" and text[1] not in "xX"
        try:
            value = int(text, 8 if octal else 0)
        except ValueError:  # 08
            return None
        return value if value < least_bad else None

    return read


def _uuid(text: str) -> bytes | None:
    return bytes.fromhex(text.replace("-", "")) if _UUID.fullmatch(text) else None


_U16, _U64 = _number((1 << 16) - 1), _number((1 << 64) - 1)
_BIT = _number(2)
_KEYS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    _DEBUG: ("", _BIT, "0 or 1"),
    "NumHeapPages": ("heap_pages", _U64, "a number of pages"),
    "NumStackPages": ("stack_pages", _U64, "a number of pages"),
    "NumTCS": ("num_tcs", _U64, "a number of threads"),
    "ProductID": ("product_id", _U16, "a number below 65535"),
    "SecurityVersion": ("security_version", _U16, "a number below 65535"),
    "FamilyID": ("family_id", _uuid, "a UUID"),
    "ExtendedProductID": ("extended_product_id", _uuid, "a UUID"),
    _CAPTURE: ("", _BIT, "0 or 1"),
    _ZERO_BASE: ("", _BIT, "0 or 1"),
    _START: ("", _U64, "an address"),
}
"""Every key: the property it sets, how its value is read, and what it is."""


def read_oe_config(file: Bytes, attributes: int) -> dict[str, int | bytes]:
    """Return the properties that a configuration file sets.

    Args:
        file: the configuration file.
        attributes: ATTRIBUTES.FLAGS of the library.

    Raises:
        SoftSgxError: a line is not ``Key=Value``, a key is unknown or appears twice, or a value is
            impossible.
    """
    values = _values(file)
    changes = {_KEYS[key][0]: value for key, value in values.items() if _KEYS[key][0]}
    if _DEBUG in values:
        debug = AttributesFlags.DEBUG.value
        attributes = attributes | debug if values[_DEBUG] else attributes & ~debug
    kss = AttributesFlags.KSS.value
    has_ids = "FamilyID" in values or "ExtendedProductID" in values
    changes["attributes"] = attributes | kss if has_ids else attributes & ~kss
    changes["flags"] = sum(bit for key, bit in _FLAGS if values.get(key))
    if values.get(_ZERO_BASE) and _START in values:
        changes["start_address"] = values[_START]
    return changes


def _values(file: Bytes) -> dict[str, Any]:
    if len(file) > _FILE_BYTES:
        raise SoftSgxError(f"{file.name}: {len(file)} bytes; no configuration file")
    values: dict[str, Any] = {}
    text = bytes(file.view).decode("utf-8", "backslashreplace")
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip(" \t\r")
        if not line or line.startswith("#"):
            continue
        where = f"{file.name}: line {number}"
        match = _LINE.fullmatch(line)
        if match is None:
            raise SoftSgxError(f"{where}: {line[:60]!r}: no Key=Value; write one, or a # comment")
        key, given = match[1], match[2]
        if key not in _KEYS:
            raise SoftSgxError(
                f"{where}: {key[:60]!r}: no key of Open Enclave's signing tool; remove the line"
            )
        if key in values:
            raise SoftSgxError(f"{where}: {key}: comes twice; remove one of the lines")
        _, read, wanted = _KEYS[key]
        values[key] = read(given)
        if values[key] is None:
            raise SoftSgxError(f"{where}: {key}: {given[:60]!r}: invalid; give {wanted}")
    return values
