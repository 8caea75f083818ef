"""Enclaves signed by Open Enclave: an ELF file with its properties in section ``.oeinfo``.

The file does not store the layout.  The loader derives it from a few numbers, and writes the result
into the image before it measures the image.

Source:
    Open Enclave SDK, host/sgx/create.c, host/sgx/loadelf.c, include/openenclave/bits/properties.h.
"""

from __future__ import annotations

import datetime
import struct
from collections.abc import Callable, Iterator

from cryptography.hazmat.primitives.asymmetric import rsa

from softsgx.arch import PAGE_BYTES, AttributesFlags, SigStruct, Tcs
from softsgx.errors import SoftSgxError
from softsgx.image._file import Bytes
from softsgx.image.blob import enclave_size, tcs_page
from softsgx.image.elf import DT_NEEDED, ET_DYN, Elf, ProgramHeader
from softsgx.image.enclave import EnclaveImage, plan_of
from softsgx.image.flat import page_flags
from softsgx.image.plan import (
    MASK_NONE,
    SECINFO_R,
    SECINFO_RW,
    SECINFO_TCS,
    ZERO,
    Fill,
    Padded,
    Plan,
    Run,
    lay,
)
from softsgx.image.sign import MASK_64, SignOptions, sign_plan
from softsgx.layout import U16, U32, U64, Nested, Raw, Structure, at

__all__ = [
    "OE_SECTION",
    "OeProperties",
    "embed_oe_sigstruct",
    "oe_properties",
    "oe_sign_options",
    "read_oe",
    "sign_oe",
]

OE_SECTION = ".oeinfo"
_END_MARKER = 0xECECECECECECECEC
_SIGNED_START = bytes.fromhex("06000000e100000000000100")
_CAPTURE_FAULTS, _ZERO_BASE = 1, 2
_MOST_TCS = 1 << 12
_GUARDS_TCS_SSA_TD = 7
_TCS_FIELDS_BYTES = Tcs.OFFSETS["reserved"]
_STACK_WORD = 0xCCCC_CCCC
_R_X86_64_TPOFF64 = 18
_RELA = struct.Struct("<QQq")
_UNCHECKED = AttributesFlags.MODE64BIT.value | AttributesFlags.KSS.value


_Value = Callable[[int], int]


class OeProperties(Structure, size=1960):
    """The content of ``.oeinfo``.

    Attributes:
        size: bytes of this structure.
        heap_pages: unmeasured pages after the relocations.
        stack_pages: of each thread.
        flags: bit 0 report #PF and #GP, bit 1 base address 0.
        start_address: where the image begins in an enclave with base address 0.
        oeinfo_rva: the loader writes this field and the next five.
    """

    size: int = at(0, U32, default=1960)
    enclave_type: int = at(4, U32, default=2)
    heap_pages: int = at(8, U64)
    stack_pages: int = at(16, U64)
    num_tcs: int = at(24, U64)
    product_id: int = at(32, U16)
    security_version: int = at(34, U16)
    flags: int = at(36, U32)
    family_id: bytes = at(40, Raw(16))
    extended_product_id: bytes = at(56, Raw(16))
    attributes: int = at(72, U64)
    xfrm: int = at(80, U64)
    start_address: int = at(88, U64)
    oeinfo_rva: int = at(96, U64)
    oeinfo_size: int = at(104, U64)
    reloc_rva: int = at(112, U64)
    reloc_size: int = at(120, U64)
    heap_rva: int = at(128, U64)
    enclave_size: int = at(136, U64)
    sigstruct: SigStruct = at(144, Nested(SigStruct))
    end_marker: int = at(1952, U64, default=_END_MARKER)


_SIGSTRUCT_AT = OeProperties.OFFSETS["sigstruct"]
_IMAGE_INFO_AT = OeProperties.OFFSETS["oeinfo_rva"]


def read_oe(file: Bytes) -> EnclaveImage:
    """Read an Open Enclave library, signed or not.

    Raises:
        SoftSgxError: it has no ``.oeinfo``, or the loader would refuse it.
    """
    elf = Elf(file)
    properties, _, _ = _properties(elf)
    plan = _plan(elf)
    signed = properties.sigstruct.pack()[: len(_SIGNED_START)] == _SIGNED_START
    notes = []
    if not signed:
        notes.append("not signed: its loader would sign it on the fly, for debugging only")
    if properties.flags & _ZERO_BASE:
        notes.append(f"needs base address 0, image at {properties.start_address:#x}")
    return EnclaveImage(
        file.name,
        "oe",
        plan,
        sigstruct=properties.sigstruct if signed else None,
        sigstruct_from=OE_SECTION if signed else "",
        notes=tuple(notes),
        attributes=(properties.attributes, properties.xfrm),
        facts=(
            ("heap pages", str(properties.heap_pages)),
            ("stack pages", str(properties.stack_pages)),
            ("TCS", str(properties.num_tcs)),
            ("flags", f"{properties.flags:#x}"),
        ),
    )


def oe_properties(file: Bytes, **changes: int | bytes) -> bytes:
    """Return the library with some of its properties changed.

    Args:
        file: the library.
        changes: fields of :class:`OeProperties` up to ``start_address``, by name.

    Raises:
        SoftSgxError: the file is no such library, or a field is unknown or too large.
    """
    properties, offset, _ = _properties(Elf(file))
    unknown = [
        name for name in changes if OeProperties.OFFSETS.get(name, _IMAGE_INFO_AT) >= _IMAGE_INFO_AT
    ]
    if unknown:
        raise SoftSgxError(
            f"{file.name}: no property {unknown[0]!r} to set in {OE_SECTION}; give a field of "
            "OeProperties"
        )
    try:
        config = properties.replace(**changes).pack()[:_IMAGE_INFO_AT]
    except (struct.error, ValueError) as error:
        raise SoftSgxError(
            f"{file.name}: properties {changes}: {error}; give values that fit the fields"
        ) from error
    copy = bytearray(file.view)
    copy[offset : offset + _IMAGE_INFO_AT] = config
    return bytes(copy)


def sign_oe(
    file: Bytes,
    key: rsa.RSAPrivateKey,
    *,
    date: datetime.date | None = None,
    **changes: int | bytes,
) -> bytes:
    """Return the library with its properties changed and signed as Open Enclave's tool does.

    Args:
        file: the library.
        key: RSA-3072 with exponent 3.
        date: goes into the SIGSTRUCT.
        changes: as :func:`oe_properties` takes.

    Raises:
        SoftSgxError: as :func:`oe_properties`.
    """
    changed = Bytes(file.name, oe_properties(file, **changes), origin=file.origin)
    sigstruct = sign_plan(_plan(Elf(changed)), key, oe_sign_options(changed, date))
    return embed_oe_sigstruct(changed, sigstruct)


def embed_oe_sigstruct(file: Bytes, sigstruct: SigStruct) -> bytes:
    """Return the library with ``sigstruct`` in its properties."""
    _, offset, _ = _properties(Elf(file))
    copy = bytearray(file.view)
    copy[offset + _SIGSTRUCT_AT : offset + _SIGSTRUCT_AT + SigStruct.SIZE] = sigstruct.pack()
    return bytes(copy)


def oe_sign_options(file: Bytes, date: datetime.date | None = None) -> SignOptions:
    """Return the options with which Open Enclave's tool signs a library with these properties."""
    properties, _, _ = _properties(Elf(file))
    flags = properties.attributes
    mask = MASK_64 & ~_UNCHECKED
    if flags & AttributesFlags.DEBUG:
        mask &= ~AttributesFlags.DEBUG.value
    if flags & AttributesFlags.KSS:
        mask |= AttributesFlags.KSS.value
    return SignOptions(
        attributes=flags,
        attribute_mask=mask,
        misc_mask=0xFFFF_FFFE if properties.flags & _CAPTURE_FAULTS else 0xFFFF_FFFF,
        isv_prod_id=properties.product_id,
        isv_svn=properties.security_version,
        isv_family_id=properties.family_id,
        isv_ext_prod_id=properties.extended_product_id,
        date=date,
    )


def _properties(elf: Elf) -> tuple[OeProperties, int, int]:
    """Return the properties, their offset in the file and their address in memory."""
    header = elf.section(OE_SECTION)
    if header is None:
        raise SoftSgxError(f"{elf.file.name}: no section {OE_SECTION}; not an Open Enclave library")
    file, offset = elf.file, header.sh_offset
    properties = file.structure(OeProperties, offset, OE_SECTION)
    if properties.size != OeProperties.SIZE or properties.end_marker != _END_MARKER:
        raise file.bad(
            offset,
            f"properties of {properties.size} bytes, end marker {properties.end_marker:#x}",
            f"want {OeProperties.SIZE} and {_END_MARKER:#x}",
        )
    return properties, offset, header.sh_addr


def _plan(elf: Elf) -> Plan:
    properties, offset, oeinfo_rva = _properties(elf)
    if DT_NEEDED in elf.dynamic:
        raise SoftSgxError(
            f"{elf.file.name}: needs another library, which its loader would add as a second "
            "module; that is not supported here: link it statically"
        )
    # The number is 65535 until the library is configured and signed, which is no damage.
    if not 0 < properties.num_tcs <= _MOST_TCS:
        raise elf.file.bad(
            offset + OeProperties.OFFSETS["num_tcs"],
            f"{properties.num_tcs} threads",
            f"1 to {_MOST_TCS} are taken; sign the library with their number",
        )
    image = _Image(elf)
    relocations = _relocations(elf)
    tls = _Tls(elf)
    pages_per_thread = properties.stack_pages + _GUARDS_TCS_SSA_TD + tls.pages
    heap_rva = image.size + len(relocations)
    total = (
        heap_rva
        + properties.heap_pages * PAGE_BYTES
        + properties.num_tcs * pages_per_thread * PAGE_BYTES
    )
    start = properties.start_address if properties.flags & _ZERO_BASE else 0
    size = enclave_size(total + start)
    if size > MASK_64:
        raise SoftSgxError(
            f"{elf.file.name}: its {OE_SECTION} asks for {total:#x} bytes, more than 2**64; give "
            "less heap, fewer threads or smaller stacks"
        )

    info = (oeinfo_rva, OeProperties.SIZE, image.size, len(relocations), heap_rva, size)
    image.write(oeinfo_rva + _IMAGE_INFO_AT, struct.pack("<6Q", *info), OE_SECTION)
    for name, value in _symbol_values(elf, image, relocations, tls):
        symbol = elf.symbol(name)
        if symbol is not None:
            image.write(symbol.value, struct.pack("<Q", value(symbol.value)), name)
    image.write(oeinfo_rva + _SIGSTRUCT_AT, bytes(SigStruct.SIZE), OE_SECTION)

    runs = [*image.runs(start), *lay(image.size + start, relocations, SECINFO_R, label="relocs")]
    at_page = heap_rva + start
    if properties.heap_pages:
        heap = Run(at_page, properties.heap_pages, SECINFO_RW, ZERO, MASK_NONE, "heap")
        runs.append(heap)
        at_page = heap.end
    oentry = elf.header.e_entry + start & MASK_64
    for _ in range(properties.num_tcs):
        runs += _thread(at_page, properties.stack_pages, tls.pages, oentry)
        at_page += pages_per_thread * PAGE_BYTES
    base = 0 if properties.flags & _ZERO_BASE else None
    return plan_of(elf.file.name, size, runs, base=base)


def _symbol_values(
    elf: Elf, image: _Image, relocations: bytes, tls: _Tls
) -> Iterator[tuple[str, _Value]]:
    """Yield the names of variables that the loader sets, and the value for each."""

    def const(value: int) -> _Value:
        return lambda _address: value & MASK_64

    yield "_enclave_rva", lambda address: address
    yield "_reloc_rva", const(image.size)
    yield "_reloc_size", const(len(relocations))
    # The loader leaves the variables of an empty section as the file has them.
    if tls.tdata_size:
        yield "_tdata_rva", const(tls.tdata_rva)
        yield "_tdata_size", const(tls.tdata_size)
        yield "_tdata_align", const(tls.tdata_align)
    if tls.tbss_size:
        yield "_tbss_size", const(tls.tbss_size)
        yield "_tbss_align", const(tls.tbss_align)
    yield "_td_from_tcs_offset", const((tls.pages + 4) * PAGE_BYTES)


def _thread(at_page: int, stack_pages: int, tls_pages: int, oentry: int) -> Iterator[Run]:
    """Yield one thread's pages: guard, stack, guard, TCS, SSA, guard, TLS and thread data."""
    at_page += PAGE_BYTES
    if stack_pages:
        stack = Run(at_page, stack_pages, SECINFO_RW, Fill(_STACK_WORD), label="stack")
        yield stack
        at_page = stack.end
    tcs = at_page + PAGE_BYTES
    thread_data = tcs + (tls_pages + 4) * PAGE_BYTES
    content = tcs_page(
        ossa=tcs + PAGE_BYTES, oentry=oentry, ofs_base=thread_data, ogs_base=thread_data
    )
    yield Run(tcs, 1, SECINFO_TCS, Padded(memoryview(content[:_TCS_FIELDS_BYTES])), label="TCS")
    yield Run(tcs + PAGE_BYTES, 2, SECINFO_RW, ZERO, label="SSA")
    yield Run(tcs + 4 * PAGE_BYTES, tls_pages + 1, SECINFO_RW, ZERO, label="TLS, thread data")


def _relocations(elf: Elf) -> bytes:
    """Return ``.rela.dyn`` and ``.rela.plt``, padded to pages; TPOFF64 with its symbol's value."""
    dynamic = elf.contents(".rela.dyn")
    if dynamic is None:
        return b""
    plt = elf.contents(".rela.plt")
    table = bytes(dynamic.view) + (bytes(plt.view) if plt is not None else b"")
    if len(table) % _RELA.size:
        raise elf.file.bad(dynamic.origin, f"relocations of {len(table)} bytes", "items have 24")
    symbols = elf.dynamic_symbols
    parts: list[bytes] = []
    for offset, info, addend in _RELA.iter_unpack(table):
        value = addend
        if info & 0xFFFF_FFFF == _R_X86_64_TPOFF64:
            index = (info >> 32) - 1  # the empty first symbol is not in the list
            if not 0 <= index < len(symbols):
                raise elf.file.bad(dynamic.origin, f"relocation of symbol {index + 1}")
            value = symbols[index].value
        parts.append(struct.pack("<QQQ", offset, info, value & MASK_64))
    padded = -(-len(table) // PAGE_BYTES) * PAGE_BYTES
    return b"".join(parts).ljust(padded, b"\0")


class _Tls:
    """The thread-local sections; the numbers of a missing one are 0."""

    def __init__(self, elf: Elf) -> None:
        tdata, tbss = elf.section(".tdata"), elf.section(".tbss")
        self.tdata_rva = tdata.sh_addr if tdata else 0
        self.tdata_size = tdata.sh_size if tdata else 0
        self.tdata_align = tdata.sh_addralign if tdata else 0
        self.tbss_size = tbss.sh_size if tbss else 0
        self.tbss_align = tbss.sh_addralign if tbss else 0
        # The linker may align .tdata less than the block that it begins.
        if tdata and elf.tls is not None and elf.tls.p_vaddr == tdata.sh_addr:
            self.tdata_align = elf.tls.p_align
        size = _up(self.tdata_size, self.tdata_align) + _up(self.tbss_size, self.tbss_align)
        self.pages = -(-size // PAGE_BYTES)


def _up(value: int, align: int) -> int:
    return -(-value // max(1, align)) * max(1, align)


class _Image:
    """The library's segments in memory: views of the file, and copies of the pages that change.

    Attributes:
        size: bytes from address 0 to the end of the last segment, whole pages.
    """

    def __init__(self, elf: Elf) -> None:
        file, where = elf.file, elf.header.e_phoff
        if elf.header.e_type != ET_DYN:
            raise file.bad(16, f"ELF type {elf.header.e_type}", "an enclave is a shared object")
        if not elf.loads or elf.loads[0].p_vaddr:
            raise file.bad(where, "no segment at address 0", "the first begins there")
        end = 0
        for load in elf.loads:
            if load.p_vaddr & -PAGE_BYTES < end:
                raise file.bad(where, f"segment at {load.p_vaddr:#x} begins before {end:#x}")
            end = load.p_vaddr + load.p_memsz
        self.size = _up(end, PAGE_BYTES)
        self._file, self._loads = file, elf.loads
        self._written: dict[int, bytearray] = {}  # by address

    def write(self, address: int, data: bytes, what: str) -> None:
        """Overwrite bytes of the image; ``what`` names them in the error if they lie outside."""
        load = self._at(address, len(data))
        if load is None:
            raise SoftSgxError(
                f"{self._file.name}: {what}: no segment has {len(data)} bytes at {address:#x}; "
                "the file is damaged"
            )
        done = 0
        while done < len(data):
            page, start = address + done & -PAGE_BYTES, address + done & PAGE_BYTES - 1
            part = data[done : done + PAGE_BYTES - start]
            if page not in self._written:
                self._written[page] = self._page(load, page)
            self._written[page][start : start + len(part)] = part
            done += len(part)

    def _at(self, address: int, size: int) -> ProgramHeader | None:
        for load in self._loads:
            start, end = _span(load)
            if start <= address and address + size <= end:
                return load
        return None

    def _page(self, load: ProgramHeader, page: int) -> bytearray:
        """Return a page with the bytes of the file, and zeros where the file has none."""
        first = max(page, load.p_vaddr)
        last = max(first, min(page + PAGE_BYTES, load.p_vaddr + load.p_filesz))
        at = load.p_offset + first - load.p_vaddr
        data = self._file.take(at, last - first, "PT_LOAD") if last > first else b""
        return bytearray(bytes(first - page) + data).ljust(PAGE_BYTES, b"\0")

    def runs(self, start: int) -> Iterator[Run]:
        """Yield the segments' pages, moved by ``start``."""
        for index, load in enumerate(self._loads):
            flags = page_flags(load.p_flags)
            at, end = _span(load)
            for page in sorted(page for page in self._written if at <= page < end):
                yield from self._unwritten(load, index, (at, page), start)
                label = f"PT_LOAD {index}"
                yield from lay(page + start, self._written[page], flags, label=label)
                at = page + PAGE_BYTES
            yield from self._unwritten(load, index, (at, end), start)

    def _unwritten(
        self, load: ProgramHeader, index: int, span: tuple[int, int], start: int
    ) -> Iterator[Run]:
        """Yield pages from one address to another: file bytes, then zeros."""
        (at, end), flags, label = span, page_flags(load.p_flags), f"PT_LOAD {index}"
        first = max(at, load.p_vaddr)
        last = min(end, load.p_vaddr + load.p_filesz)
        if last > first:
            data = self._file.take(load.p_offset + first - load.p_vaddr, last - first, label)
            yield from lay(first + start, data, flags, label=label)
            at = _up(last, PAGE_BYTES)
        if end > at:
            pages = (end - at) // PAGE_BYTES
            yield Run(at + start, pages, flags, ZERO, label=f"{label} bss")


def _span(load: ProgramHeader) -> tuple[int, int]:
    """Return the addresses of a segment's first page and of the end of its last."""
    return load.p_vaddr & -PAGE_BYTES, _up(load.p_vaddr + load.p_memsz, PAGE_BYTES)
