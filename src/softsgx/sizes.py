"""Sizes that people write and read: ``93.5MiB``, ``512Ki``, ``0x10000``.

Source:
    Kubernetes, "Resource units: memory"; IEC 80000-13 for the names of units.
"""

from __future__ import annotations

import re

from softsgx.ondemand import pattern

__all__ = ["MOST_BYTES", "parse_size", "size_text"]

MOST_BYTES = (1 << 64) - 1
"""The largest size: what 64 bits hold."""

_BINARY = {
    f"{letter}i{suffix}": 1 << 10 * power
    for power, letter in enumerate("KMGTP", 1)
    for suffix in ("", "B")
}
_DECIMAL = {
    f"{letter}{suffix}": 1000**power
    for power, letter in enumerate("kMGTP", 1)
    for suffix in ("", "B")
}
_UNITS = {"": 1, "B": 1, "bytes": 1} | _BINARY | _DECIMAL
_SIZE = pattern(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)", re.ASCII)
_HEXADECIMAL = pattern(r"0[xX][0-9A-Fa-f]{1,30}", re.ASCII)


def parse_size(text: str) -> int:
    """Return the bytes of a size, a fraction of a byte rounded down.

    Args:
        text: decimal digits with or without a fraction, and a unit: none or ``B`` for bytes,
            ``KiB`` or ``Ki`` and so on for powers of 1024, ``kB`` or ``k`` and so on for powers of
            1000, up to ``PiB``; or ``0x`` and hexadecimal digits.

    Raises:
        ValueError: ``text`` is no size, or more than :data:`MOST_BYTES`; the message has the
            problem and a remedy.

    >>> parse_size("93.5MiB"), parse_size("512Ki"), parse_size("12M"), parse_size("0x1000")
    (98041856, 524288, 12000000, 4096)
    """
    text = text.strip()
    if _HEXADECIMAL.fullmatch(text):
        size = int(text, 16)
    else:
        match = _SIZE.fullmatch(text)
        if match is None or match[2] not in _UNITS:
            raise ValueError("not a size; write 4096, 64KiB, 93.5MiB, 512Mi or 0x10000")
        whole, _point, part = match[1].partition(".")
        size = int(whole + part) * _UNITS[match[2]] // 10 ** len(part)
    if size > MOST_BYTES:
        raise ValueError("out of range; give 0 to 2**64 bytes")
    return size


def size_text(size: int) -> str:
    """Return a size in bytes as text for people, with one decimal; :func:`parse_size` reads it.

    >>> size_text(98041856), size_text(512)
    ('93.5 MiB', '512 bytes')
    """
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << shift:
            value = f"{size / (1 << shift):.1f}"
            return f"{value.removesuffix('.0')} {unit}"
    return f"{size} bytes"
