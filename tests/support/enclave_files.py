"""Enclave files of every format, made by the tests, and their expected measurements.

``mrenclave`` is the manual's sequence block by block; ``pages_of`` a list of pages written down by
hand.  Both are independent of the package's own measuring and laying out.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa
from tests.support.elfmaker import (
    RW,
    RX,
    SHT_RELA,
    Made,
    Sec,
    Seg,
    Sym,
    make_elf,
    note_section,
)

from softsgx.arch import Tcs
from softsgx.image import Blob, Bytes, Plan, load_key, sign_oe, tcs_page, write_sgxs
from softsgx.image.oe import OeProperties
from softsgx.image.sdk import SdkLayout, lay_out_sdk

PAGE = 4096
KEY_FILE = Path(__file__).parent.parent / "golden" / "signing-key.pem"
ExpectedPage = tuple[int, int, bytes, bool]
"""Offset, SECINFO flags, content (zero-filled to a page), measured."""


@cache
def key() -> rsa.RSAPrivateKey:
    return load_key(KEY_FILE.read_bytes(), str(KEY_FILE))


def mrenclave(size: int, pages: Iterable[ExpectedPage], ssa_frame_size: int = 1) -> bytes:
    """Hash hand-written pages block by block."""
    digest = hashlib.sha256(struct.pack("<8sIQ44x", b"ECREATE", ssa_frame_size, size))
    for offset, flags, content, measured in pages:
        data = content.ljust(PAGE, b"\0")
        assert len(data) == PAGE
        digest.update(struct.pack("<8sQQ40x", b"EADD", offset, flags))
        for chunk in range(0, PAGE if measured else 0, 256):
            digest.update(struct.pack("<8sQ48x", b"EEXTEND", offset + chunk))
            digest.update(data[chunk : chunk + 256])
    return digest.digest()


def slow_measure(plan: Plan) -> bytes:
    """Hash a plan block by block, partial chunk masks included."""
    digest = hashlib.sha256(struct.pack("<8sIQ44x", b"ECREATE", plan.ssa_frame_size, plan.size))
    for page in plan.pages():
        digest.update(struct.pack("<8sQQ40x", b"EADD", page.offset, page.flags))
        for chunk in range(16):
            if page.mask >> chunk & 1:
                at = chunk * 256
                digest.update(struct.pack("<8sQ48x", b"EEXTEND", page.offset + at))
                digest.update(page.data[at : at + 256])
    return digest.digest()


def pages_of(
    offset: int, count: int, flags: int, *, word: int = 0, measured: bool = True
) -> list[ExpectedPage]:
    content = struct.pack("<I", word) * 1024
    return [(offset + i * PAGE, flags, content, measured) for i in range(count)]


def code(size: int, seed: int = 1) -> bytes:
    """Return bytes that differ at every place that matters."""
    return (hashlib.sha256(bytes([seed])).digest() * (size // 32 + 1))[:size]


def blob_plan() -> Plan:
    blob = Blob().data(code(5000), flags=0x205)
    blob.thread(oentry=0)
    return blob.heap(7).plan()


def sgxs_file() -> bytes:
    return b"".join(write_sgxs(blob_plan()))


def raw_file() -> bytes:
    return tcs_page(ossa=0x2000, oentry=0x1000, nssa=1) + code(3 * PAGE, 2)


def selftest_file() -> Made:
    tcs = tcs_page(ossa=0x4000, oentry=0x2000, nssa=1)
    return make_elf(
        [
            Seg(0, tcs + tcs_page(ossa=0x5000, oentry=0x2000, nssa=1), RW),
            Seg(0x2000, code(0x234), RX),
            Seg(0x3000, code(0x1800, 3), RW, memsz=0x4800),
        ],
        entry=0x2000,
    )


def sdk_library(
    *,
    segments: list[Seg] | None = None,
    symbols: list[Sym] | None = None,
    extra: list[Sec] | None = None,
    dynamic: list[tuple[int, int]] | None = None,
    dynamic_at: int = 0,
    descsz: int = 0x6000,
) -> Made:
    """Return an unsigned library with room for metadata."""
    return make_elf(
        segments or [Seg(0, code(0x1800), RX), Seg(0x3010, code(0x300, 2), RW, memsz=0x2100)],
        [note_section(descsz), *(extra or [])],
        symbols=[Sym("enclave_entry", 0x1234)] if symbols is None else symbols,
        dynamic=dynamic,
        dynamic_at=dynamic_at,
    )


def sdk_laid_out(layout: SdkLayout | None = None) -> Bytes:
    small = SdkLayout(
        stack_max=4, heap_init=4, heap_max=8, threads=3, miscselect=1, misc_mask=0xFFFF_FFFE
    )
    return Bytes("sdk", lay_out_sdk(Bytes("sdk", sdk_library().data), layout or small))


def oe_library(*, tls: bool = True, relocations: bool = True, **properties: int) -> Made:
    """Return an unsigned Open Enclave library."""
    values = {"heap_pages": 3, "stack_pages": 2, "num_tcs": 2, "attributes": 6, **properties}
    info = OeProperties(**values).pack()
    rela = struct.pack("<QQq", 0x2000, 8, 0x123) + struct.pack("<QQq", 0x2008, 2 << 32 | 18, -1)
    sections = [Sec(".oeinfo", info, addr=0x2100, in_segment=True)]
    if relocations:
        sections += [
            Sec(".rela.dyn", rela, SHT_RELA, entsize=24),
            Sec(".rela.plt", struct.pack("<QQq", 0x2010, 7, 0), SHT_RELA, entsize=24),
        ]
    if tls:
        sections += [
            Sec(".tdata", addr=0x2F00, size=0x40, align=8, kind=8),
            Sec(".tbss", addr=0x2F40, size=0x1001, align=32, kind=8),
        ]
    symbols = [Sym("_reloc_rva", 0x2040), Sym("tls_variable", 0x77), Sym("_enclave_rva", 0x5008)]
    return make_elf(
        [Seg(0, code(0x1100), RX), Seg(0x2000, code(0x1000, 2), RW, memsz=0x4000)],
        sections,
        symbols=symbols,
        entry=0x800,
    )


def oe_file() -> bytes:
    return sign_oe(Bytes("oe", oe_library().data), key())


def tcs_of(page: bytes | memoryview) -> Tcs:
    return Tcs.unpack(page)
