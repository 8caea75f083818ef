"""Sizes, addresses and arithmetic on them, used by all other modules of this package."""

from __future__ import annotations

from typing import NewType

__all__ = [
    "PAGE_BYTES",
    "PAGE_SHIFT",
    "EpcAddr",
    "LinAddr",
    "is_canonical",
    "page_of",
    "split_pages",
]

PAGE_SHIFT = 12
PAGE_BYTES = 1 << PAGE_SHIFT

LinAddr = NewType("LinAddr", int)
"""A linear address: the operand of an instruction, before paging."""

EpcAddr = NewType("EpcAddr", int)
"""The physical address of an EPC page, 4096-byte aligned."""


def page_of(address: int) -> int:
    """Return ``address`` with its low 12 bits cleared."""
    return address & ~(PAGE_BYTES - 1)


def is_canonical(address: int) -> bool:
    """Return whether a 64-bit address is canonical for 48 bits: bits 63:47 all equal."""
    return address >> 47 in (0, 0x1FFFF)


def split_pages(address: int, size: int) -> list[tuple[int, int]]:
    """Return (address, bytes) of the parts of a range, one for each page."""
    parts = []
    while size > 0:
        length = min(size, PAGE_BYTES - address % PAGE_BYTES)
        parts.append((address, length))
        address, size = address + length, size - length
    return parts
