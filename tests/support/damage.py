"""Valid enclave files of every format, and where in them damage hurts."""

from __future__ import annotations

from functools import cache

from tests.support.enclave_files import (
    oe_file,
    raw_file,
    sdk_laid_out,
    selftest_file,
    sgxs_file,
)

from softsgx.image import Bytes
from softsgx.image.elf import Elf
from softsgx.image.sdk import sdk_blocks

__all__ = ["FILES", "NASTY", "hot_places", "original"]

FILES = {
    "sgxs": sgxs_file,
    "raw": raw_file,
    "selftest": lambda: selftest_file().data,
    "sdk": lambda: bytes(sdk_laid_out().view),
    "oe": oe_file,
}
NASTY = [0, 1, 7, 255, 4095, 4096, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32, 1 << 40,
         (1 << 63) - 1, 1 << 63, (1 << 64) - 1]  # fmt: skip


@cache
def original(name: str) -> bytes:
    return FILES[name]()


@cache
def hot_places(name: str) -> list[int]:
    """Return offsets of tables: headers, section table, metadata, properties."""
    data = original(name)
    places = list(range(0, 512, 4))
    if data[:4] == b"\x7fELF":
        elf = Elf(Bytes(name, data))
        shoff = elf.header.e_shoff
        places += range(shoff, min(len(data), shoff + 64 * elf.header.e_shnum), 4)
        for section in elf.sections:
            start = section.header.sh_offset
            places += range(start, min(len(data), start + 256), 4)
    if name == "sdk":
        for block in sdk_blocks(Bytes(name, data))[1]:
            start = block.bytes.origin
            places += range(start, start + 64, 4)
            places += range(start + 1872, start + len(block.bytes), 4)
    return places
