"""Valid enclave files of every format, and the places in them to damage."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

from tests.support.elfmaker import RW, RX, Seg, Sym, make_elf
from tests.support.enclave_files import (
    PAGE,
    code,
    oe_file,
    raw_file,
    sdk_laid_out,
    sdk_library,
    selftest_file,
    sgxs_file,
)

from softsgx.errors import SoftSgxError
from softsgx.image import SECINFO_RX, Blob, Bytes, Plan, tcs_page, write_sgxs
from softsgx.image.elf import Elf
from softsgx.image.sdk import SdkLayout, lay_out_sdk, sdk_blocks

__all__ = ["FILES", "NASTY", "SMALL", "hot_places", "original", "small_library", "tables_of"]

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
    return tables_of(original(name))


def tables_of(data: bytes) -> list[int]:
    """Return offsets of the tables of a valid file: headers, section table, metadata."""
    places = list(range(0, 512, 4))
    if data[:4] != b"\x7fELF":
        return places
    file = Bytes("file", data)
    elf = Elf(file)
    shoff = elf.header.e_shoff
    places += range(shoff, min(len(data), shoff + 64 * elf.header.e_shnum), 4)
    for section in elf.sections:
        start = section.header.sh_offset
        places += range(start, min(len(data), start + 256), 4)
    with suppress(SoftSgxError):  # it has none
        for block in sdk_blocks(file)[1]:
            start = block.bytes.origin
            places += range(start, start + 64, 4)
            places += range(start + 1872, start + len(block.bytes), 4)
    return places


SMALL = {
    "sgxs": lambda: b"".join(write_sgxs(_small_blob())),
    "raw": lambda: tcs_page(ossa=0x2000, oentry=0x1000, nssa=1) + code(PAGE, 2),
    "selftest": lambda: (
        make_elf(
            [Seg(0, tcs_page(ossa=0x3000, oentry=0x2000, nssa=1), RW), Seg(0x2000, code(0x40), RX)],
            entry=0x2000,
        ).data
    ),
    "sdk": lambda: _small_laid_out(),
}
"""The same formats with as little in them as there can be: cheap to damage and to read."""


def _small_laid_out() -> bytes:
    layout = SdkLayout(stack_max=4, heap_init=2, heap_max=2)
    return lay_out_sdk(Bytes("sdk", small_library()), layout)


def _small_blob() -> Plan:
    blob = Blob().data(code(100), flags=SECINFO_RX)
    blob.thread(oentry=0)
    return blob.plan()


def small_library() -> bytes:
    """Return an unsigned SDK library with room for one block of metadata."""
    segments = [Seg(0, code(0x80), RX), Seg(0x1010, code(0x40, 2), RW, memsz=0x80)]
    return sdk_library(segments=segments, symbols=[Sym("enclave_entry", 0x34)], descsz=0x1800).data
